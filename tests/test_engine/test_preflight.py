import pytest
from mmengine.config import Config

from lors_plugin.engine import preflight
from lors_plugin.engine.preflight import (
    check_data_paths,
    dataset_classes,
    iter_datasets,
    model_num_classes,
)

NAMES = ('cat', 'dog', 'bird')


@pytest.fixture
def cfg(tmp_path):
    """A detection config whose data is there."""
    (tmp_path / 'data' / 'img').mkdir(parents=True)
    (tmp_path / 'data' / 'ann').mkdir()
    ann_file = tmp_path / 'data' / 'ann' / 'a.json'
    ann_file.write_text('{}')
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


def test_a_good_config_passes(cfg):
    check_data_paths(cfg, PHASES)


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


def test_type_name():
    assert preflight.type_name('mmdet.CocoDataset') == 'CocoDataset'
    assert preflight.type_name(Config) == 'Config'


def test_class_types_of_new_style_configs(tmp_path):
    class CIFAR10:
        pass

    dataset = dict(type=CIFAR10, data_root=str(tmp_path / 'not_yet'))
    check_data_paths(dict(train_dataloader=dict(dataset=dataset)), ['train'])


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


def test_dataset_classes_of_a_host():
    pytest.importorskip('mmdet.registry')
    classes = dataset_classes(dict(type='mmdet.CocoDataset'))
    assert len(classes) == 80
    assert dataset_classes(dict(type='CocoDataset'), 'mmdet') == classes
    assert dataset_classes(dict(type='nohost.Dataset')) is None


@pytest.mark.parametrize(
    ('scope', 'host'),
    [('mmdet', 'mmdet'), ('mmcls', 'mmpretrain'), ('mmseg', None)],
)
def test_host_of(scope, host):
    assert preflight.host_of(dict(default_scope=scope)) == host
