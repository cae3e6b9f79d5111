"""The decoder as one graph, and how its stages share the levels."""

import pytest
import torch
from torch.testing import assert_close


def results(function, inputs):
    rng = torch.Generator().manual_seed(3)
    feats = [feat.detach().requires_grad_() for feat in inputs[0]]
    content = inputs[1].detach().requires_grad_()
    outs = function(feats, content, inputs[2])
    upstream = [torch.randn(out.shape, generator=rng) for out in outs]
    grads = torch.autograd.grad(outs, [content, *feats], upstream)
    return [*outs, *grads]


@pytest.mark.parametrize(
    'kind', ['lors', pytest.param('adamixer', marks=pytest.mark.thorough)]
)
def test_one_graph(kind, tiny_decoder, decoder_inputs):
    """No graph breaks, and the results of the plain program."""
    torch._dynamo.reset()
    stages = dict(adamixer=dict(num_stages=1),
                  lors=dict(num_stages=2, adaptive_groups=[1, 2]))  # fmt: skip
    decoder = tiny_decoder(kind, backend='torch', **stages[kind])
    compiled = torch.compile(decoder, fullgraph=True, backend='aot_eager')
    inputs = decoder_inputs()
    wanted = results(decoder, inputs)
    assert_close(results(compiled, inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('with_cp', [False, True])
def test_stages_share_the_levels(with_cp, tiny_decoder, decoder_inputs):
    """One table for all stages, and one gradient of it."""
    decoder = tiny_decoder('lors', with_cp=with_cp, backend='torch')
    levels, terms = [], []
    for stage in decoder.stages:
        stage.sampling.register_forward_pre_hook(
            lambda module, args: levels.append(args[0])
        )
    inputs = decoder_inputs()
    for feat in inputs[0]:
        feat.requires_grad_()
    out = decoder(*inputs)[1]
    levels[0].table.register_hook(lambda grad: terms.append(grad.terms))
    out.sum().backward()
    assert all(level is levels[0] for level in levels)
    assert len(levels) == len(decoder.stages) * (1 + with_cp)
    assert [len(each) for each in terms] == [len(decoder.stages)]


def test_backend_reaches_the_sampling(tiny_decoder):
    decoder = tiny_decoder('adamixer', backend='reference')
    assert {s.sampling.backend for s in decoder.stages} == {'reference'}
