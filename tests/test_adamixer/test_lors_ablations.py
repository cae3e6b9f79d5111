"""The ablations of the LORS paper, as options of the decoder."""

import pytest
import torch
from torch.testing import assert_close

ABLATIONS = {
    'adaptive_part_only': dict(static_ranks=0),
    'static_part_only': dict(adaptive_ranks=0),
    'adaptive_lors_only': dict(static_weights='full'),
    'static_lors_only': dict(adaptive_weights='full'),
    'shared_only': dict(adaptive_ranks=0, static_ranks=0),
    'private_only': dict(adaptive_weights='private', static_weights='private'),
    'other_ranks': dict(adaptive_ranks=[1, 2, 4], static_ranks=[4, 2, 1]),
    'other_groups': dict(adaptive_groups=[3, 2, 1]),
    'kaiming': dict(generator_init='kaiming', fan_in='matrix'),
    'one_stage': dict(num_stages=1, adaptive_groups=None),
    'four_stages': dict(num_stages=4, adaptive_groups=None),
}


@pytest.fixture(params=ABLATIONS)
def ablated(request, build, tiny_config):
    """A fresh detector, as training starts with it."""
    detector = build(tiny_config('lors', decoder=ABLATIONS[request.param]))
    detector.init_weights()
    return detector.train()


def train_a_step(detector, samples, optimizer):
    total, _ = detector.parse_losses(
        detector.loss(torch.randn(2, 3, 64, 96), samples)
    )
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total


def test_everything_learns_from_fresh_weights(ablated, make_samples):
    """No parameter is left out, and none is dead after some steps.

    Pairs of which one starts at zero take turns, so that a single step does
    not reach all.
    """
    params = {k: p for k, p in ablated.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values(), lr=1e-3)
    reached = set()
    for _ in range(4):
        total = train_a_step(ablated, make_samples(), optimizer)
        assert total.isfinite()
        assert all(p.grad is not None for p in params.values())
        reached |= {k for k, p in params.items() if p.grad.any()}
    assert set(params) == reached


def test_private_only_has_no_shared_weight(tiny_decoder):
    mixing = tiny_decoder(
        'lors', adaptive_weights='private', static_weights='private'
    ).mixing
    names = dict(mixing.named_parameters())
    assert 'generator.weight' not in names
    assert 'out_proj.weight' not in names
    groups, width, points, out, dims = 2, 16, 4, 6, 32
    adaptive, static = 3, 2
    stacks = 1 + 2 + 3
    by_hand = (
        groups * adaptive * stacks * (2 * width + out + points)
        + (dims + 1) * 2 * groups * adaptive**2 * stacks
        + 3 * (static * (groups * out * width + dims) + dims)
    )
    assert sum(p.numel() for p in names.values()) == by_hand


def test_fresh_private_matrices_come_from_the_factors(build, tiny_config):
    """Unit cores, whatever the query."""
    config = tiny_config('lors', decoder=dict(adaptive_weights='private'))
    decoder = build(config['decoder'])
    decoder.init_weights()
    cores = decoder.mixing.core_generators[2](torch.randn(1, 1, 32))
    cores = cores.view(2, 2, 3, 3, 3)
    assert_close(cores, torch.eye(3).expand_as(cores))


def test_full_weights_are_adamixer(tiny_decoder, decoder_inputs):
    """Nothing shared and nothing of low rank: stages as AdaMixer's."""
    lors = tiny_decoder('lors', adaptive_weights='full', static_weights='full')
    adamixer = tiny_decoder('adamixer')
    state = {
        key: value
        for key, value in lors.state_dict().items()
        if not key.startswith('mixing.')
    }
    for stage in range(3):
        for name in ('generator', 'out_proj'):
            for kind, value in (
                getattr(lors.mixing, name)[stage].state_dict().items()
            ):
                state[f'mixing.{stage}.{name}.{kind}'] = value
    adamixer.load_state_dict(state)
    inputs = decoder_inputs()
    for have, want in zip(lors(*inputs), adamixer(*inputs)):
        assert_close(have, want)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(adaptive_weights='private', adaptive_ranks=[1, 0, 1]),
            r'adaptive_ranks=\[1, 0, 1\] must hold .* at least 1',
        ),
        (
            dict(static_weights='private', static_ranks=0),
            'ranks=0 must hold .* at least 1',
        ),
        (dict(adaptive_weights='own'), "adaptive_weights='own' must be one"),
        (dict(static_weights=None), 'static_weights=None must be one of'),
    ],
)
def test_refused(options, message, tiny_decoder):
    with pytest.raises(ValueError, match=message):
        tiny_decoder('lors', **options)
