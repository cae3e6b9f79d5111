"""Inputs of a command line, and frames read from them."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from lors_plugin.inference import InferenceError, find_sources, read_frames


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of all kinds in folders, one with a space and a Chinese name."""
    monkeypatch.chdir(tmp_path)
    pixels = np.full((20, 30, 3), 90, np.uint8)
    for name in ('a.jpg', 'b.PNG', 'in ner/树.png', '.hidden/c.png'):
        path = Path('photos', name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
    Path('photos/notes.txt').write_text('no image')
    return tmp_path


def write_video(path, number=5, size=(32, 24), fps=10):
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, size
    )
    assert writer.isOpened()
    for index in range(number):
        writer.write(
            np.full((size[1], size[0], 3), 40 * index % 256, np.uint8)
        )
    writer.release()
    return Path(path)


def names(sources):
    return [source.path.as_posix() for source in sources]


def test_folders_patterns_and_files(folder):
    write_video('photos/v.mp4')
    everything = [
        'photos/a.jpg', 'photos/b.PNG', 'photos/in ner/树.png', 'photos/v.mp4',
    ]  # fmt: skip
    assert names(find_sources(['photos'])) == everything
    assert names(find_sources(['photos/*.[jp]*', 'photos/a.jpg'])) == [
        'photos/a.jpg'
    ]
    assert names(find_sources(['photos/**/*.png'])) == ['photos/in ner/树.png']
    (source,) = find_sources(['photos/v.mp4'])
    assert (source.kind, source.count()) == ('video', 5)
    (source,) = find_sources(['0'])
    assert (source.kind, source.count()) == ('webcam', None)
    # A file of any name that is given by name is taken for an image.
    assert names(find_sources(['photos/notes.txt'])) == ['photos/notes.txt']


def test_results_of_an_earlier_run_are_no_inputs(folder):
    found = find_sources(['photos'], leave_out='photos/in ner')
    assert names(found) == ['photos/a.jpg', 'photos/b.PNG']
    found = find_sources(['photos/**/*.png'], leave_out=folder / 'out')
    assert len(found) == 1


def test_links_that_lead_nowhere_are_named(folder):
    Path('photos/c.png').symlink_to('/nowhere/c.png')
    Path('photos/d.txt').symlink_to('/nowhere/d.txt')
    assert 'photos/c.png' in names(find_sources(['photos']))
    assert 'photos/d.txt' not in names(find_sources(['photos']))


def test_coco_files_name_images_and_their_ids(folder):
    images = [dict(id=7, file_name='a.jpg'), dict(id=3, file_name='no.jpg')]
    content = dict(images=images, annotations=[], categories=[])
    Path('ann.json').write_text(json.dumps(content))
    with pytest.raises(InferenceError, match='--image-dir'):
        find_sources(['ann.json'])
    found = find_sources(['ann.json'], image_dir='photos')
    assert names(found) == ['photos/a.jpg', 'photos/no.jpg']
    assert [source.image_id for source in found] == [7, 3]


@pytest.mark.parametrize(
    ('name', 'content', 'expected'),
    [
        ('no.jpg', None, 'no such file'),
        ('*.gif', None, 'no images'),
        ('bad.json', '[1]', 'is no COCO file'),
        ('bad.json', '{"images": [{"id": 1}]}', 'file_name'),
        ('bad.json', '{', 'is no COCO file'),
        ('bad.json', '[' * 100_000, 'is no COCO file.*RecursionError'),
    ],
)
def test_inputs_that_name_nothing(folder, name, content, expected):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(InferenceError, match=expected):
        find_sources([name])


def test_frames_of_a_video(folder):
    write_video('v.mp4')
    frames = list(read_frames(find_sources(['v.mp4']), None))
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    means = [frame.image.mean() for frame in frames]
    np.testing.assert_allclose(means, [0, 40, 80, 120, 160], atol=6)
    assert frames[0].fps == 10 and frames[0].image.shape == (24, 32, 3)
    frames = list(read_frames(find_sources(['v.mp4']), None, max_frames=2))
    assert [frame.error for frame in frames] == ['', '']


def test_broken_files_do_not_stop_the_rest(folder):
    def read(path):
        if path.suffix != '.jpg':
            raise InferenceError(f'{path} is bad')
        return np.zeros((2, 2, 3))

    whole = write_video('v.mp4', 60, (128, 96)).read_bytes()
    Path('photos/damaged.avi').write_bytes(whole[:100])
    frames = list(read_frames(find_sources(['photos', '8']), read))
    good = [frame.source.path.name for frame in frames if not frame.error]
    assert good == ['a.jpg']
    errors = '\n'.join(frame.error for frame in frames)
    for name in ('b.PNG is bad', '树.png is bad', 'damaged.avi', 'webcam 8 '):
        assert name in errors
