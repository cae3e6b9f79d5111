"""Stages and mixing that run again in backward: the same numbers."""

import gc
import weakref

import pytest
import torch
from mmengine.runner.activation_checkpointing import (
    turn_on_activation_checkpointing,
)
from torch.testing import assert_close

WAYS = {
    'stages': dict(with_cp=True),
    'mixing': dict(recompute_mixing=True),
    'both': dict(with_cp=True, recompute_mixing=True),
}
SHARED = {
    'mixing.generator.weight',
    'mixing.generator.bias',
    'mixing.out_proj.weight',
}


def gradients(decoder, inputs, dtype):
    """Outputs, and gradients of parameters, contents and features."""
    feats = [feat.detach().clone().requires_grad_() for feat in inputs[0]]
    content = inputs[1].detach().clone().requires_grad_()
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        outs = decoder(feats, content, inputs[2])
    torch.manual_seed(1)
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
    decoder.zero_grad()
    torch.autograd.backward(outs, upstream)
    found = {name: p.grad for name, p in decoder.named_parameters()}
    found |= {f'feat{i}': feat.grad for i, feat in enumerate(feats)}
    return found | dict(content=content.grad, out=torch.cat(outs, -1).detach())


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_gradients_stay(kind, way, dtype, tiny_decoder, decoder_inputs):
    inputs = decoder_inputs()
    wanted = gradients(tiny_decoder(kind, backend='torch'), inputs, dtype)
    decoder = tiny_decoder(kind, backend='torch', **WAYS[way])
    found = gradients(decoder, inputs, dtype)
    if dtype is not None:
        # Gradients of shared weights are rounded once, or once a stage.
        for name in SHARED & wanted.keys():
            error = (found.pop(name) - (want := wanted.pop(name))).norm()
            assert error <= 3e-3 * want.norm(), name
    assert_close(found, wanted)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_less_is_kept_for_backward(kind, way, tiny_decoder, decoder_inputs):
    kept, inputs = [], decoder_inputs(queries=20)
    for options in ({}, WAYS[way]):
        decoder = tiny_decoder(kind, **options)
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            decoder(*inputs)
        kept.append(sum(sizes))
    assert kept[1] < (0.9 if way == 'mixing' else 0.3) * kept[0]


@pytest.mark.parametrize('way', WAYS)
def test_a_pass_without_backward_leaves_nothing_behind(
    way, tiny_decoder, decoder_inputs
):
    """Not even for the collector, which does not see into graphs."""
    decoder = tiny_decoder('lors', backend='torch', **WAYS[way])
    feats, content, boxes = decoder_inputs()
    content.requires_grad_()
    gc.collect()
    gc.disable()
    try:
        outs = decoder(feats, content, boxes)
        alive = weakref.ref(content)
        del outs, content
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_mixing_recomputed_by_mmengine(
    kind, dtype, tiny_decoder, decoder_inputs
):
    """Its option ``activation_checkpointing`` names modules."""
    feats, *others = decoder_inputs()
    inputs = [f.to(dtype) for f in feats], *(x.to(dtype) for x in others)
    wanted = gradients(tiny_decoder(kind).to(dtype), inputs, None)
    decoder = tiny_decoder(kind).to(dtype)
    names = dict(adamixer=['mixing.0', 'mixing.2'], lors=['mixing'])
    turn_on_activation_checkpointing(decoder, names[kind])
    found = gradients(decoder, inputs, None)
    if dtype == torch.float64:
        assert_close(found, wanted)
        return
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        # Sums of large gradients: the noise is relative to the largest.
        error = (found[name] - want).norm()
        assert error <= 1e-5 * want.norm() + 1e-6, name
