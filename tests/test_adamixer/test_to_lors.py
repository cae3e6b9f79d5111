"""LORS fitted to a trained AdaMixer."""

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.adamixer import to_lors
from lors_plugin.testing import randomize

FULL = dict(adaptive_ranks=16, adaptive_groups=1, static_ranks=32)


@pytest.fixture
def detectors(tiny_detector):
    """An AdaMixer and a LORS-AdaMixer of its sizes, with other weights."""

    def make(**options):
        sizes = dict(num_groups=2, in_points=4)
        source = tiny_detector('adamixer', decoder=sizes).eval()
        options = dict(sizes, **options)
        return source, tiny_detector('lors', 1, decoder=options).eval()

    return make


@pytest.fixture
def batches(make_samples):
    """Two batches of two images."""
    rng = torch.Generator().manual_seed(3)
    inputs = torch.randint(256, (4, 3, 64, 96), generator=rng).byte()
    samples = make_samples((1, 1, 1, 1))
    return [
        dict(inputs=list(inputs[i : i + 2]), data_samples=samples[i : i + 2])
        for i in (0, 2)
    ]


def stage_inputs(detector, batches):
    """Queries and mixed features of each stage, as its layers get them."""
    found = [([], []) for _ in detector.decoder.mixing]

    def keep(values):
        return lambda _, args: values.append(args[0].flatten(0, 1))

    handles = [
        layer.register_forward_pre_hook(keep(values))
        for stage, kept in zip(detector.decoder.mixing, found)
        for layer, values in zip((stage.generator, stage.out_proj), kept)
    ]
    with torch.no_grad():
        for batch in batches:
            data = detector.data_preprocessor(batch)
            detector(**data, mode='tensor')
    for handle in handles:
        handle.remove()
    return [[torch.cat(values) for values in kept] for kept in found]


def matrices(mixing, stage, query):
    """Matrices of LORS by the paper, shape (queries, G, C C + Q P)."""
    cores = mixing.core_generators[stage](query)
    parts = []
    for part, core in zip(
        (mixing.channel_part, mixing.spatial_part), cores.chunk(2, -1)
    ):
        core = core.unflatten(-1, (*part.left[stage].shape[:2], -1))
        rank = part.ranks[stage]
        core = core.unflatten(-1, (rank, rank))
        left, right = part.left[stage], part.right[stage]
        parts.append(
            torch.einsum('gkar,ngkrs,gksb->ngab', left, core, right).flatten(2)
        )
    shared = mixing.generator(query).unflatten(-1, (parts[0].shape[1], -1))
    return shared + torch.cat(parts, -1)


@pytest.mark.parametrize('images', [0, 4])
def test_full_ranks_lose_nothing(detectors, batches, images):
    source, target = detectors(**FULL)
    errors = to_lors(source, target, batches, images)
    assert max(e.channel for e in errors) < 1e-6
    assert max(e.spatial for e in errors) < 1e-6
    assert max(e.projection for e in errors) < 1e-6
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_close(target(image), source(image), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('groups', [1, [1, 2, 3]])
def test_errors_are_those_of_the_recorded_queries(detectors, batches, groups):
    source, target = detectors(
        adaptive_ranks=[3, 2, 0],
        adaptive_groups=groups,
        static_ranks=[4, 0, 1],
    )
    errors = to_lors(source, target, batches, 4)
    width = target.decoder.mixing.shape.width**2
    for i, (query, mixed) in enumerate(stage_inputs(source, batches)):
        stage = source.decoder.mixing[i]
        with torch.no_grad():
            wanted = stage.generator(query).unflatten(-1, (2, -1))
            lost = matrices(target.decoder.mixing, i, query) - wanted
            projected = stage.out_proj(mixed)
            wrong = target.decoder.mixing.out_proj(mixed, i) - projected
        for name, part in (
            ('channel', slice(None, width)),
            ('spatial', slice(width, None)),
        ):
            spread = (wanted - wanted.mean(0))[..., part]
            share = (lost[..., part].norm() / spread.norm()).item()
            assert getattr(errors[i], name) == pytest.approx(share, rel=1e-2)
            assert 1e-3 < share < 1
        # The bias makes up for the mean.
        assert_close(wrong.mean(0), torch.zeros(32), rtol=0, atol=1e-4)
        share = wrong.norm() / (projected - projected.mean(0)).norm()
        assert errors[i].projection == pytest.approx(share.item(), rel=1e-2)


def test_real_queries_are_fitted_better_than_the_norm_tells(
    detectors, batches
):
    source, target = detectors(adaptive_ranks=3)
    wrong = []
    for images in (0, 4):
        to_lors(source, target, batches, images)
        wrong.append(0.0)
        for i, (query, _) in enumerate(stage_inputs(source, batches)):
            wanted = source.decoder.mixing[i].generator(query)
            found = matrices(target.decoder.mixing, i, query).flatten(1)
            wrong[-1] += (found - wanted).square().sum().item()
    assert wrong[1] < 0.8 * wrong[0]


def test_more_rank_loses_less(detectors):
    errors = []
    for rank in (0, 2, 8):
        source, target = detectors(adaptive_ranks=rank, static_ranks=rank)
        errors.append(to_lors(source, target))
    for less, more in zip(errors, errors[1:]):
        for name in ('channel', 'spatial', 'projection'):
            for a, b in zip(less, more):
                assert getattr(b, name) < getattr(a, name)


def test_all_else_is_taken_over(detectors):
    source, target = detectors()
    before = {k: v.clone() for k, v in source.state_dict().items()}
    to_lors(source, target)
    new = target.state_dict()
    for key, value in source.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)
        if not key.startswith('decoder.mixing.'):
            assert_close(new[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(in_points=8), "'in_points': 4.*'in_points': 8.*set num_groups"),
        (dict(num_stages=2, adaptive_groups=1), 'num_stages=2.* 3 stages'),
        (dict(adaptive_weights='full'), "must be 'lors'"),
        (dict(static_weights='private'), "static_weights='private'"),
        (dict(feedforward_channels=16), 'besides the mixing'),
    ],
)
def test_what_cannot_be_fitted(detectors, options, message):
    source, target = detectors(**options)
    with pytest.raises((ValueError, RuntimeError), match=f'(?s){message}'):
        to_lors(source, target)


def test_no_image(detectors):
    source, target = detectors()
    with pytest.raises(ValueError, match='no images'):
        to_lors(source, target, [], 5)


def test_random_weights_are_replaced(detectors):
    """The former weights of the target do not matter."""
    source, first = detectors()
    _, second = detectors()
    randomize(second, 7)
    to_lors(source, first)
    to_lors(source, second)
    for key, value in first.state_dict().items():
        assert_close(second.state_dict()[key], value, rtol=0, atol=0)
