"""Classes and annotation files of a config are checked before a run."""

import copy
import json
import logging
import os
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from lors_plugin.engine import data_check
from lors_plugin.engine.coco_file import how_to_repair
from lors_plugin.engine.data_check import check_data

NAMES = ('cat', 'dog', 'bird')
PHASES = ('train', 'val')
META_KEYS = ('img_id', 'ori_shape', 'instances')


def content(names=NAMES, first=1):
    """Three images with a box of each class."""
    ids = range(first, first + 3)
    return dict(
        images=[
            dict(id=i, file_name=f'{i}.png', width=64, height=48) for i in ids
        ],
        annotations=[
            dict(
                id=i,
                image_id=i,
                category_id=10 + i - first,
                bbox=[4, 5, 20, 10],
                area=200,
                iscrowd=0,
            )
            for i in ids
        ],
        categories=[dict(id=10 + i, name=n) for i, n in enumerate(names)],
    )


def write(path, data):
    path.write_text(json.dumps(data))
    folder = path.parent / 'img'
    folder.mkdir(exist_ok=True)
    for image in data['images']:
        Image.new('RGB', (64, 48)).save(folder / image['file_name'])


@pytest.fixture
def root(tmp_path):
    """A folder with two files, of other images and ids each."""
    write(tmp_path / 'a.json', content())
    write(tmp_path / 'b.json', content(first=5))
    return tmp_path


@pytest.fixture
def cfg(root):
    """A detection config whose data is there and whose classes agree."""
    dataset = dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='a.json',
        data_prefix=dict(img='img/'),
        metainfo=dict(classes=NAMES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='PackDetInputs', meta_keys=META_KEYS),
        ],
    )
    val = dict(dataset, ann_file='b.json', test_mode=True)
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(decoder=dict(num_classes=3)),
            train_dataloader=dict(dataset=dataset),
            val_dataloader=dict(dataset=val),
            val_evaluator=dict(
                type='lors_plugin.CocoMetric', ann_file=str(root / 'b.json')
            ),
        )
    )


@pytest.fixture
def lines(monkeypatch):
    """The lines that are logged, with their levels."""
    found = []
    monkeypatch.setattr(
        data_check,
        'print_log',
        lambda text, logger, level: found.append((level, text)),
    )
    return found


def refused(cfg, phases=PHASES):
    with pytest.raises(ValueError) as error:
        check_data(cfg, phases)
    return str(error.value)


def test_a_line_per_file(cfg, root, lines):
    check_data(cfg, PHASES)
    text = '3 images, 3 of 3 boxes kept (cat 1, dog 1, bird 1)'
    assert lines == [
        (
            logging.INFO,
            f'{root}/a.json (train_dataloader.dataset): {text}',
        ),
        (logging.INFO, f'{root}/b.json (val_dataloader.dataset): {text}'),
    ]


def test_one_line_for_a_file_that_is_used_twice(cfg, root, lines):
    cfg.val_dataloader.dataset.ann_file = 'a.json'
    cfg.val_evaluator.ann_file = str(root / 'a.json')
    check_data(cfg, PHASES)
    ((_, line),) = lines
    assert '(train_dataloader.dataset, val_dataloader.dataset)' in line


def test_boxes_that_are_lost_are_a_warning(cfg, root, lines):
    data = content()
    data['annotations'][1]['area'] = 0
    write(root / 'a.json', data)
    check_data(cfg, ['train'])
    assert lines == [
        (
            logging.WARNING,
            f'{root}/a.json (train_dataloader.dataset): 3 images (1 '
            'background), 2 of 3 boxes kept (cat 1, dog 0, bird 1); left '
            'out: 1 with an `area` of 0 or less (first: annotation 2)',
        )
    ]


def test_only_the_first_rank_reads(cfg, root, lines, monkeypatch):
    """A job ends with its first rank, and files may be large."""
    (root / 'a.json').write_text('{')
    monkeypatch.setenv('RANK', '1')
    check_data(cfg, PHASES)
    assert not lines
    monkeypatch.setenv('RANK', '0')
    assert 'not whole, valid json' in refused(cfg)


