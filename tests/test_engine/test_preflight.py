import json

import pytest
from mmengine.config import Config

from lors_plugin.engine import preflight
from lors_plugin.engine.preflight import (
    check_classes,
    check_data_paths,
    dataset_classes,
    iter_datasets,
    model_num_classes,
    read_categories,
)

NAMES = ('cat', 'dog', 'bird')


def write_coco(path, names=NAMES, indent=None, **extra):
    categories = [
        dict(id=i + 1, name=name, **extra) for i, name in enumerate(names)
    ]
    content = dict(images=[], categories=categories, annotations=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent))
    return path


@pytest.fixture
def cfg(tmp_path):
    """A detection config whose data is there and whose classes agree."""
    (tmp_path / 'data' / 'img').mkdir(parents=True)
    ann_file = write_coco(tmp_path / 'data' / 'ann' / 'a.json')
    dataset = dict(
        type='CocoDataset',
        data_root=str(tmp_path / 'data'),
        ann_file='ann/a.json',
        data_prefix=dict(img='img/'),
        metainfo=dict(classes=NAMES),
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(decoder=dict(num_classes=3)),
            train_dataloader=dict(dataset=dataset),
            val_dataloader=dict(dataset=dict(dataset)),
            val_evaluator=dict(type='CocoMetric', ann_file=str(ann_file)),
        )
    )


PHASES = ('train', 'val')


def no_classes(dataset):
    return None


def test_a_good_config_passes(cfg):
    check_data_paths(cfg, PHASES)
    check_classes(cfg, PHASES, no_classes)


def test_missing_data_root_names_the_field_only_once(cfg):
    cfg.train_dataloader.dataset.data_root = 'nowhere/coco'
    with pytest.raises(FileNotFoundError) as error:
        check_data_paths(cfg, PHASES)
    text = str(error.value)
    assert 'train_dataloader.dataset.data_root: nowhere/coco' in text
    assert 'ann_file' not in text
    assert '--cfg-options train_dataloader.dataset.data_root=' in text


def test_all_missing_paths_are_listed(cfg):
    cfg.train_dataloader.dataset.ann_file = 'ann/b.json'
    cfg.val_dataloader.dataset.data_prefix.img = 'pictures'
    cfg.val_evaluator.ann_file = 'c.json'
    with pytest.raises(FileNotFoundError) as error:
        check_data_paths(cfg, PHASES)
    text = str(error.value)
    assert 'train_dataloader.dataset.ann_file: ' in text
    assert 'val_dataloader.dataset.data_prefix.img: ' in text
    assert 'val_evaluator.ann_file: c.json' in text
    check_data_paths(cfg, ())


def test_evaluators_in_a_list(cfg):
    cfg.val_evaluator = [dict(type='A'), dict(type='B', ann_file='c.json')]
    with pytest.raises(FileNotFoundError, match=r'val_evaluator\.1\.ann_file'):
        check_data_paths(cfg, ['val'])


def test_wrappers_and_lists_are_followed(cfg):
    inner = cfg.train_dataloader.dataset
    other = dict(inner, ann_file='none.json')
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset',
        dataset=dict(type='ConcatDataset', datasets=[inner, other]),
    )
    fields = [f for f, _ in iter_datasets(cfg.train_dataloader.dataset, 'top')]
    assert fields == ['top.dataset.datasets.0', 'top.dataset.datasets.1']
    with pytest.raises(
        FileNotFoundError, match=r'dataset\.dataset\.datasets\.1\.ann_file'
    ):
        check_data_paths(cfg, ['train'])


def test_remote_and_downloaded_data_is_left_alone(cfg):
    cfg.train_dataloader.dataset.data_root = 's3://bucket/coco'
    cfg.val_dataloader.dataset = dict(type='CIFAR10', data_root='not/yet')
    check_data_paths(cfg, PHASES)
    cfg.val_dataloader.dataset.download = False
    with pytest.raises(FileNotFoundError, match='not/yet'):
        check_data_paths(cfg, PHASES)


def test_wrong_number_of_classes_names_both_sides(cfg):
    cfg.model.decoder.num_classes = 80
    with pytest.raises(ValueError) as error:
        check_classes(cfg, PHASES, no_classes)
    text = str(error.value)
    assert 'model.decoder.num_classes=80' in text
    assert 'train_dataloader.dataset has 3 classes' in text
    assert 'cat, dog, bird' in text
    assert '--cfg-options model.decoder.num_classes=3' in text
    assert '--no-checks' in text


