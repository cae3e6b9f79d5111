"""The decoder as one graph, and how its stages share the levels."""

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.ops.sampling_3d import fused, level_gradients


def results(function, inputs):
    rng = torch.Generator().manual_seed(3)
    feats = [feat.detach().requires_grad_() for feat in inputs[0]]
    content = inputs[1].detach().requires_grad_()
    outs = function(feats, content, inputs[2])
    upstream = [torch.randn(out.shape, generator=rng) for out in outs]
    grads = torch.autograd.grad(outs, [content, *feats], upstream)
    return [*outs, *grads]


@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_one_graph(kind, tiny_decoder, decoder_inputs):
    """No graph breaks, and the results of the plain program."""
    torch._dynamo.reset()
    decoder = tiny_decoder(kind, backend='torch')
    compiled = torch.compile(decoder, fullgraph=True, backend='aot_eager')
    inputs = decoder_inputs()
    wanted = results(decoder, inputs)
    assert_close(results(compiled, inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('with_cp', [False, True])
def test_one_gradient_of_the_levels_for_all_stages(
    with_cp, tiny_decoder, decoder_inputs, monkeypatch
):
    calls = []
    function = level_gradients.levels_gradient
    monkeypatch.setattr(
        level_gradients,
        'levels_gradient',
        lambda grads, *args: (
            calls.append(len(grads)) or function(grads, *args)
        ),
    )
    decoder = tiny_decoder('lors', with_cp=with_cp, backend='torch')
    results(decoder, decoder_inputs())
    assert calls == [3]


def test_levels_are_converted_once(tiny_decoder, decoder_inputs, monkeypatch):
    calls = []
    function = fused.pack
    monkeypatch.setattr(
        fused, 'pack', lambda *args: calls.append(1) or function(*args)
    )
    with torch.no_grad():
        tiny_decoder('adamixer', backend='torch')(*decoder_inputs())
    assert calls == [1]


def test_backend_reaches_the_sampling(tiny_decoder):
    decoder = tiny_decoder('adamixer', backend='reference')
    assert {s.sampling.backend for s in decoder.stages} == {'reference'}
