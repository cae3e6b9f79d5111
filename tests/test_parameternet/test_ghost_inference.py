"""The program of inference does what the modules do, or leaves it to them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.ops.dynamic_conv.side_by_side import to_images
from lors_plugin.parameternet import backbone as parameternet
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.ghost import ConvNorm, GhostModule, plain_conv
from lors_plugin.parameternet.ghost_program import GhostInference
from lors_plugin.parameternet.inference_layers import Frame
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize


@pytest.fixture
def model(tiny):
    return tiny()


def both_ways(model, x):
    """By the modules, and as the network does without gradients."""
    with torch.no_grad():
        return list(model._compute(x)), model(x)


@pytest.fixture
def runs(monkeypatch):
    """Sizes of the batches that the program computed."""
    sizes = []
    plain = GhostInference.__call__

    def counted(self, x, *options):
        sizes.append(len(x))
        return plain(self, x, *options)

    monkeypatch.setattr(GhostInference, '__call__', counted)
    return sizes


def check(model, x, runs, program=True):
    del runs[:]
    slow, fast = both_ways(model, x)
    assert runs == [len(x)] * program
    for wanted, found in zip(slow, fast):
        assert found.is_contiguous()
        assert len(x) == 1 or wanted.std(0).mean() > 1e-5
        assert_close(found, wanted)


@pytest.mark.parametrize('size', [(32, 28), (33, 45), (1, 1)], ids=str)
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize(
    'options',
    [
        dict(num_experts=1),
        dict(num_experts=4),
        dict(num_experts=3, routing='softmax_mlp', temperature=3.0),
        dict(act_cfg=dict(type='SiLU')),
        dict(act_cfg=dict(type='ReLU', inplace=True), stem_stride=1),
    ],
    ids=lambda options: '-'.join(map(str, options.values())),
)
def test_whole_network(tiny, options, batch, size, runs):
    x = torch.randn(batch, 3, *size, dtype=torch.float64)
    check(tiny(**options), x, runs)


def test_odd_numbers_of_channels(tiny, runs):
    ghost = GhostModule(6, 9, plain_conv, dict(type='BN'))
    ghost = randomize(ghost).double().eval()
    net = nn.Module()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    net.stem, net.stages = tiny().stem, []
    program = GhostInference(net)
    half, maps = program._ghost(ghost), x.permute(2, 3, 0, 1).flatten(0, 1)
    with torch.no_grad():
        frame = Frame(program._layers, x, 2)
        parts, _ = half([maps], x.mean((2, 3)), (5, 4), frame)
        found = to_images(torch.cat(parts, 2), (5, 4))
        assert found.shape[1] == 9
        assert_close(found, ghost(x))


def test_merged_branches(tiny, runs):
    model = tiny(conv='rep')
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check(model, x, runs, program=False)
    reparameterize(model)
    assert model.stem.conv.bias is not None
    check(model, x, runs)


@pytest.mark.parametrize('memory', ['channels_last', 'strided', 'expanded'])
def test_images_of_any_strides(model, memory, runs):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    if memory == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif memory == 'strided':
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)[:, :, ::2, 1::2]
    else:
        x = x[:1].expand(3, -1, -1, -1)
        slow, fast = both_ways(model, x)
        assert_close(fast, tuple(slow))
        return
    check(model, x, runs)


def test_float32(tiny, runs):
    model = tiny(torch.float32)
    slow, fast = both_ways(model, torch.randn(3, 3, 32, 32))
    assert runs == [3]
    for wanted, found in zip(slow, fast):
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_in_pieces(model, monkeypatch, runs):
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    monkeypatch.setattr(parameternet, 'PIECE', 2 * 32 * 32)
    sizes = []
    plain = GhostInference._run

    def counted(self, part, *options):
        sizes.append(len(part))
        return plain(self, part, *options)

    monkeypatch.setattr(GhostInference, '_run', counted)
    check(model, x, runs)
    assert sizes == [2, 2, 1]


def test_given_images_and_results_stay(model):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        first = model(x)
        kept = [out.clone() for out in first]
        model(torch.randn_like(x))
    assert_close(x, before, rtol=0, atol=0)
    assert_close(list(first), kept, rtol=0, atol=0)


def test_weights_and_statistics_may_change(tiny, runs):
    model = tiny()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check(model, x, runs)
    with torch.no_grad():
        model.stem.norm.running_mean.data.add_(1)
        model.stages[0][0].expand.cheap.conv.weight.data.mul_(2)
        weight = model.stages[0][0].expand.primary.conv.weight
        weight.data = torch.randn_like(weight)
        model.train()(x)
    check(model.eval(), x, runs)


@pytest.mark.parametrize(
    'change',
    [
        lambda m: setattr(m.stem.conv, 'weight', other(m.stem.conv.weight)),
        lambda m: setattr(m.stem, 'conv', copy.deepcopy(m.stem.conv)),
        lambda m: m.stages.__setitem__(0, copy.deepcopy(m.stages[0])),
        lambda m: setattr(
            m.stages[2][0].se,
            'expand',
            copy.deepcopy(m.stages[2][0].se.expand),
        ),
    ],
    ids=['weight', 'module', 'stage', 'excite'],
)
def test_parts_may_be_replaced(tiny, change, runs):
    model = tiny()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    check(model, x, runs)
    change(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    check(model, x, runs)


def other(weight):
    return nn.Parameter(torch.randn_like(weight))


def first_layer(model):
    return model.stages[0][0].expand.primary


@pytest.mark.parametrize(
    'change',
    [
        lambda m: first_layer(m).norm.train(),
        lambda m: m.stem.conv.register_forward_hook(lambda *_: None),
        lambda m: m.stages[2].register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(m.stem, 'forward', m.stem.forward),
        lambda m: setattr(first_layer(m), 'norm', nn.GroupNorm(1, 4).double()),
        lambda m: setattr(first_layer(m), 'norm', nn.Identity()),
        lambda m: setattr(first_layer(m), 'act', nn.Softsign()),
        lambda m: setattr(m.stem.norm, 'eps', 0.1),
        lambda m: setattr(first_layer(m).conv, 'backend', 'reference'),
    ],
    ids=[
        'batch',
        'hook',
        'prehook',
        'patch',
        'group',
        'none',
        'act',
        'eps',
        'reference',
    ],
)
@pytest.mark.parametrize('seen', [False, True], ids=['new', 'seen'])
def test_what_is_left_to_the_modules(tiny, change, seen, runs):
    model = tiny()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    if seen:
        check(model, x, runs)
    change(model)
    check(model, x, runs, program=False)


def test_options_that_change_are_seen(tiny, runs):
    model = tiny()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    check(model, x, runs)
    conv = model.stages[0][0].project.cheap.conv
    conv.dilation = conv.padding = (2, 2)
    check(model, x, runs, program=False)
    conv.dilation = conv.padding = (1, 1)
    for scale in (1.0, 3.0):
        conv.routing.temperature = scale
        check(model, x, runs)


def test_who_watches_the_whole_network(tiny, runs):
    model, seen = tiny(), []
    model.register_forward_hook(
        lambda module, given, out: seen.append(len(out[0]))
    )
    check(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), runs)
    assert seen == [2]


def test_where_nothing_is_short_cut(model, monkeypatch, runs):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model(x)  # with gradients
    with torch.no_grad():
        model(nn.Parameter(x))
        assert not len(model(x[:0])[0])
        with torch.autocast('cpu', torch.bfloat16):
            model(x)
        forward = DynamicConv2d.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                DynamicConv2d, 'forward', lambda *given: forward(*given)
            )
            model(x)
        handle = nn.modules.module.register_module_forward_hook(
            lambda *_: None
        )
        model(x)
        handle.remove()
        monkeypatch.setenv('LORS_PLUGIN_BACKEND', 'reference')
        model(x)
        assert not runs
        monkeypatch.delenv('LORS_PLUGIN_BACKEND')
        model(x)
    assert runs == [2]


def test_copies_and_files(model, runs):
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = both_ways(model, x)[1]
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert_close(loaded(x), wanted)
        for weight in twin.parameters():
            weight.zero_()
        assert not twin(x)[0].any()
        assert_close(model(x), wanted)


def test_every_layer_is_known(model):
    program = GhostInference(model)
    assert program.unsupported is None
    layers = sum(isinstance(m, ConvNorm) for m in model.modules())
    assert len(program._layers) == layers


def test_traced_and_exported_graphs_have_the_modules(tiny):
    model = tiny(torch.float32)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert_close(
            traced(x[:1].expand(2, -1, -1, -1))[1],
            model(x[:1].expand(2, -1, -1, -1))[1],
            rtol=1e-3,
            atol=1e-4,
        )
    assert 'batch_norm' in str(traced.inlined_graph)


def test_weights_with_channels_last(tiny, runs):
    model = tiny(num_experts=1).to(memory_format=torch.channels_last)
    assert not model.stem.conv.weight.is_contiguous()
    check(model, torch.randn(2, 3, 32, 32, dtype=torch.float64), runs)
