"""What is told of an annotation file is what MMDetection's loader does."""

import copy
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from mmdet.datasets import CocoDataset

from lors_plugin.engine.coco_file import (
    category_names,
    check_for_host_metric,
    inspect,
    read_json,
)

NAMES = ('cat', 'dog')


def content(**changes):
    """Two images with two boxes each and one without."""
    images = [
        dict(id=i, file_name=f'{i}.png', width=64, height=48)
        for i in (1, 2, 3)
    ]
    annotations = [
        dict(
            id=i,
            image_id=1 + i // 3,
            category_id=1 + i % 2,
            bbox=[4 * i, 5, 20, 10],
            area=200,
            iscrowd=0,
        )
        for i in (1, 2, 3, 4)
    ]
    categories = [dict(id=i, name=n) for i, n in enumerate(NAMES, 1)]
    return dict(
        images=images, annotations=annotations, categories=categories
    ) | copy.deepcopy(changes)


def changed(part, index, **values):
    """The content with other values in some entries; None removes one."""
    data = content()
    entries = data[part] if index == 'all' else [data[part][index]]
    for entry in entries:
        for key, value in values.items():
            if callable(value):
                value = value(entry[key])
            entry[key] = value
            if value is None:
                del entry[key]
    return data


FAULTS = {
    'a list': ([1, 2], 1, 'not an object', 'list'),
    'no images': (content(images=[]), 1, 'empty list `images`', ''),
    'images missing': (
        {'categories': content()['categories']},
        1,
        'missing list `images`',
        '',
    ),
    'no categories': (
        content(categories=[]),
        1,
        'empty list `categories`',
        '',
    ),
    'annotations': (content(annotations={}), 1, 'missing list `annot', 'dict'),
    'texts': (content(annotations=['a']), 1, 'are no objects', 'no. 1'),
    'same image id': (
        changed('images', 1, id=1),
        1,
        'images with an id that another has',
        'id 1 twice, of 1.png and 2.png',
    ),
    'same annotation id': (
        changed('annotations', 'all', id=7),
        3,
        'annotations with an id that another has',
        'id 7 twice',
    ),
    'same category id': (
        changed('categories', 1, id=1),
        1,
        'categories with an id',
        'of cat and dog',
    ),
    'name': (changed('categories', 0, name=3), 1, '`name`', 'no. 1'),
    'file': (changed('images', 1, file_name=None), 1, '`file_name`', 'no. 2'),
    'width': (changed('images', 0, width=None), 1, 'without `width`', '1.png'),
    'text width': (changed('images', 0, width='64'), 1, '`width` is', "'64'"),
    'zero height': (changed('images', 'all', height=0), 3, '`height` is', '0'),
    'annotation id': (
        changed('annotations', 'all', id=None),
        4,
        'annotations without `id`',
        'no. 1',
    ),
    'image_id': (
        changed('annotations', 2, image_id=None),
        1,
        'without `image_id`',
        'annotation 3',
    ),
    'image_id list': (
        changed('annotations', 2, image_id=[1]),
        1,
        '`image_id` is not',
        r'annotation 3: \[1\]',
    ),
    'category_id': (
        changed('annotations', 0, category_id=None),
        1,
        'without `category_id`',
        'annotation 1',
    ),
    'no bbox': (
        changed('annotations', 0, bbox=None),
        1,
        'without `bbox`',
        'annotation 1',
    ),
    'empty bbox': (
        changed('annotations', 0, bbox=[]),
        1,
        'not four finite numbers',
        r'annotation 1: \[\]',
    ),
    'five numbers': (
        changed('annotations', 0, bbox=[1, 2, 3, 4, 5]),
        1,
        'not four finite numbers',
        'annotation 1',
    ),
    'texts in bbox': (
        changed('annotations', 'all', bbox=lambda b: [str(v) for v in b]),
        4,
        'not four finite numbers',
        r"annotation 1: \['4', '5'",
    ),
    'NaN': (
        changed('annotations', 1, bbox=[math.nan, 1, 9, 9]),
        1,
        'not four finite numbers',
        'annotation 2',
    ),
    'infinity': (
        changed('annotations', 1, bbox=[1, 1, math.inf, 9]),
        1,
        'not four finite numbers',
        'annotation 2',
    ),
    'a huge number': (
        changed('annotations', 1, bbox=[1, 1, 10**400, 9]),
        1,
        'not four finite numbers',
        'annotation 2',
    ),
    'no area': (
        changed('annotations', 'all', area=None),
        4,
        'without `area`',
        'annotation 1',
    ),
    'text area': (
        changed('annotations', 1, area='200'),
        1,
        '`area` is not',
        "annotation 2: '200'",
    ),
    # The loader takes the text '0' for true.
    'text crowd': (
        changed('annotations', 'all', iscrowd='0'),
        4,
        '`iscrowd` is not 0 or 1',
        "annotation 1: '0'",
    ),
    'shares': (
        changed('annotations', 'all', bbox=lambda b: [v / 64 for v in b]),
        4,
        'shares of the image',
        r'\[0.06',
    ),
}


