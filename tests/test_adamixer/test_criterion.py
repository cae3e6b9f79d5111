"""Matching and losses against a version written in plain torch."""

import math

import pytest
import torch
from mmengine.registry import DefaultScope
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from lors_plugin.adamixer import criterion as set_criterion
from lors_plugin.adamixer.criterion import SetCriterion

STAGES, QUERIES, CLASSES = 2, 6, 3
HEIGHT, WIDTH = 64, 96


def make_predictions(batch, stages=STAGES, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(stages, batch, QUERIES, CLASSES, generator=rng)
    corners = torch.rand(stages, batch, QUERIES, 2, 2, generator=rng)
    boxes = corners.sort(-2).values.flatten(-2)
    boxes = boxes * torch.tensor([WIDTH, HEIGHT] * 2) * 1.1 - 3
    return (
        scores.to(dtype).requires_grad_(),
        boxes.to(dtype).requires_grad_(),
    )


def focal(logits, targets):
    """Lin et al., equation 5, with alpha 1/4 and gamma 2."""
    p = logits.sigmoid()
    positive = -0.25 * (1 - p) ** 2 * p.log()
    negative = -0.75 * p**2 * (1 - p).log()
    return targets * positive + (1 - targets) * negative


def giou(a, b):
    """Rezatofighi et al., algorithm 1, of two boxes."""
    width = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0)
    height = (min(a[3], b[3]) - max(a[1], b[1])).clamp(min=0)
    inner = width * height
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
        max(a[3], b[3]) - min(a[1], b[1])
    )
    return inner / union - (hull - union) / hull


def l1(a, b, size):
    return ((a - b) / size).abs().sum()


def units(sample):
    height, width = sample.metainfo['img_shape']
    return torch.tensor([width, height, width, height])


def match(logits, boxes, sample):
    """Pairs of (query, box) of the cheapest matching."""
    truth = sample.gt_instances
    cost = torch.zeros(len(boxes), len(truth))
    for i in range(len(boxes)):
        for j in range(len(truth)):
            p = logits[i, truth.labels[j]].sigmoid()
            cls = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
            cost[i, j] = (
                2 * cls
                + 5 * l1(boxes[i], truth.bboxes[j], units(sample))
                - 2 * giou(boxes[i], truth.bboxes[j])
            )
    return list(zip(*linear_sum_assignment(cost.detach())))


def formula(scores, boxes, samples):
    """All losses; pairs and sums written out."""
    losses = {}
    for stage in range(len(scores)):
        cls = bbox = iou = scores.new_zeros(())
        number = 0
        for image, sample in enumerate(samples):
            logits, corners = scores[stage, image], boxes[stage, image]
            targets = torch.zeros_like(logits)
            for query, index in match(logits, corners, sample):
                truth = sample.gt_instances[int(index)]
                targets[query, truth.labels[0]] = 1
                wanted = truth.bboxes[0]
                bbox = bbox + l1(corners[query], wanted, units(sample))
                iou = iou + 1 - giou(corners[query], wanted)
                number += 1
            cls = cls + focal(logits, targets).sum()
        for name, weight, value in (
            ('cls', 2, cls),
            ('bbox', 5, bbox),
            ('iou', 2, iou),
        ):
            losses[f'stage{stage}_loss_{name}'] = (
                weight * value / max(number, 1)
            )
    return losses


@pytest.fixture
def criterion():
    return SetCriterion(CLASSES)


@pytest.mark.parametrize(
    'counts',
    [(3, 2), (1,), (4, 0, 2), (0, 0), (QUERIES + 3, 1)],
    ids=['usual', 'single', 'one_empty', 'all_empty', 'more_than_queries'],
)
def test_equals_plain_torch(criterion, make_samples, counts):
    shapes = [(HEIGHT - 8 * i, WIDTH - 4 * i) for i in range(len(counts))]
    samples = make_samples(counts, CLASSES, shapes)
    scores, boxes = make_predictions(len(counts))
    results = []
    for function in (criterion, formula):
        losses = function(scores, boxes, samples)
        upstream = {key: i + 1.0 for i, key in enumerate(losses)}
        total = sum(upstream[key] * loss for key, loss in losses.items())
        grads = torch.autograd.grad(total, (scores, boxes), allow_unused=True)
        grads = [torch.zeros(()) if g is None else g for g in grads]
        results.append((losses, grads))
    (have, have_grads), (wanted, wanted_grads) = results
    assert list(have) == list(wanted)
    assert_close(have, wanted, rtol=1e-4, atol=1e-5)
    if sum(counts):
        assert_close(have_grads, wanted_grads, rtol=1e-3, atol=1e-5)


def test_nothing_to_find(criterion, make_samples):
    """No division by zero, class loss remains, all gradients are there."""
    scores, boxes = make_predictions(2)
    losses = criterion(scores, boxes, make_samples((0, 0)))
    for stage in range(STAGES):
        assert losses[f'stage{stage}_loss_cls'] > 0
        assert losses[f'stage{stage}_loss_bbox'] == 0
        assert losses[f'stage{stage}_loss_iou'] == 0
    sum(losses.values()).backward()
    assert scores.grad.abs().sum() > 0
    assert not boxes.grad.any()