def test_without_metainfo_the_annotation_file_counts(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    cfg.model.decoder.num_classes = 4
    with pytest.raises(ValueError, match=r'3 classes by the categories of'):
        check_classes(cfg, ['train'], no_classes)


def test_class_names_absent_in_the_annotation_file(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('cat', 'dog', 'brid')
    with pytest.raises(ValueError) as error:
        check_classes(cfg, PHASES, no_classes)
    text = str(error.value)
    assert '1 of 3 classes by metainfo.classes' in text
    assert 'brid' in text
    assert '3 categories: cat, dog, bird' in text


def test_forgotten_comma_of_a_single_class(cfg, tmp_path):
    cfg.train_dataloader.dataset.metainfo.classes = 'tree'
    with pytest.raises(ValueError) as error:
        check_classes(cfg, PHASES, no_classes)
    assert str(error.value) == (
        "`train_dataloader.dataset.metainfo.classes='tree'` is a text and "
        "no such file exists; a single class needs a comma: ('tree',)"
    )
    names = tmp_path / 'names.txt'
    names.write_text('\n'.join(NAMES))
    cfg.train_dataloader.dataset.metainfo.classes = str(names)
    check_classes(cfg, PHASES, no_classes)


def test_type_name():
    assert preflight.type_name('mmdet.CocoDataset') == 'CocoDataset'
    assert preflight.type_name(Config) == 'Config'


def test_class_types_of_new_style_configs(tmp_path):
    class CIFAR10:
        pass

    dataset = dict(type=CIFAR10, data_root=str(tmp_path / 'not_yet'))
    check_data_paths(dict(train_dataloader=dict(dataset=dataset)), ['train'])


def test_forgotten_metainfo_of_a_coco_dataset(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    coco = [f'c{i}' for i in range(80)]
    with pytest.raises(ValueError) as error:
        check_classes(cfg, ['train'], lambda dataset: coco)
    assert '80 of 80 classes' in str(error.value)
    assert 'metainfo=dict(classes=' in str(error.value)


def test_lookup_sees_the_scope_of_the_host(cfg):
    del cfg.train_dataloader.dataset['metainfo']
    seen = []
    check_classes(cfg, ['train'], lambda dataset: seen.append(dataset['type']))
    assert seen == ['mmdet.CocoDataset']


def test_stock_heads_and_lists_of_heads_are_found():
    model = dict(
        backbone=dict(num_classes=1000),
        rpn_head=dict(anchors=3),
        roi_head=dict(
            bbox_head=[dict(num_classes=80), dict(num_classes=80)],
            mask_head=dict(num_classes=7),
        ),
    )
    assert model_num_classes(model) == {
        'model.roi_head.bbox_head.0.num_classes': 80,
        'model.roi_head.bbox_head.1.num_classes': 80,
        'model.roi_head.mask_head.num_classes': 7,
    }


def test_open_vocabulary_models_have_no_number_of_classes():
    model = dict(language_model=dict(), bbox_head=dict(num_classes=256))
    assert model_num_classes(model) == {}


@pytest.mark.parametrize(
    'extra', [{}, dict(keypoints=['a', 'b'], skeleton=[[1, 2]])]
)
@pytest.mark.parametrize('indent', [None, 2])
def test_read_categories(tmp_path, extra, indent):
    path = write_coco(tmp_path / 'a.json', indent=indent, **extra)
    assert read_categories(path) == list(NAMES)


@pytest.mark.parametrize('text', ['', '[1, 2]', '{"categories": {}}'])
def test_read_categories_of_other_files(tmp_path, text):
    path = tmp_path / 'a.json'
    path.write_text(text)
    assert read_categories(path) is None


def test_class_folders_of_a_classification_data_set(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    cfg = dict(
        default_scope='mmpretrain',
        model=dict(head=dict(num_classes=3)),
        test_dataloader=dict(
            dataset=dict(type='CustomDataset', data_root=str(tmp_path))
        ),
    )
    check_data_paths(cfg, ['test'])
    check_classes(cfg, ['test'], no_classes)
    cfg['model']['head']['num_classes'] = 10
    with pytest.raises(ValueError, match=r'model\.head\.num_classes=10'):
        check_classes(cfg, ['test'], no_classes)


def test_dataset_classes_of_a_host():
    pytest.importorskip('mmdet.registry')
    classes = dataset_classes(dict(type='mmdet.CocoDataset'))
    assert len(classes) == 80
    assert dataset_classes(dict(type='nohost.Dataset')) is None


@pytest.mark.parametrize(
    ('scope', 'host'),
    [('mmdet', 'mmdet'), ('mmcls', 'mmpretrain'), ('mmseg', None)],
)
def test_host_of(scope, host):
    assert preflight.host_of(dict(default_scope=scope)) == host
