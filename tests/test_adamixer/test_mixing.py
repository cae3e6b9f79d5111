"""Mixing modules of AdaMixer and of LORS."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.mixing import AdaptiveMixing, PrivateMixing
from lors_plugin.testing import randomize

B, N, D, G, C, P, Q = 2, 3, 12, 2, 4, 5, 6
SIZES = dict(
    embed_dims=D, feat_channels=G * C, num_groups=G, in_points=P, out_points=Q
)


def lors(**options):
    options = dict(
        dict(adaptive_ranks=[2, 0, 3], adaptive_groups=[1, 1, 2]), **options
    )
    return LORSAdaptiveMixing(
        3, **SIZES, **dict(dict(static_ranks=2), **options)
    )


def inputs(dtype=torch.float64):
    return (
        torch.randn(B, N, G, P, C, dtype=dtype),
        torch.randn(B, N, D, dtype=dtype),
    )


def layer_norm(x):
    return F.layer_norm(x, x.shape[-2:])


def mix(x, generated, extra=None):
    """Section 3.2 for one query: M first, then S, within each group."""
    out = []
    for g, row in enumerate(generated.view(G, C * C + Q * P)):
        m, s = row[: C * C].view(C, C), row[C * C :].view(Q, P)
        if extra is not None:
            m, s = m + extra[0][g], s + extra[1][g]
        y = layer_norm(x[g] @ m).relu()
        out.append(layer_norm(s @ y).relu().flatten())
    return torch.cat(out)


def test_adamixer_is_the_formula():
    mixing = randomize(AdaptiveMixing(**SIZES).double())
    x, query = inputs()
    out = mixing(x, query)
    for b in range(B):
        for n in range(N):
            generated = mixing.generator(query[b, n])
            wanted = mixing.out_proj(mix(x[b, n], generated))
            assert_close(out[b, n], wanted)


@pytest.mark.parametrize('stage', [0, 1, 2])
def test_lors_is_the_formula(stage):
    mixing = randomize(lors().double())
    x, query = inputs()
    out = mixing(x, query, stage)
    num, rank = [(1, 2), (1, 0), (2, 3)][stage]
    for b in range(B):
        for n in range(N):
            q = query[b, n]
            core = mixing.core_generators[stage](q)
            core = core.view(2, G, num, rank, rank)
            extra = []
            for part, cores in zip(
                (mixing.channel_part, mixing.spatial_part), core
            ):
                left, right = part.left[stage], part.right[stage]
                extra.append(
                    [
                        sum(
                            left[g, k] @ cores[g, k] @ right[g, k]
                            for k in range(num)
                        )
                        for g in range(G)
                    ]
                )
            flat = mix(x[b, n], mixing.generator(q), extra)
            weight = mixing.out_proj.layer_weight(stage)
            wanted = weight @ flat + mixing.out_proj.bias[stage]
            assert_close(out[b, n], wanted)


def test_fresh_stages_do_the_same():
    mixing = lors()
    mixing.init_weights()
    for bias in mixing.out_proj.bias:
        torch.nn.init.zeros_(bias)
    x, query = inputs(torch.float32)
    first = mixing(x, query, 0)
    for stage in (1, 2):
        assert_close(mixing(x, query, stage), first)
    randomize(mixing)
    first = mixing(x, query, 0)
    for stage in (1, 2):
        assert (mixing(x, query, stage) - first).abs().max() > 0.01


def test_fresh_lors_is_a_shared_adamixer():
    """A stack without private parts computes what AdaMixer's mixing does."""
    mixing, plain = lors(), AdaptiveMixing(**SIZES)
    mixing.init_weights()
    plain.generator.load_state_dict(mixing.generator.state_dict())
    plain.out_proj.weight.data.copy_(mixing.out_proj.weight)
    plain.out_proj.bias.data.copy_(mixing.out_proj.bias[2])
    x, query = inputs(torch.float32)
    assert_close(mixing(x, query, 2), plain(x, query))


def test_lors_options():
    mixing = lors(generator_init='kaiming', fan_in='matrix')
    mixing.init_weights()
    bound = (6 / D) ** 0.5
    assert 0.9 * bound < mixing.generator.weight.abs().max() <= bound
    assert mixing.channel_part.fan_in == 'matrix'
    assert mixing.spatial_part.fan_in == 'matrix'
    with pytest.raises(ValueError, match="generator_init='one' must be one"):
        lors(generator_init='one')


def test_private_mixing_calls_its_stage():
    parts = [randomize(AdaptiveMixing(**SIZES), seed) for seed in range(2)]
    mixing = PrivateMixing(parts)
    x, query = inputs(torch.float32)
    assert_close(mixing(x, query, stage=1), parts[1](x, query))
    assert (mixing(x, query, stage=0) != mixing(x, query, stage=1)).any()


def calls_of(mixing, *args):
    graph = make_fx(mixing)(*args).graph
    return [
        node.args[-1]
        for node in graph.nodes
        if 'adaptive_mixing' in str(node.target)
    ]


@pytest.mark.parametrize('backend', ['torch', 'cpu', 'reference'])
def test_backend_reaches_the_operator(backend):
    x, query = inputs(torch.float32)
    wanted = [] if backend == 'reference' else [backend]
    mixing = AdaptiveMixing(**SIZES, backend=backend)
    assert calls_of(mixing, x, query) == wanted
    assert calls_of(lors(backend=backend), x, query, 0) == wanted


@pytest.mark.parametrize('kind', ['lors', 'adamixer'])
def test_layers_are_called(kind):
    """So that hooks, adapters and FSDP reach them."""
    if kind == 'lors':
        mixing, stage = lors(), [2]
    else:
        mixing, stage = AdaptiveMixing(**SIZES), []
    called = []
    for name in ('generator', 'out_proj'):
        getattr(mixing, name).register_forward_hook(
            lambda *_, name=name: called.append(name)
        )
    mixing(*inputs(torch.float32), *stage)
    assert called == ['generator', 'out_proj']


@pytest.mark.parametrize('kind', ['lors', 'adamixer'])
def test_recompute_keeps_less_and_changes_nothing(kind):
    x, query = inputs(torch.float32)
    results, kept = [], []
    for recompute in (False, True):
        if kind == 'lors':
            mixing, stage = lors(recompute=recompute), [2]
        else:
            mixing, stage = AdaptiveMixing(**SIZES, recompute=recompute), []
        randomize(mixing)
        leaves = [t.clone().requires_grad_() for t in (x, query)]
        weights = {p.data_ptr() for p in (*leaves, *mixing.parameters())}
        sizes = {}

        def pack(tensor, weights=weights, sizes=sizes):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = mixing(*leaves, *stage)
        out.square().sum().backward()
        grads = [p.grad for p in mixing.parameters() if p.grad is not None]
        results.append([out, *(t.grad for t in leaves), *grads])
        kept.append(sum(sizes.values()))
    assert_close(results[1], results[0], rtol=0, atol=0)
    # Beside its inputs the output, which the projection needs anyway.
    assert B * N * G * Q * C * 4 <= kept[1] < 1.2 * B * N * G * Q * C * 4
    assert kept[0] > 1.4 * kept[1]
