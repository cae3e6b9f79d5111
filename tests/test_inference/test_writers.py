"""Files of predictions, as other programs read them."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from lors_plugin.inference import Frame, InferenceError, Prediction, Source
from lors_plugin.inference.writers import Results, as_rgb

CLASSES = ('cat', '牛')
FOUND = Prediction(
    np.array([1, 0]),
    np.array([0.9, 0.5]),
    np.array([[10, 20, 30, 60], [0, 0, 5, 4.5]]),
)
NOTHING = Prediction.sorted([], [], np.zeros((0, 4)))


def draw(image, found):
    return np.full_like(image, (200, 0, 0))


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write predictions for sources; ``found`` for each of two frames."""
    monkeypatch.chdir(tmp_path)

    def make(sources, formats, found=(FOUND, NOTHING), detects=True, **kwargs):
        results = Results('out', sources, CLASSES, detects, formats, **kwargs)
        for source in sources:
            count = 1 if source.kind == 'image' else 2
            for index in range(count):
                image = np.zeros((80, 100, 3), np.uint8)
                some = found[index]
                results.add(Frame(source, index, image, fps=7.0), some)
        return results.close()

    return make


def written():
    root = Path('out')
    found = (p.relative_to(root) for p in root.rglob('*') if p.is_file())
    return sorted(path.as_posix() for path in found)


def test_coco_file_with_ids_of_the_one_given(write):
    from pycocotools.coco import COCO

    sources = [
        Source(Path('a.jpg'), 'image', 7),
        Source(Path('b'), 'image', 3),
    ]
    categories = [dict(id=5, name='牛', supercategory='x')]
    assert write(sources, ['coco'], categories=categories) == [
        Path('out/predictions.json')
    ]
    content = json.loads(Path('out/predictions.json').read_text('utf-8'))
    assert [c['id'] for c in content['categories']] == [5, 6]
    assert content['categories'][1]['name'] == 'cat'
    first = content['annotations'][0]
    assert first['bbox'] == [10, 20, 20, 40] and first['image_id'] == 7
    assert (first['category_id'], first['score']) == (5, 0.9)
    assert content['images'][0] == dict(
        id=7, file_name='a.jpg', width=100, height=80
    )
    coco = COCO('out/predictions.json')
    assert len(coco.loadRes(content['annotations']).anns) == 4


def test_frames_of_videos_are_numbered(write):
    write([Source(Path('v.mp4'), 'video')], ['coco', 'yolo', 'csv'])
    content = json.loads(Path('out/predictions.json').read_text('utf-8'))
    assert [i['frame'] for i in content['images']] == [0, 1]
    assert [a['image_id'] for a in content['annotations']] == [1, 1]
    assert written() == [
        'classes.txt',
        'labels/v/000000.txt',
        'labels/v/000001.txt',
        'predictions.csv',
        'predictions.json',
    ]
    with open('out/predictions.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == ['牛', 'cat']
    assert rows[0]['frame'] == '0' and float(rows[0]['y2']) == 60


def test_yolo_labels(write):
    write([Source(Path('a.jpg'))], ['yolo'])
    lines = Path('out/labels/a.txt').read_text().splitlines()
    assert lines[0] == '1 0.200000 0.500000 0.200000 0.500000 0.900000'
    assert Path('out/classes.txt').read_text('utf-8') == 'cat\n牛\n'


def test_labelme_files_find_their_image(write, tmp_path):
    write([Source(Path('in/a.jpg')), Source(Path('b.jpg'))], ['labelme'])
    content = json.loads(Path('out/labelme/a.json').read_text('utf-8'))
    path = Path('out/labelme', content['imagePath']).resolve()
    assert path == tmp_path / 'in' / 'a.jpg'
    assert content['shapes'][0]['points'] == [[10, 20], [30, 60]]
    assert content['shapes'][0]['label'] == '牛'
    assert (content['imageHeight'], content['imageWidth']) == (80, 100)


def test_classes_of_a_classifier(write):
    found = [Prediction(np.array([1, 0]), np.array([0.8, 0.2]))]
    source = [Source(Path('a.jpg'))]
    write(source, ['csv', 'labelme'], found, detects=False)
    text = Path('out/predictions.csv').read_text('utf-8')
    assert text.splitlines() == [
        'image,frame,label,class,score',
        'a.jpg,,1,牛,0.80000',
        'a.jpg,,0,cat,0.20000',
    ]
    content = json.loads(Path('out/labelme/a.json').read_text('utf-8'))
    assert content['flags'] == {'牛': True, 'cat': True}
    with pytest.raises(InferenceError, match='a classifier has none'):
        write(source, ['coco'], found, detects=False)


def test_pictures_and_videos(write):
    sources = [
        Source(Path('x/a.jpg')),
        Source(Path('y/a.png')),
        Source(Path('y/v.avi'), 'video'),
        Source(Path('webcam0'), 'webcam'),
    ]
    write(sources, [], draw=draw)
    assert written() == [
        'pictures/v.mp4',
        'pictures/webcam0.mp4',
        'pictures/x/a.jpg',
        'pictures/y/a.jpg',
    ]
    picture = cv2.imread('out/pictures/x/a.jpg')
    assert picture.shape == (80, 100, 3)
    np.testing.assert_allclose(picture[40, 50], [0, 0, 200], atol=6)
    video = cv2.VideoCapture('out/pictures/v.mp4')
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(7)
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 2
    assert video.read()[1].shape == (80, 100, 3)


def test_nothing_unfinished_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = Source(Path('v.mp4'), 'video')
    results = Results('out', [source], CLASSES, True, ['csv', 'coco'], draw)
    image = np.zeros((80, 100, 3), np.uint8)
    results.add(Frame(source, 0, image), FOUND)
    results.discard()
    assert written() == []


def test_inputs_are_never_overwritten(write):
    path = Path('out/pictures/a.jpg')
    with pytest.raises(InferenceError, match='would overwrite an input'):
        write([Source(path)], [], draw=draw)
    with pytest.raises(InferenceError, match='is a video'):
        write([Source(Path('v.mp4'), 'video')], ['labelme'])


@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)])
def test_images_of_any_channels_become_rgb(shape):
    image = np.zeros(shape, np.uint8)
    image[..., :1] = 9
    image = np.full(shape, 9, np.uint8) if len(shape) == 2 else image
    found = as_rgb(image)
    blue = [9, 9, 9] if len(shape) == 2 or shape[2] == 1 else [0, 0, 9]
    assert found.shape == (2, 3, 3) and found[0, 0].tolist() == blue
