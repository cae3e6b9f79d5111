"""Images are cut into tiles, and boxes of all tiles are joined."""

import numpy as np
import pytest

from lors_plugin.inference import (
    InferenceError,
    Prediction,
    Predictor,
    TiledPredictor,
)

pytest.importorskip('sahi')


class Squares(Predictor):
    """Finds white squares on black, whole or cut, one class per side."""

    detects = True
    classes = ('square',)

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append([image.shape[:2] for image in images])
        return [self.find(image) for image in images]

    def find(self, image):
        import cv2

        found = cv2.connectedComponentsWithStats(image[..., 0])[2][1:]
        boxes = [[x, y, x + w, y + h] for x, y, w, h, _ in found]
        # Whole squares have the best score.
        scores = [area / 100 for *_, area in found]
        return Prediction.sorted([0] * len(boxes), scores, boxes)


def test_boxes_are_in_pixels_of_the_whole_image():
    image = np.zeros((100, 170, 3), np.uint8)
    corners = [(3, 5), (57, 40), (90, 85), (155, 60)]
    for x, y in corners:
        image[y : y + 10, x : x + 10] = 255
    tiled = TiledPredictor(Squares(), 64, overlap=0.25, batch_size=2)
    (found,) = tiled([image])
    # Nothing is left of the squares that borders of tiles cut.
    boxes = [[x, y, x + 10, y + 10] for x, y in corners]
    assert sorted(found.boxes.tolist()) == boxes
    assert found.scores.tolist() == [1.0] * 4
    shapes = [shape for batch in tiled.predictor.shapes for shape in batch]
    assert set(shapes) == {(64, 64)} and len(shapes) == 8
    assert max(map(len, tiled.predictor.shapes)) == 2


def test_objects_larger_than_the_overlap_are_kept():
    """Whole in no tile: a part of each is better than nothing."""
    image = np.zeros((64, 120, 3), np.uint8)
    image[10:40, 40:80] = 255
    (found,) = TiledPredictor(Squares(), 64, overlap=0.25)([image])
    assert found.boxes.tolist() == [[48, 10, 80, 40], [40, 10, 64, 40]]


def test_images_smaller_than_a_tile_are_one():
    tiled = TiledPredictor(Squares(), 64)
    image = np.zeros((20, 30, 3), np.uint8)
    (found,) = tiled([image])
    assert len(found) == 0 and found.boxes.shape == (0, 4)
    assert tiled.predictor.shapes == [[(20, 30)]]


def test_the_best_box_of_each_object_and_class_stays():
    rows = [
        [0, 0, 10, 10, 0.5, 0],
        [0, 0, 10, 9, 0.9, 0],
        [0, 0, 10, 10, 0.4, 1],
        [20, 0, 30, 10, 0.3, 0],
        [0, 0, 9, 9, 0.001, 2],
    ]
    found = TiledPredictor(Squares(), 64).join(np.array(rows))
    assert found.scores.tolist() == [0.9, 0.4, 0.3]
    assert found.labels.tolist() == [0, 1, 0]
    assert found.boxes[0].tolist() == [0, 0, 10, 9]


def test_names_and_classes_are_those_of_the_predictor():
    tiled = TiledPredictor(Squares(), 64)
    assert tiled.classes == ('square',) and tiled.name(0) == 'square'


@pytest.mark.parametrize(('size', 'overlap'), [(0, 0.2), (64, 1), (64, -0.1)])
def test_sizes_that_are_none(size, overlap):
    with pytest.raises(InferenceError, match='overlap'):
        TiledPredictor(Squares(), size, overlap)


def test_classifiers_see_whole_images():
    predictor = Squares()
    predictor.detects = False
    with pytest.raises(InferenceError, match='for detectors'):
        TiledPredictor(predictor, 64)