@pytest.mark.parametrize(
    ('data', 'count', 'reason', 'example'), FAULTS.values(), ids=FAULTS
)
def test_what_the_loader_cannot_read(data, count, reason, example):
    report = inspect(json.loads(json.dumps(data)), NAMES)
    (line,) = report.faults.lines()
    assert line.startswith(f'{count} ')
    before, _, after = line.partition('(first: ')
    assert reason in before
    assert re.search(example, after)


LEFT_OUT = {
    'area 0': (changed('annotations', 0, area=0), 'dropped', '`area` of 0'),
    'thin': (
        changed('annotations', 0, bbox=[1, 1, 0.5, 9]),
        'dropped',
        'less than one pixel',
    ),
    'negative': (
        changed('annotations', 0, bbox=[9, 9, -5, -5]),
        'dropped',
        'less than one pixel',
    ),
    'outside': (
        changed('annotations', 0, bbox=[70, 1, 9, 9]),
        'dropped',
        'outside of their image',
    ),
    'unknown image': (
        changed('annotations', 0, image_id=9),
        'dropped',
        'whose image_id no image of the file has (first: annotation 1: 9)',
    ),
    'text image': (
        changed('annotations', 0, image_id='1'),
        'dropped',
        'image_id is a text, while the image ids are numbers',
    ),
    'unknown category': (
        changed('annotations', 0, category_id=0),
        'dropped',
        'whose category_id no category of the file has',
    ),
    'text category': (
        changed('annotations', 0, category_id='1'),
        'dropped',
        'category_id is a text, while the category ids are numbers',
    ),
    'ignored': (
        changed('annotations', 0, ignore=1, bbox=None, area=None),
        'chosen',
        'marked `ignore`',
    ),
    'crowd': (changed('annotations', 0, iscrowd=1), 'chosen', '`iscrowd`'),
}


@pytest.mark.parametrize(
    ('data', 'where', 'reason'), LEFT_OUT.values(), ids=LEFT_OUT
)
def test_what_is_left_out(data, where, reason):
    report = inspect(data, NAMES)
    (line,) = getattr(report, where).lines()
    assert line.startswith('1 ')
    assert reason in line
    assert not report.faults
    assert (report.boxes, sum(report.kept.values())) == (4, 3)
    assert f'3 of 4 boxes kept (cat 2, dog 1); left out: {line}' in (
        report.line(NAMES)
    )


def test_a_good_file():
    report = inspect(content(), NAMES)
    assert not (report.faults or report.dropped or report.chosen or report.odd)
    assert report.line(NAMES) == (
        '3 images (1 background), 4 of 4 boxes kept (cat 2, dog 2)'
    )
    report = inspect(content(), ('dog',))
    assert report.line(('dog',)) == (
        '3 images (1 background), 2 of 4 boxes kept; left out: 2 of other '
        'classes (first: annotation 2)'
    )