def test_a_file_is_read_once(cfg, root, monkeypatch):
    """However many read it, and by whatever path."""
    monkeypatch.chdir(root)
    cfg.val_dataloader.dataset.ann_file = 'a.json'
    cfg.val_dataloader.dataset.data_root = ''
    cfg.val_dataloader.dataset.data_prefix = dict(img='img/')
    cfg.val_evaluator.ann_file = str(root / 'img' / '..' / 'a.json')
    read, paths = data_check.read_json, []
    monkeypatch.setattr(
        data_check, 'read_json', lambda p: paths.append(p) or read(p)
    )
    check_data(cfg, PHASES)
    assert len(paths) == 1


# Files


@pytest.mark.parametrize('place', ['plain', 'repeated', 'joined', 'balanced'])
def test_faults_in_a_file_name_file_and_cause(cfg, root, place):
    data = content()
    for annotation in data['annotations']:
        del annotation['area']
    del data['images'][2]['width']
    write(root / 'a.json', data)
    plain = cfg.train_dataloader.dataset
    field, cfg.train_dataloader.dataset = {
        'plain': ('', plain),
        'repeated': (
            '.dataset',
            dict(type='RepeatDataset', dataset=plain, times=2),
        ),
        'joined': (
            '.datasets.1',
            dict(
                type='ConcatDataset',
                datasets=[dict(plain, ann_file='b.json'), plain],
            ),
        ),
        'balanced': (
            '.dataset',
            dict(type='ClassBalancedDataset', dataset=plain),
        ),
    }[place]
    assert refused(cfg) == (
        f'{root}/a.json cannot be used as it is '
        f'(train_dataloader.dataset{field}):\n'
        '  1 images without `width` (first: 3.png)\n'
        '  3 annotations without `area` (first: annotation 1)\n'
        f'{how_to_repair(root / "a.json")}'
    )


def test_all_files_with_faults_are_told(cfg, root):
    for name in ('a.json', 'b.json'):
        data = content()
        data['annotations'][0]['bbox'] = []
        write(root / name, data)
    text = refused(cfg)
    assert f'{root}/a.json cannot' in text
    assert f'{root}/b.json cannot' in text


def test_a_file_that_cannot_be_read(cfg, root):
    path = root / 'b.json'
    path.write_text(path.read_text()[:100])
    assert 'b.json (100 bytes) is not whole, valid json' in refused(cfg)


PICTURES = {
    'pictures are not there': Path.unlink,
    'pictures are empty files (0 bytes)': lambda path: path.write_bytes(b''),
    'pictures are no files': lambda path: path.unlink() or path.mkdir(),
    'pictures cannot be read (Too many levels of symbolic links)': (
        lambda path: path.unlink() or path.symlink_to(path)
    ),
}


@pytest.mark.parametrize('phase', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    ('fault', 'harm'), PICTURES.items(), ids=lambda value: str(value)[:24]
)
def test_pictures_that_cannot_be_read(cfg, root, fault, harm, phase):
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator = cfg.val_evaluator
    name, number = ('a', 2) if phase == 'train' else ('b', 6)
    harm(root / f'img/{number}.png')
    assert refused(cfg, [phase]) == (
        f'{root}/{name}.json cannot be used as it is '
        f'({phase}_dataloader.dataset):\n'
        f'  1 {fault} (first: {root}/img/{number}.png)\n'
        'Put the pictures there, or take them out of the json'
    )
    cfg[f'{phase}_dataloader'].dataset.pipeline[0].ignore_empty = True
    check_data(cfg, [phase])


def test_pictures_without_permission(cfg, root, monkeypatch):
    path = root / 'img/2.png'
    path.chmod(0)
    if os.access(path, os.R_OK):  # the superuser may read all files
        monkeypatch.setattr(os, 'access', lambda p, mode: p != str(path))
    assert (
        f'1 pictures cannot be read (Permission denied) (first: {path})'
        in (refused(cfg))
    )


