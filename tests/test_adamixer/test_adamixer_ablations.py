"""The ablations of the AdaMixer paper, as options of the decoder."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.adamixer import (
    AdaptiveMixing,
    AdaptiveSampling3D,
    BoxSelfAttention,
    InitialQueryGenerator,
)
from lors_plugin.adamixer.mixing import MIXING_STEPS
from lors_plugin.testing import randomize

ABLATIONS = {
    'channel_only': dict(mixing_steps=['channel']),
    'spatial_only': dict(mixing_steps=['spatial']),
    'other_order': dict(mixing_steps=['spatial', 'channel']),
    'fixed_channel': dict(fixed_mixing=['channel']),
    'fixed_both': dict(fixed_mixing=['spatial', 'channel']),
    'fixed_other_order': dict(
        mixing_steps=['spatial', 'channel'], fixed_mixing=['spatial']
    ),
    '2d_sampling': dict(scale_offsets=False),
    'no_overlap_bias': dict(overlap_bias=False),
    'no_encoding': dict(position_encoding='none'),
    'encoding_outside_values': dict(position_encoding='query_key'),
    'stage_loss_weights': dict(stage_loss_weights=[0.5, 1, 2.0]),
}


@pytest.mark.parametrize('name', ABLATIONS)
def test_everything_learns(name, build, tiny_config, make_samples):
    config = tiny_config('adamixer', decoder=ABLATIONS[name])
    detector = randomize(build(config)).train()
    images = torch.randn(2, 3, 64, 96)
    for autocast in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            losses = detector.loss(images, make_samples())
        detector.zero_grad()
        detector.parse_losses(losses)[0].backward()
        for key, param in detector.named_parameters():
            if param.requires_grad:
                assert param.grad is not None and param.grad.any(), key
    with torch.no_grad():
        found = detector.eval().predict(images, make_samples())
    assert len(found[0].pred_instances)


def by_hand(mixing, x, query, steps, fixed):
    """The formula of section 3.2, one query and group at a time."""
    groups, points, width = x.shape[2:]
    out = []
    for b in range(len(x)):
        for n in range(x.shape[1]):
            row = []
            for g in range(groups):
                numbers = []
                if mixing.generator is not None:
                    numbers = mixing.generator(query[b, n]).chunk(groups)[g]
                value, start, matrices = x[b, n, g], 0, {}
                for step, shape in dict(
                    channel=(width, width), spatial=(-1, points)
                ).items():
                    if step not in steps:
                        continue
                    size = width**2 if step == 'channel' else 6 * points
                    if step in fixed:
                        matrix = mixing.fixed_matrices[step][g]
                    else:
                        matrix = numbers[start : start + size]
                        start += size
                    matrices[step] = matrix.view(shape)
                for step in steps:
                    m = matrices[step]
                    value = value @ m if step == 'channel' else m @ value
                    value = F.layer_norm(value, value.shape).relu()
                row.append(value.flatten())
            out.append(torch.cat(row))
    out = torch.stack(out).view(*query.shape[:2], -1)
    return mixing.out_proj(out)


@pytest.mark.parametrize(
    'steps',
    [MIXING_STEPS, MIXING_STEPS[::-1], ('channel',), ('spatial',)],
)
@pytest.mark.parametrize('fixed', [(), ('channel',), ('spatial',), 'all'])
def test_mixing(steps, fixed):
    fixed = steps if fixed == 'all' else fixed
    options = dict(mixing_steps=steps, fixed_mixing=fixed)
    if not set(fixed) <= set(steps):
        with pytest.raises(ValueError, match='fixed_mixing='):
            AdaptiveMixing(16, 8, 2, 3, 6, **options)
        return
    mixing = AdaptiveMixing(16, 8, 2, 3, 6, **options)
    mixing.init_weights()
    randomize(mixing).double()
    x, query = torch.randn(2, 4, 2, 3, 4).double(), torch.randn(2, 4, 16)
    query = query.double()
    expected = by_hand(mixing, x, query, steps, fixed)
    assert_close(mixing(x, query), expected)
    mixing.recompute = True
    assert_close(mixing(x, query), expected)


def test_2d_sampling_reads_at_the_scale_of_the_box():
    flat = randomize(AdaptiveSampling3D(8, 2, 3, scale_offsets=False))
    content, xyzr = torch.randn(1, 5, 8), torch.randn(1, 5, 4)
    points = flat.points(content, xyzr)
    offsets = flat.offsets(content).view(1, 5, 2, 3, 2)
    width = 2 ** (xyzr[..., 2] - xyzr[..., 3] / 2)
    assert_close(
        points[..., 0],
        xyzr[..., 0, None, None] + offsets[..., 0] * width[..., None, None],
    )
    assert_close(points[..., 2], xyzr[..., 2, None, None].expand(1, 5, 2, 3))


@pytest.mark.parametrize('overlap_bias', [True, False])
def test_values_without_the_encoding(overlap_bias):
    """Equal to PyTorch's attention with another input for values."""
    own = randomize(BoxSelfAttention(16, 4, overlap_bias=overlap_bias))
    torch_own = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    torch_own.load_state_dict(
        dict(
            in_proj_weight=own.qkv.weight,
            in_proj_bias=own.qkv.bias,
            **{f'out_proj.{k}': v for k, v in own.proj.state_dict().items()},
        )
    )
    query, value = torch.randn(2, 2, 5, 16)
    overlap = torch.rand(2, 5, 5)
    bias = torch.zeros(2, 4, 5, 5)
    if overlap_bias:
        bias = (overlap + 1e-7).log()[:, None].repeat(1, 4, 1, 1)
        bias = bias * own.overlap_scale[:, None, None]
    expected, _ = torch_own(query, query, value, attn_mask=bias.flatten(0, 1))
    assert_close(own(query, overlap, value), expected)


def test_learned_boxes(build, tiny_config, make_samples):
    """They start as the image, follow its size, and learn in the end."""
    queries = InitialQueryGenerator(3, 8, 'learned')
    queries.init_weights()
    sizes = torch.tensor([[200.0, 100.0], [64.0, 64.0]])
    whole = InitialQueryGenerator(3, 8)(sizes)[1]
    assert_close(queries(sizes)[1], whole)
    with torch.no_grad():
        queries.boxes.weight[0] = torch.tensor([0.25, 0.5, 0.5, -3])
    box = queries(sizes)[1][0, 0]
    height = 100 / 1000  # not below a thousandth
    expected = [
        50, 50, math.log2(math.sqrt(100 * height)), math.log2(height / 100)
    ]  # fmt: skip
    assert_close(box, torch.tensor(expected))

    config = tiny_config(query_generator=dict(initial_boxes='learned'))
    detector = randomize(build(config)).train()
    boxes = detector.query_generator.boxes.weight
    boxes.data = torch.rand_like(boxes) / 4 + 0.4
    detector.parse_losses(
        detector.loss(torch.randn(2, 3, 64, 96), make_samples())
    )[0].backward()
    assert boxes.grad.abs().min() > 0


def test_loss_weights_of_stages(tiny_detector, make_samples):
    images = torch.randn(2, 3, 64, 96)
    plain = tiny_detector().loss(images, make_samples())
    weighted = tiny_detector(decoder=dict(stage_loss_weights=[0, 1, 2.5]))
    weighted = weighted.loss(images, make_samples())
    for name, value in plain.items():
        factor = [0, 1, 2.5][int(name[5])]
        assert_close(weighted[name], factor * value, msg=name)