@pytest.mark.parametrize(
    ('data', 'line'),
    [
        (
            changed('images', 1, file_name='1.png'),
            '1 images of a file that another names (first: 1.png)',
        ),
        (
            changed('annotations', 'all', bbox=[40, 30, 60, 44]),
            '4 boxes that reach beyond their image (COCO has x, y, width, '
            'height, not corners) (first: annotation 1)',
        ),
    ],
    ids=['same picture', 'corners'],
)
def test_what_is_odd(data, line):
    report = inspect(data, NAMES)
    assert report.odd.lines() == [line]
    assert sum(report.kept.values()) == 4
    assert line in report.line(NAMES)


def messy(seed):
    """A file of everything that the loader takes, used or not."""
    rng = np.random.default_rng(seed)

    def draw(*values):
        return values[rng.integers(len(values))]

    data = content()
    data['images'] += [
        dict(id=i, file_name=f'{i}.png', width=draw(20, 64), height=48)
        for i in range(4, 12)
    ]
    data['categories'] += [dict(id='x', name='cow'), dict(id=7, name='ant')]
    data['annotations'] = [
        dict(
            id=i,
            image_id=draw(*range(12), '3'),
            category_id=draw(1, 2, 2, 'x', 7, '2', 99),
            bbox=[
                float(rng.uniform(-30, 70)),
                float(rng.uniform(-20, 50)),
                draw(0, 0.9, 1, 20.5, 80),
                draw(-1, 0.9, 1, 30),
            ],
            area=draw(-1, 0, 0.5, 100, 100),
            **draw({}, {}, dict(iscrowd=1), dict(iscrowd=0), dict(ignore=1)),
        )
        for i in range(1000)
    ]
    return data


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize(
    'filter_cfg', [None, dict(filter_empty_gt=True, min_size=32)]
)
@pytest.mark.parametrize('classes', [('cat', 'dog'), ('dog', 'ant'), ('ant',)])
def test_counts_are_those_of_the_loader(tmp_path, seed, filter_cfg, classes):
    data = messy(seed)
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(data))
    report = inspect(read_json(path), classes, filter_cfg)
    dataset = CocoDataset(
        ann_file=str(path),
        data_prefix=dict(img='img'),
        metainfo=dict(classes=classes),
        filter_cfg=filter_cfg,
        pipeline=[],
    )
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    kept = [
        [i['bbox_label'] for i in info['instances'] if not i['ignore_flag']]
        for info in infos
    ]
    assert report.images == len(infos) > 0
    assert report.filtered == len(data['images']) - len(infos)
    assert report.background == sum(not labels for labels in kept)
    assert report.kept == Counter(classes[n] for k in kept for n in k)
    others = (*report.dropped.values(), *report.chosen.values())
    assert sum(n for n, _ in others) + sum(report.kept.values()) == 1000
    assert sum(report.kept.values()) > 0


@pytest.mark.parametrize(
    ('data', 'cause'),
    [
        (b'', 'json'),
        (b'{"images": [1, 2', r'\(16 bytes\) is not whole, valid json'),
        (b'\xef\xbb\xbf{}', 'byte order mark'),
        ('{}'.encode('utf-16'), 'byte order mark'),
        ('{"a": "\u9f8d"}'.encode('gbk'), 'is not UTF-8'),
        (b'[' * 100_000, 'nested too deeply'),
    ],
    ids=['empty', 'cut', 'mark', 'utf-16', 'gbk', 'deep'],
)
def test_files_that_cannot_be_read(tmp_path, data, cause):
    path = tmp_path / 'a.json'
    path.write_bytes(data)
    with pytest.raises(ValueError, match=cause) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match='cannot be read: Is a directory'):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ('data', 'names'),
    [
        (content(), list(NAMES)),
        ([1, 2], None),
        ({'categories': {}}, None),
        ({'categories': [dict(id=1)]}, None),
        ({}, None),
    ],
)
def test_category_names(data, names):
    assert category_names(data) == names


def test_what_only_the_metric_of_the_host_cannot_read():
    assert not check_for_host_metric(content())
    lines = check_for_host_metric(
        changed('annotations', 'all', iscrowd=None, id=str)
    ).lines()
    assert lines == [
        '4 annotations without `iscrowd` (first: annotation 1)',
        '4 annotations whose `id` is a text (first: annotation 1)',
    ]
