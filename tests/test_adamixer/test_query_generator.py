"""Initial queries."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_iou

from lors_plugin.adamixer.box_geometry import decode_boxes
from lors_plugin.adamixer.query_generator import InitialQueryGenerator
from lors_plugin.testing import randomize


def test_contents_are_normalised_and_the_same_for_all_images():
    generator = randomize(InitialQueryGenerator(5, 16))
    content, _ = generator(torch.tensor([[96.0, 64.0], [50.0, 80.0]]))
    assert content.shape == (2, 5, 16)
    assert_close(content[0], content[1], rtol=0, atol=0)
    weight = generator.content.weight
    centred = weight - weight.mean(1, keepdim=True)
    std = (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert_close(content[0], centred / std)


def test_boxes_cover_each_image():
    generator = InitialQueryGenerator(5, 16)
    sizes = torch.tensor([[96.0, 64.0], [50.0, 80.0]])
    _, xyzr = generator(sizes)
    assert xyzr.shape == (2, 5, 4)
    for boxes, (width, height) in zip(decode_boxes(xyzr), sizes.tolist()):
        wanted = torch.tensor([[0.0, 0.0, width, height]]).repeat(5, 1)
        assert_close(boxes, wanted, rtol=0, atol=1e-3)


def test_only_the_contents_are_stored_and_trained():
    generator = InitialQueryGenerator(5, 16)
    assert list(generator.state_dict()) == ['content.weight']
    content, _ = generator(torch.tensor([[96.0, 64.0]] * 2))
    content.backward(torch.randn_like(content))
    assert generator.content.weight.grad.abs().sum() > 0


def test_no_query():
    with pytest.raises(ValueError, match='num_queries=0 must be a whole'):
        InitialQueryGenerator(0, 16)


def test_grid_by_hand():
    """Five queries on 3 columns and 2 rows of 32 x 16 pixels."""
    generator = InitialQueryGenerator(5, 16, initial_boxes='grid')
    content, xyzr = generator(torch.tensor([[96.0, 32.0], [48.0, 64.0]]))
    assert content.shape == (2, 5, 16)
    assert_close(
        decode_boxes(xyzr)[0],
        torch.tensor(
            [
                [0.0, 0, 32, 16],
                [32, 0, 64, 16],
                [64, 0, 96, 16],
                [0, 16, 32, 32],
                [32, 16, 64, 32],
            ]
        ),
    )
    assert_close(
        decode_boxes(xyzr)[1, 4], torch.tensor([16.0, 32.0, 32.0, 64.0])
    )


@pytest.mark.parametrize('number', [1, 2, 9, 60, 100])
def test_grid_lies_inside_and_does_not_overlap(number):
    generator = InitialQueryGenerator(number, 8, initial_boxes='grid')
    boxes = decode_boxes(generator(torch.tensor([[90.0, 60.0]]))[1])[0]
    assert boxes[:, :2].min() > -1e-3
    assert (boxes[:, 2:].max(0).values < torch.tensor([90.01, 60.01])).all()
    inner = box_iou(boxes, boxes) - torch.eye(number)
    assert inner.abs().max() < 1e-3


def test_unknown_start():
    with pytest.raises(ValueError, match="initial_boxes='random' must be one"):
        InitialQueryGenerator(5, 16, initial_boxes='random')
