"""Boxes as (x, y, z, r): hand numbers, inverses, loops."""

import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_area, box_iou

from lors_plugin.adamixer.box_geometry import (
    box_position_encoding,
    box_sizes,
    boxes_from_sizes,
    decode_boxes,
    intersection_over_foreground,
    refine_boxes,
)


def random_boxes(*lead, dtype=torch.float64):
    xyzr = torch.randn(*lead, 4, dtype=dtype)
    return xyzr * xyzr.new_tensor([60, 60, 1, 0.7]) + xyzr.new_tensor(
        [100, 100, 5, 0]
    )


def encode_boxes(corners):
    """The inverse of ``decode_boxes``."""
    x1, y1, x2, y2 = corners.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return torch.stack(
        [
            (x1 + x2) / 2,
            (y1 + y2) / 2,
            (width * height).log2() / 2,
            (height / width).log2(),
        ],
        -1,
    )


def test_whole_image_by_hand():
    """An image of 128 x 32 pixels: sqrt(w h) = 64, h / w = 1 / 4."""
    xyzr = boxes_from_sizes(torch.tensor([[128.0, 32.0]]))
    assert_close(xyzr, torch.tensor([[64.0, 16.0, 6.0, -2.0]]))
    assert_close(decode_boxes(xyzr), torch.tensor([[0.0, 0.0, 128.0, 32.0]]))


def test_size_by_hand():
    sizes = box_sizes(torch.tensor([10.0, 20.0, 5.0, 2.0]))
    assert_close(sizes, torch.tensor([16.0, 64.0]))


def test_decode_has_an_inverse():
    xyzr = random_boxes(2, 5)
    corners = decode_boxes(xyzr)
    assert (corners[..., 2:] > corners[..., :2]).all()
    assert_close(encode_boxes(corners), xyzr)


def test_refine_by_hand():
    """Steps in the plane are in units of 2^z = 8 pixels."""
    xyzr = torch.tensor([10.0, 20.0, 3.0, 1.0])
    delta = torch.tensor([0.5, -1.0, 0.25, -2.0])
    wanted = torch.tensor([14.0, 12.0, 3.25, -1.0])
    assert_close(refine_boxes(xyzr, delta), wanted)


def test_refine_by_nothing_changes_nothing():
    xyzr = random_boxes(3)
    assert_close(refine_boxes(xyzr, torch.zeros(3, 4)), xyzr)


def test_refine_keeps_float32_for_low_precision_steps():
    xyzr = torch.tensor([[1001.25, 777.5, 5.0625, 0.5]])
    out = refine_boxes(xyzr, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert_close(out, xyzr, rtol=0, atol=0)


def test_iof_by_hand():
    """A square of 4 and one of 2 in its corner; one far away."""
    xyzr = encode_boxes(
        torch.tensor(
            [[[0.0, 0, 4, 4], [0, 0, 2, 2], [3, 3, 5, 5], [90, 90, 91, 91]]]
        )
    )
    wanted = torch.tensor(
        [
            [
                [1, 0.25, 1 / 16, 0],
                [1, 1, 0, 0],
                [0.25, 0, 1, 0],
                [0, 0, 0, 1],
            ]
        ]
    )
    assert_close(intersection_over_foreground(xyzr), wanted)


def test_iof_agrees_with_iou():
    xyzr = random_boxes(2, 6)
    iof = intersection_over_foreground(xyzr)
    for boxes, values in zip(decode_boxes(xyzr), iof):
        iou, area = box_iou(boxes, boxes), box_area(boxes)
        union = (area[:, None] + area[None]) / (1 + iou)
        assert_close(values, iou * union / area[:, None])


def test_iof_of_vanishing_boxes_is_finite():
    xyzr = torch.tensor([[[5.0, 5.0, -30.0, 0.0], [5.0, 5.0, 3.0, 0.0]]])
    iof = intersection_over_foreground(xyzr)
    assert iof.isfinite().all()
    assert iof[0, 0, 0] < 1e-9


@pytest.mark.parametrize('width', [4, 12, 20, 64])
def test_position_encoding_against_a_loop(width):
    xyzr = random_boxes(5)
    each = width // 4
    wanted = torch.empty(5, width, dtype=torch.float64)
    for row, (x, y, z, r) in enumerate(xyzr.tolist()):
        for part, value in enumerate((x / 1000, y / 1000, z, r)):
            for i in range(each):
                angle = value / 10000 ** (2 * (i // 2) / each)
                function = math.cos if i % 2 else math.sin
                wanted[row, part * each + i] = function(angle)
    code = box_position_encoding(xyzr, width)
    assert_close(code, wanted, rtol=0, atol=1e-6)


def test_geometry_is_float32_under_autocast():
    xyzr = random_boxes(1, 4, dtype=torch.float32)
    functions = (
        decode_boxes,
        intersection_over_foreground,
        lambda boxes: box_position_encoding(boxes, 32),
        lambda boxes: refine_boxes(boxes, torch.ones(1, 4, 4).bfloat16()),
        lambda boxes: boxes_from_sizes(boxes[..., :2].abs() + 1),
    )
    for function in functions:
        with torch.autocast('cpu', torch.bfloat16):
            low = function(xyzr)
        assert low.dtype == torch.float32
        assert_close(low, function(xyzr), rtol=0, atol=0)
