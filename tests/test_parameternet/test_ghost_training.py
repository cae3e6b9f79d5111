"""The program of training has the values and gradients of the modules."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.parameternet.ghost_program import GhostTraining
from lors_plugin.reparam import reparameterize


@pytest.fixture
def runs(monkeypatch):
    """Sizes of the batches that the program computed."""
    sizes = []
    plain = GhostTraining.__call__

    def counted(self, x, *options):
        sizes.append(len(x))
        return plain(self, x, *options)

    monkeypatch.setattr(GhostTraining, '__call__', counted)
    return sizes


def step(model, compute, x, seed=0):
    """Outputs, gradients and the state after them."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    outs = compute(x)
    rng = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(out.shape, generator=rng).to(out.dtype) for out in outs
    ]
    torch.autograd.backward(outs, grads)
    found = {name: p.grad for name, p in model.named_parameters()}
    return outs, dict(found, x=x.grad), model.state_dict()


def check(model, x, runs, program=True):
    twin = copy.deepcopy(model)
    wanted = step(twin, twin._compute, x)
    del runs[:]
    found = step(model, model, x)
    assert runs == [len(x)] * program
    for one, other in zip(wanted, found):
        assert_close(other, one)
    assert all(out.is_contiguous() for out in found[0])
    gradients = found[1].values()
    assert any(g is not None and g.abs().max() > 1e-3 for g in gradients)


def images(batch=3, height=33, width=45):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(
    'options',
    [
        dict(num_experts=4),
        dict(num_experts=1),
        dict(num_experts=3, routing='softmax_mlp', temperature=2.0),
        dict(with_cp=True),
        dict(norm_eval=True),
        dict(frozen_stages=1),
        dict(act_cfg=dict(type='SiLU')),
        dict(act_cfg=dict(type='ReLU', inplace=True), stem_stride=1),
    ],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_whole_network(tiny, options, batch, runs):
    check(tiny(**options).train(), images(batch), runs)


def test_with_gradients_in_evaluation(tiny, runs):
    check(tiny(), images(), runs)


def test_without_gradients_of_weights(tiny, runs):
    model = tiny().requires_grad_(False)
    model.stages[1][0].expand.cheap.norm.bias.requires_grad_()
    check(model.train(), images(), runs)


def test_many_kernels_in_pieces(tiny, monkeypatch, runs):
    monkeypatch.setattr(
        'lors_plugin.ops.dynamic_conv.fused.PIECE_BYTES', 20_000
    )
    check(tiny().train(), images(5), runs)


def test_merged_branches(tiny, runs):
    model = tiny(conv='rep')
    reparameterize(model)
    assert model.stages[0][0].expand.primary.conv.bias is not None
    check(model.train(), images(), runs)


def test_average_of_all_batches(tiny, runs):
    model = tiny().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    check(model, images(), runs)
    check(model, images(), runs)


def test_float32(tiny, runs):
    model = tiny(torch.float32).train()
    twin = tiny().train()
    x = images()
    outs, grads, _ = step(model, model, x.float())
    assert runs == [3]
    wanted, exact, _ = step(twin, twin._compute, x)
    for found, other in zip(outs, wanted):
        assert_close(found.double(), other, rtol=1e-4, atol=1e-4)
    for name, grad in exact.items():
        error = (grads[name].double() - grad).norm()
        assert error <= 1e-4 * grad.norm(), name


def test_one_value_a_channel(tiny):
    with pytest.raises(ValueError, match='more or larger images'):
        tiny().train()(images(1, 8, 8))


def test_second_derivatives_are_refused(tiny):
    model = tiny().train()
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(
        model(x)[1].square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match='backward|once_differentiable'):
        grad.sum().backward()


@pytest.mark.parametrize(
    'change',
    [
        lambda m: m.stem.conv.register_forward_hook(lambda *_: None),
        lambda m: m.stages[2].register_full_backward_hook(lambda *_: None),
        lambda m: setattr(m.stages[0][0].expand.cheap, 'norm', nn.Identity()),
    ],
    ids=['hook', 'backward', 'norm'],
)
def test_what_is_left_to_the_modules(tiny, change, runs):
    model = tiny().train()
    model(images())
    change(model)
    check(model, images(), runs, program=False)


def test_autocast_is_left_to_the_modules(tiny, runs):
    model = tiny(torch.float32).train()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(images().float())[1]
    assert out.dtype == torch.bfloat16
    assert not runs


def test_memory_of_a_step(tiny):
    """Less is kept for backward than by the modules."""
    model = tiny(num_experts=4).train()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)

    def kept(compute):
        sizes = {}

        def pack(tensor):
            memory = tensor.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            outs = compute(x)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert outs
        return sum(n for at, n in sizes.items() if at not in weights)

    assert kept(model) < 0.75 * kept(model._compute)


def test_weights_with_channels_last(tiny, runs):
    model = tiny(num_experts=1).to(memory_format=torch.channels_last)
    check(model.train(), images(), runs)