def test_a_data_set_without_folder_of_pictures(cfg):
    cfg.train_dataloader.dataset.data_prefix = dict(img_path='img')
    assert 'train_dataloader.dataset.data_prefix needs `img`' in refused(cfg)


def test_no_boxes_to_train_on(cfg, root):
    write(root / 'a.json', dict(content(), annotations=[]))
    assert refused(cfg).startswith(
        f'{root}/a.json: no boxes to train on, of 0 in the file: 3 images (3 '
        'background)'
    )
    # Background alone is fine beside others, and where nothing is trained.
    plain = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[plain, dict(plain, ann_file='b.json')]
    )
    check_data(cfg, PHASES)
    cfg.val_dataloader.dataset.ann_file = 'a.json'
    cfg.val_evaluator.ann_file = str(root / 'a.json')
    check_data(cfg, ['val'])


@pytest.mark.parametrize(
    ('key', 'value', 'reason'),
    [
        ('area', 0, 'with an `area` of 0 or less'),
        ('image_id', '1', 'whose image_id is a text'),
        ('category_id', '10', 'whose category_id is a text'),
        ('category_id', 1, 'whose category_id no category of the file has'),
    ],
)
@pytest.mark.parametrize('phase', PHASES)
def test_none_of_the_boxes_can_be_used(cfg, root, phase, key, value, reason):
    data = content(first=1 if phase == 'train' else 5)
    for annotation in data['annotations']:
        annotation[key] = value
    write(root / ('a.json' if phase == 'train' else 'b.json'), data)
    assert f'none of 3 boxes can be used: 3 {reason}' in refused(cfg)


def test_no_boxes_to_evaluate_on_are_a_warning(cfg, root, lines):
    write(root / 'b.json', dict(content(first=5), annotations=[]))
    check_data(cfg, PHASES)
    assert [level for level, _ in lines] == [logging.INFO, logging.WARNING]
    assert '0 of 0 boxes kept' in lines[1][1]


def test_files_of_another_machine_may_have_the_boxes(cfg, root):
    write(root / 'a.json', dict(content(), annotations=[]))
    plain = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset',
        datasets=[plain, dict(plain, data_root='s3://bucket')],
    )
    check_data(cfg, ['train'])


def test_a_filter_that_leaves_nothing(cfg):
    cfg.train_dataloader.dataset.filter_cfg = dict(min_size=50)
    assert 'filter_cfg leaves no image of 3' in refused(cfg)


# Classes


def test_order_of_the_classes(cfg, root):
    for phase in PHASES:
        loader = cfg[f'{phase}_dataloader']
        loader.dataset.metainfo = dict(classes=('dog', 'cat', 'bird'))
    text = refused(cfg)
    assert (
        'train_dataloader.dataset: the classes are in another order than the '
        f'categories of {root}/a.json.'
    ) in text
    assert (
        '  metainfo.classes: dog, cat, bird\n'
        '  the categories: cat, dog, bird\n'
        "Set classes=('cat', 'dog', 'bird')"
    ) in text


@pytest.mark.parametrize('where', ['val', 'evaluator', 'joined'])
def test_files_of_another_order(cfg, root, where):
    write(root / 'c.json', content(('dog', 'cat', 'bird'), 5))
    if where == 'val':
        cfg.val_dataloader.dataset.ann_file = 'c.json'
    elif where == 'evaluator':
        cfg.val_evaluator.ann_file = str(root / 'c.json')
    else:
        plain = cfg.train_dataloader.dataset
        cfg.train_dataloader.dataset = dict(
            type='ConcatDataset',
            datasets=[plain, dict(plain, ann_file='c.json')],
        )
    text = refused(cfg)
    assert f'another order than the categories of {root}/c.json' in text


