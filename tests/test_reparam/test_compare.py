"""Differences that are told, and those that must not hide."""

import math

import pytest
import torch

from lors_plugin.reparam.compare import (
    compare_costs,
    compare_outputs,
    detections_difference,
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
    assert [item.relative for item in same] == [0, 0, 0]
    assert str(same[0]).startswith('largest difference of features: 0, 0 of')
    assert same[2].what.endswith('14 of 14 boxes found again')
    assert own_rounding(before, list(IMAGES)).relative < 1e-3
    with torch.no_grad():
        after.decoder.stages[-1].fc_reg.bias.add_(1)
    other = compare_outputs(before, after, list(IMAGES))
    assert other[0].absolute == 0
    assert not other[1].within(1e-4)
    assert math.isfinite(other[1].relative)


def detections(boxes, scores, labels):
    return dict(
        boxes=torch.tensor(boxes),
        scores=torch.tensor(scores),
        labels=torch.tensor(labels),
    )


BOXES = [
    [0.0, 0.0, 10.0, 10.0],
    [50.0, 50.0, 100.0, 100.0],
    [5.0, 5.0, 9.0, 9.0],
]
FOUND = detections(BOXES, [0.8, 0.4, 0.2], [1, 0, 1])


@pytest.mark.parametrize(
    ('other', 'error'),
    [
        (FOUND, 0.0),
        # Another order, as of equal scores.
        (detections(BOXES[::-1], [0.2, 0.4, 0.8], [1, 0, 1]), 0.0),
        (detections([BOXES[0], [50.0, 51.0, 100.0, 100.0], BOXES[2]],
                    [0.8, 0.4, 0.2], [1, 0, 1]), 0.01),
        (detections(BOXES, [0.8, 0.48, 0.2], [1, 0, 1]), 0.1),
        # The last one may be another of the same score, and only that.
        (detections([*BOXES[:2], BOXES[0]], [0.8, 0.4, 0.2], [1, 0, 0]), 0.0),
        (detections(BOXES, [0.8, 0.4, 0.2], [2, 0, 1]), torch.inf),
        (detections(BOXES[:2], [0.8, 0.4], [1, 0]), torch.inf),
    ],
)  # fmt: skip
def test_detections_in_any_order(other, error):
    for pair in ((FOUND, other), (other, FOUND)):
        found = detections_difference(*([side] for side in pair))
        assert found.relative == pytest.approx(error, abs=1e-4)
    assert found.within(1e9) == (error < torch.inf)


def test_detections_that_are_no_numbers():
    other = dict(FOUND, scores=torch.tensor([0.8, torch.nan, 0.2]))
    assert not detections_difference([FOUND], [other]).within(1e9)


def test_costs(tiny_detector):
    model = tiny_detector().eval()
    one, two = compare_costs([model, model], (64, 64), [1, 2], 1)
    assert one.parameters == sum(p.numel() for p in model.parameters())
    assert one.multiply_adds == two.multiply_adds > 0
    assert all(one.seconds[batch] > 0 for batch in (1, 2))
