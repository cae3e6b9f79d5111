"""Fresh detectors: every rule of the papers, after ``init_weights``."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

KINDS = ['adamixer', 'lors']
BRANCHES = ('cls_branch', 'reg_branch')


def xavier(linear):
    weight = linear.weight
    bound = math.sqrt(6 / sum(weight.shape))
    assert weight.abs().max() <= bound
    assert weight.std() > 0.5 * bound / math.sqrt(3)


@pytest.mark.parametrize('points', [9, 5], ids=['square', 'no_square'])
@pytest.mark.parametrize('kind', KINDS)
def test_init_weights_of_the_detector(kind, points, build, tiny_config):
    """Everything that methods.md says, from weights that were all wrong.

    MMEngine does not look into a plain ``nn.ModuleList``: a part that is
    forgotten keeps the random weights.
    """
    detector = build(tiny_config(kind, decoder=dict(in_points=points)))
    with torch.no_grad():
        for param in detector.parameters():
            param.uniform_(5, 6)
    detector.init_weights()
    decoder = detector.decoder

    for conv in detector.neck.convs:
        bound = math.sqrt(6 / (conv.in_channels + conv.out_channels))
        assert 0.8 * bound < conv.weight.abs().max() <= bound
        assert not conv.bias.any()
    content = detector.query_generator.content.weight
    assert abs(content.mean()) < 0.3
    assert 0.8 < content.std() < 1.2

    for stage in decoder.stages:
        attention = stage.attention
        for linear in (
            attention.qkv,
            attention.proj,
            stage.ffn.layers[0][0],
            stage.ffn.layers[1],
            *(getattr(stage, name)[0] for name in BRANCHES),
            stage.fc_cls,
        ):
            xavier(linear)
        assert attention.overlap_scale.min() >= 0
        assert attention.overlap_scale.max() <= 4
        assert not stage.fc_reg.weight.any()
        assert not stage.fc_reg.bias.any()
        prior = stage.fc_cls.bias.sigmoid()
        assert_close(prior, torch.full_like(prior, 0.01))

        offsets = stage.sampling.offsets
        assert not offsets.weight.any()
        bias = offsets.bias.view(2, points, 3)
        assert (bias[..., 2] == -1).all()
        assert bias[..., :2].abs().max() <= 0.5
        cells = 3 * bias[..., :2]
        on_grid = ((cells - cells.round()).abs() < 1e-5).all()
        assert on_grid == (points == 9)

    if kind == 'lors':
        mixing = decoder.mixing
        assert not mixing.generator.weight.any()
        for core in mixing.core_generators:
            assert not core.weight.any()
            assert not core.bias.any()
    else:
        for mixing in decoder.mixing:
            assert not mixing.generator.weight.any()
            xavier(mixing.out_proj)


@pytest.mark.parametrize('kind', KINDS)
def test_what_keeps_the_default_of_torch(kind, build, tiny_config):
    """Biases of linears, the generator's too; LORS' shared projection."""
    detector = build(tiny_config(kind))
    before = copy.deepcopy(detector.state_dict())
    detector.init_weights()
    after = detector.state_dict()
    kept = ['decoder.stages.1.ffn.layers.1.bias']
    if kind == 'lors':
        kept += [
            f'decoder.mixing.{name}'
            for name in (
                'generator.bias',
                'channel_part.left.2',
                'spatial_part.right.0',
                'out_proj.weight',
                'out_proj.down.1',
                'out_proj.up.1',
                'out_proj.bias.1',
            )
        ]
        assert not after['decoder.mixing.out_proj.up.1'].any()
    else:
        kept += [
            'decoder.mixing.1.generator.bias',
            'decoder.mixing.1.out_proj.bias',
        ]
    for key in kept:
        assert_close(after[key], before[key], rtol=0, atol=0)
    bias = after[kept[1]]
    assert 0 < bias.abs().max() <= 32**-0.5


@pytest.mark.parametrize('kind', KINDS)
def test_fresh_detector_predicts_the_prior_and_the_whole_image(
    kind, build, tiny_config, make_samples
):
    detector = build(tiny_config(kind)).eval()
    detector.init_weights()
    scores, boxes, _ = detector(torch.randn(2, 3, 64, 96), make_samples())
    assert (scores.sigmoid() < 0.2).all()
    wanted = torch.tensor([0.0, 0.0, 96.0, 64.0])
    assert_close(boxes, wanted.expand_as(boxes), rtol=0, atol=1e-3)