def test_a_subset_of_the_categories_keeps_the_order(cfg):
    cfg.model.decoder.num_classes = 2
    for phase in PHASES:
        cfg[f'{phase}_dataloader'].dataset.metainfo.classes = ('cat', 'bird')
    check_data(cfg, PHASES)


def test_data_sets_of_different_classes(cfg, root):
    write(root / 'b.json', content(('dog', 'cat', 'bird'), 5))
    cfg.val_dataloader.dataset.metainfo.classes = ('dog', 'cat', 'bird')
    assert (
        'val_dataloader.dataset has the classes dog, cat, bird by '
        'metainfo.classes, but train_dataloader.dataset has cat, dog, bird'
    ) in refused(cfg)
    assert (
        'train_dataloader.dataset has the classes cat, dog, bird by '
        'metainfo.classes, but val_dataloader.dataset has dog, cat, bird'
    ) in refused(cfg, ['val'])


def test_inherited_data_sets_of_another_model_do_not_matter(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    check_data(cfg, ['val'])
    cfg.train_dataloader.dataset.metainfo = dict(classes='nowhere.txt')
    check_data(cfg, ['val'])


def test_a_category_that_is_there_twice(cfg, root):
    """As in exports whose group is named like the only class."""
    data = content()
    data['categories'] = [dict(id=0, name='cat'), dict(id=1, name='cat')]
    for annotation in data['annotations']:
        annotation['category_id'] = 1
    write(root / 'a.json', data)
    cfg.model.decoder.num_classes = 1
    cfg.train_dataloader.dataset.metainfo.classes = ('cat',)
    text = refused(cfg, ['train'])
    assert "a.json has the category 'cat' twice (ids 0, 1)" in text
    # Of a group that is not a class there may be any number.
    data['categories'] = [
        dict(id=0, name='things'),
        dict(id=2, name='things'),
        dict(id=1, name='cat'),
    ]
    write(root / 'a.json', data)
    check_data(cfg, ['train'])


def test_a_class_that_is_there_twice(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'dog', 'cat')
    text = refused(cfg)
    assert text == (
        'train_dataloader.dataset: metainfo.classes has a name twice: cat'
    )


def test_wrong_number_of_classes_names_both_sides(cfg):
    cfg.model.decoder.num_classes = 80
    text = refused(cfg)
    assert 'model.decoder.num_classes=80' in text
    assert 'train_dataloader.dataset has 3 classes' in text
    assert 'cat, dog, bird' in text
    assert '--cfg-options model.decoder.num_classes=3' in text
    assert '--no-checks' in text


def test_without_known_classes_the_annotation_file_counts(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    cfg.train_dataloader.dataset.type = 'nohost.Dataset'
    cfg.model.decoder.num_classes = 4
    assert '3 classes by the categories of' in refused(cfg, ['train'])


def test_class_names_absent_in_the_annotation_file(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'dog', 'brid')
    text = refused(cfg)
    assert '1 of 3 classes by metainfo.classes' in text
    assert 'brid' in text
    assert '3 categories: cat, dog, bird' in text


def test_forgotten_metainfo_of_a_coco_dataset(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    text = refused(cfg)
    assert '77 of 80 classes' in text
    assert 'metainfo=dict(classes=' in text


@pytest.mark.parametrize('text', ['cat\ndog\nbird', 'cat\r\ndog\r\nbird\r\n'])
def test_a_file_of_class_names(cfg, tmp_path, text):
    names = tmp_path / 'names.txt'
    names.write_bytes(text.encode())
    for phase in PHASES:
        loader = cfg[f'{phase}_dataloader']
        loader.dataset.metainfo.classes = str(names)
    check_data(cfg, PHASES)


@pytest.mark.parametrize(
    ('data', 'cause'),
    [
        (b'cat\n\ndog\nbird\n', "line 2: '' is not"),
        (b'cat\ndog\nbird\n\n', "line 4: '' is not"),
        (b'\xef\xbb\xbfcat\ndog\nbird\n', 'line 1: .* is not'),
        (b'cat\ndog \nbird\n', "line 2: 'dog ' is not"),
        (b'cat\ndog\nb\xe4r\n', 'is not UTF-8'),
        (b'cat\ndog\ncat\n', 'has a name twice: cat'),
        (b'cat\ndog\n', 'num_classes=3'),
    ],
)
def test_files_of_class_names_with_faults(cfg, tmp_path, data, cause):
    names = tmp_path / 'names.txt'
    names.write_bytes(data)
    cfg.train_dataloader.dataset.metainfo.classes = str(names)
    with pytest.raises(ValueError, match=cause) as error:
        check_data(cfg, ['train'])
    assert 'names.txt' in str(error.value)


def test_forgotten_comma_of_a_single_class(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = 'tree'
    assert refused(cfg) == (
        "`train_dataloader.dataset.metainfo.classes='tree'` is a text and "
        "no such file exists; a single class needs a comma: ('tree',)"
    )


def test_class_folders_of_a_classification_data_set(tmp_path):
    def loader(names):
        root = tmp_path / '_'.join(names)
        for name in names:
            (root / name).mkdir(parents=True)
        return dict(dataset=dict(type='CustomDataset', data_root=str(root)))

    cfg = dict(
        default_scope='mmpretrain',
        model=dict(head=dict(num_classes=3)),
        test_dataloader=loader(NAMES),
    )
    check_data(cfg, ['test'])
    cfg['model']['head']['num_classes'] = 10
    with pytest.raises(ValueError, match=r'model\.head\.num_classes=10'):
        check_data(cfg, ['test'])
    cfg['model']['head']['num_classes'] = 3
    cfg['train_dataloader'] = loader(('bird', 'cat', 'elk'))
    with pytest.raises(ValueError, match='a label would have two meanings'):
        check_data(cfg, ['train', 'test'])


# Metrics


def test_what_only_the_metric_of_the_host_refuses(cfg, root):
    data = content(first=5)
    for annotation in data['annotations']:
        del annotation['iscrowd']
    write(root / 'b.json', data)
    check_data(cfg, PHASES)
    cfg.val_evaluator.type = 'CocoMetric'
    assert '(val_evaluator):\n  3 annotations without `iscrowd`' in refused(
        cfg
    )


def test_a_metric_that_lacks_images(cfg, root):
    cfg.val_evaluator.ann_file = str(root / 'a.json')
    assert (
        f'{root}/a.json (val_evaluator.ann_file) lacks 3 of 3 images of '
        f'{root}/b.json'
    ) in refused(cfg)


def test_a_metric_with_more_images(cfg, root, lines):
    data, more = content(first=5), content(first=8)
    for part in ('images', 'annotations'):
        data[part] += more[part]
    write(root / 'c.json', data)
    cfg.val_evaluator.ann_file = str(root / 'c.json')
    check_data(cfg, ['val'])
    level, line = lines[-1]
    assert level == logging.WARNING
    assert '3 of 6 images are in the data set' in line


def test_joined_test_sets(cfg, root):
    """Two files of one ConcatDataset may have the same ids."""
    write(root / 'c.json', copy.deepcopy(content(first=5)))
    plain = cfg.val_dataloader.dataset
    cfg.val_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[plain, dict(plain, ann_file='c.json')]
    )
    assert '3 image ids are in several files' in refused(cfg)
    del cfg.val_evaluator['ann_file']
    check_data(cfg, PHASES)
    cfg.val_evaluator.type = 'CocoMetric'
    assert "use type='lors_plugin.CocoMetric' without" in refused(cfg)


def test_a_metric_without_file_needs_the_truth_packed(cfg):
    del cfg.val_evaluator['ann_file']
    check_data(cfg, PHASES)
    cfg.val_dataloader.dataset.pipeline[-1].meta_keys = ('img_id',)
    text = refused(cfg)
    assert "add 'instances' to the meta_keys of PackDetInputs" in text