def test_losses_do_not_depend_on_how_a_batch_is_split(criterion, make_samples):
    """They are means over boxes, not over images."""
    counts = (4, 1, 0)
    samples = make_samples(counts)
    scores, boxes = make_predictions(3)
    whole = criterion(scores, boxes, samples)
    for key, value in whole.items():
        total = 0.0
        for i, count in enumerate(counts):
            part = slice(i, i + 1)
            losses = criterion(scores[:, part], boxes[:, part], samples[part])
            total += losses[key] * max(count, 1)
        assert_close(value, total / sum(counts))


@pytest.mark.parametrize('counts', [(4, 1), (1, 0), (0, 0)])
def test_processes_share_the_number_of_boxes(
    criterion, make_samples, monkeypatch, counts
):
    """The mean over processes is what one process gets on all images."""
    samples = make_samples(counts)
    scores, boxes = make_predictions(2)
    whole = criterion(scores, boxes, samples)
    monkeypatch.setattr(set_criterion, 'get_world_size', lambda: 2)
    parts = []
    for i in range(2):
        monkeypatch.setattr(
            set_criterion,
            'all_reduce',
            lambda total, other=counts[1 - i]: total.add_(other),
        )
        part = slice(i, i + 1)
        parts.append(criterion(scores[:, part], boxes[:, part], samples[part]))
    for key, value in whole.items():
        assert_close(value, (parts[0][key] + parts[1][key]) / 2)


@pytest.mark.parametrize(('what', 'stage', 'image'), [(0, 1, 0), (1, 0, 1)])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_predictions_that_are_not_finite(
    criterion, make_samples, what, stage, image, value
):
    predictions = [t.detach() for t in make_predictions(2)]
    predictions[what][stage, image, 3, 1] = value
    message = (
        f'predictions of stage {stage} are not finite for image '
        f'images/number{image}.jpg'
    )
    with pytest.raises(FloatingPointError, match=message):
        criterion(*predictions, make_samples())


@pytest.mark.parametrize('value', [math.nan, -math.inf])
def test_costs_that_are_not_finite(criterion, make_samples, value):
    samples = make_samples()
    samples[1].gt_instances.bboxes[0, 2] = value
    message = (
        'matching costs of stage 0 are not finite for image images/number1.jpg'
    )
    with pytest.raises(FloatingPointError, match=message):
        criterion(*make_predictions(2), samples)


def test_losses_that_are_not_finite(criterion, make_samples, monkeypatch):
    monkeypatch.setattr(
        criterion.loss_iou,
        'forward',
        lambda *args, **kwargs: torch.tensor(math.inf),
    )
    message = (
        'stage0_loss_iou is not finite; images of the batch: '
        'images/number0.jpg, images/number1.jpg'
    )
    with pytest.raises(FloatingPointError, match=message):
        criterion(*make_predictions(2), make_samples())


@pytest.mark.parametrize('label', [CLASSES, CLASSES + 5, -1])
def test_labels_out_of_range(criterion, make_samples, label):
    samples = make_samples()
    samples[1].gt_instances.labels[0] = label
    message = (
        f'image images/number1.jpg has the label {label}, but '
        f'decoder.num_classes={CLASSES} allows 0 to {CLASSES - 1}'
    )
    with pytest.raises(ValueError, match=message):
        criterion(*make_predictions(2), samples)


def test_images_without_a_path_are_named_by_id(criterion, make_samples):
    samples = make_samples()
    samples[1].gt_instances.labels[0] = 9
    samples[1].set_metainfo(dict(img_path=None))
    with pytest.raises(ValueError, match='image 1 has the label 9'):
        criterion(*make_predictions(2), samples)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(criterion, make_samples, dtype):
    scores, boxes = make_predictions(2)
    wanted = criterion(scores, boxes, make_samples())
    with torch.autocast('cpu', dtype):
        losses = criterion(scores, boxes, make_samples())
    for value in losses.values():
        assert value.dtype == torch.float32
    assert_close(losses, wanted, rtol=0, atol=0)


def test_no_autocast_inside(criterion, make_samples, monkeypatch):
    """Whatever losses and costs a config names."""
    seen = []

    def spy_on(function):
        def spy(*args, **kwargs):
            seen.append(torch.is_autocast_enabled('cpu'))
            return function(*args, **kwargs)

        return spy

    for part, name in (
        (criterion.assigner, 'assign'),
        (criterion.loss_cls, 'forward'),
        (criterion.loss_bbox, 'forward'),
        (criterion.loss_iou, 'forward'),
    ):
        monkeypatch.setattr(part, name, spy_on(getattr(part, name)))
    with torch.autocast('cpu', torch.bfloat16):
        criterion(*make_predictions(2), make_samples())
    assert len(seen) == STAGES * (2 + 3)
    assert not any(seen)


def test_other_losses_and_costs(make_samples):
    criterion = SetCriterion(
        CLASSES,
        loss_bbox=dict(type='SmoothL1Loss', loss_weight=1.0),
        loss_iou=dict(type='DIoULoss', loss_weight=3.0),
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[dict(type='IoUCost', iou_mode='iou', weight=1.0)],
        ),
    )
    losses = criterion(*make_predictions(2), make_samples())
    default = SetCriterion(CLASSES)(*make_predictions(2), make_samples())
    assert all(value.isfinite() for value in losses.values())
    key = 'stage0_loss_bbox'
    assert losses[key] != default[key]


def test_defaults_do_not_depend_on_the_scope(make_samples):
    given = *make_predictions(2), make_samples()
    expected = SetCriterion(CLASSES)(*given)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        losses = SetCriterion(CLASSES)(*given)
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
