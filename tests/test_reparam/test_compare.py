"""Differences that are told, and those that must not hide."""

import math

import pytest
import torch

from lors_plugin.reparam.compare import (
    compare_outputs,
    difference,
    own_rounding,
)

IMAGES = torch.randint(
    256,
    (2, 3, 64, 64),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)


def test_largest_difference_of_nested_tensors():
    before = (torch.tensor([0.0, 4.0]), [dict(a=torch.tensor([-20.0]))])
    after = (torch.tensor([1.0, 4.0]), [dict(a=torch.tensor([-22.0]))])
    found = difference('x', before, after)
    assert (found.absolute, found.relative) == (2.0, 0.25)
    assert found.within(0.3) and not found.within(0.2)
    assert difference('x', before, before).relative == 0


def test_masks_of_infinity_are_alike():
    x = torch.tensor([-torch.inf, 2.0])
    assert difference('x', x, x + 1).absolute == 1


@pytest.mark.parametrize(
    'before, after',
    [
        (torch.ones(2), torch.tensor([1.0, torch.nan])),
        (torch.tensor([1.0, torch.nan]), torch.ones(2)),
        (torch.ones(2), torch.tensor([1.0, torch.inf])),
        (torch.ones(2), torch.ones(2, 1)),
        ([torch.ones(2)], []),
        ([], []),
    ],
)
def test_what_can_never_pass(before, after):
    assert not difference('x', before, after).within(1e9)


def test_features_outputs_and_detections(tiny_detector):
    before, after = tiny_detector().eval(), tiny_detector().eval()
    same = compare_outputs(before, after, list(IMAGES))
    assert [item.absolute for item in same] == [0, 0, 0]
    assert same[2].what.endswith('14 of 14 boxes found again')
    assert own_rounding(before, list(IMAGES)).relative < 1e-3
    with torch.no_grad():
        after.decoder.stages[-1].fc_reg.bias.add_(1)
    other = compare_outputs(before, after, list(IMAGES))
    assert other[0].absolute == 0
    assert not other[1].within(1e-4)
    assert math.isfinite(other[1].relative)
