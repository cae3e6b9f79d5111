"""The command that an error about an annotation file ends with repairs it."""

import json
import math
import shlex
from pathlib import Path

import pytest
import repair_coco
from mmengine.config import Config
from PIL import Image

from lors_plugin.engine.data_check import check_data

FOLDER = Path(__file__).parents[2] / 'tools' / 'dataset_converters'
NAMES = ('cat', 'dog')


def repair(command):
    """Run the tool with the arguments of a list or a command line."""
    if isinstance(command, str):
        program, tool, *command = shlex.split(command)
        assert program == 'python'
        assert FOLDER.parents[1] / tool == FOLDER / 'repair_coco.py'
    return repair_coco.main([str(word) for word in command])


def content():
    return dict(
        images=[
            dict(id=i, file_name=f'{i}.png', width=64, height=48)
            for i in (1, 2)
        ],
        annotations=[
            dict(id=i, image_id=i, category_id=i, bbox=[4, 5, 20, 10])
            | dict(area=150, iscrowd=0)
            for i in (1, 2)
        ],
        categories=[dict(id=i, name=n) for i, n in enumerate(NAMES, 1)],
    )


def remove(*keys):
    def change(data):
        for item in data['annotations']:
            for key in keys:
                del item[key]

    return change


def as_texts(*keys):
    def change(data):
        for item in data['annotations']:
            for key in keys:
                value = item[key]
                item[key] = (
                    [str(v) for v in value]
                    if isinstance(value, list)
                    else str(value)
                )

    return change


def same_ids(data):
    for item in data['annotations']:
        item['id'] = 7


def group(data):
    data['categories'] = [
        dict(id=0, name='cat'),
        dict(id='1', name='cat'),
        dict(id=2, name='dog'),
    ]


def other_order(data):
    data['categories'].reverse()


CHANGES = {
    'mark': (lambda data: None, 'utf-8-sig'),
    'utf-16': (lambda data: None, 'utf-16'),
    'area': (remove('area'), 'utf-8'),
    'crowd and id': (remove('iscrowd', 'id'), 'utf-8'),
    'same ids': (same_ids, 'utf-8'),
    'texts': (as_texts('image_id', 'category_id', 'bbox', 'area'), 'utf-8'),
    'group': (group, 'utf-8'),
    'order': (other_order, 'utf-8'),
}


def config(path):
    dataset = dict(
        type='CocoDataset',
        ann_file=str(path),
        data_prefix=dict(img='img'),
        metainfo=dict(classes=NAMES),
        pipeline=[],
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(decoder=dict(num_classes=2)),
            train_dataloader=dict(dataset=dataset),
        )
    )


@pytest.mark.parametrize(('change', 'encoding'), CHANGES.values(), ids=CHANGES)
def test_the_command_of_the_message(tmp_path, change, encoding):
    data = content()
    change(data)
    path = tmp_path / "Eva's photos" / 'a.json'
    path.parent.mkdir()
    path.write_text(json.dumps(data), encoding)
    with pytest.raises(ValueError, match='This writes a repaired') as error:
        check_data(config(path), ['train'])
    command = str(error.value).splitlines()[-1]
    assert repair(command) == 0
    repaired = path.with_name('a_repaired.json')
    check_data(config(repaired), ['train'])
    data = json.loads(repaired.read_bytes())
    assert [c['name'] for c in data['categories']] == list(NAMES)
    names = {c['id']: c['name'] for c in data['categories']}
    boxes = [
        (a['image_id'], names[a['category_id']]) for a in data['annotations']
    ]
    assert boxes == [(1, 'cat'), (2, 'dog')]
    area = 200 if change is CHANGES['area'][0] else 150
    assert [a['area'] for a in data['annotations']] == [area, area]
    assert [a['bbox'] for a in data['annotations']] == [[4, 5, 20, 10]] * 2


def test_boxes_of_both_categories_of_a_name_stay(tmp_path):
    data = content()
    for category in data['categories']:
        category['name'] = 'cat'
    extra = dict(data['annotations'][1], id=3)
    data['annotations'].append(extra)
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(data))
    assert repair([path, path]) == 0  # in its place
    data = json.loads(path.read_text())
    assert [c['id'] for c in data['categories']] == [2]
    assert [a['category_id'] for a in data['annotations']] == [2, 2, 2]


def test_sizes_of_pictures(tmp_path):
    data = content()
    del data['images'][0]['width']
    data['images'][1]['height'] = '48'
    path, out = tmp_path / 'a.json', tmp_path / 'b.json'
    path.write_text(json.dumps(data))
    assert repair([path, out]) == 1
    for name in ('1.png', '2.png'):
        Image.new('RGB', (30, 20)).save(tmp_path / name)
    assert repair([path, out, '--images', tmp_path]) == 0
    sizes = [
        (i['width'], i['height'])
        for i in json.loads(out.read_text())['images']
    ]
    assert sizes == [(30, 20), (30, 20)]


MISSING = 'lack a field, or the entry of an id (first: annotation 2'
NUMBER = 'have a value that is no number (first: annotation 2'


@pytest.mark.parametrize(
    ('part', 'key', 'value', 'reason'),
    [
        ('annotations', 'image_id', 9, f"{MISSING}: '9')"),
        ('annotations', 'category_id', None, MISSING),
        ('annotations', 'bbox', ['a', 1, 2, 3], NUMBER),
        ('annotations', 'bbox', [1, 2, 3], NUMBER),
        ('annotations', 'bbox', [1, 2, math.nan, 3], '`bbox` is not four'),
        ('categories', 'id', [], 'categories without `id` (first: no. 2)'),
        ('images', 'file_name', 3, '`file_name` is not a text'),
    ],
)
def test_what_cannot_be_repaired(tmp_path, caplog, part, key, value, reason):
    data = content()
    data[part][1][key] = value
    path, out = tmp_path / 'a.json', tmp_path / 'b.json'
    path.write_text(json.dumps(data))
    assert repair([path, out]) == 1
    assert f'{path} cannot be repaired' in caplog.text
    assert reason in caplog.text
    assert not out.exists()


@pytest.mark.parametrize('text', ['', '[]', '{"images": []}', '{"images": 3}'])
def test_other_files_are_refused(tmp_path, caplog, text):
    path = tmp_path / 'a.json'
    path.write_text(text)
    assert repair([path, tmp_path / 'b.json']) == 1
    assert str(path) in caplog.text
    assert repair([tmp_path / 'none.json', path]) == 1
    assert 'none.json does not exist' in caplog.text
