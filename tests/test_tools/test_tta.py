"""Test-time augmentation by ``tools/test.py``."""

import pickle
from pathlib import Path

import pytest
import test
import torch
import train
from mmengine.config import Config
from PIL import Image, ImageOps

from lors_plugin.engine.preflight import iter_datasets
from lors_plugin.testing import randomize

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(ROOT.glob('configs/*adamixer/*.py'))


def test_tta_wraps_model_and_innermost_pipeline():
    from tool_utils import apply_tta

    dataset = dict(dataset=dict(dataset=dict(pipeline=['old'])))
    cfg = Config(
        dict(
            model=dict(type='A'),
            tta_model=dict(type='B'),
            tta_pipeline=['new'],
            test_dataloader=dict(dataset=dataset),
        )
    )
    apply_tta(cfg)
    assert cfg.model.to_dict() == dict(type='B', module=dict(type='A'))
    inner = cfg.test_dataloader.dataset.dataset.dataset
    assert inner.pipeline == ['new']


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_default_for_shipped_configs(path, read_config):
    from tool_utils import apply_tta

    def pipeline():
        (found,) = iter_datasets(cfg.test_dataloader.dataset, '')
        return found[1].pipeline

    cfg = read_config(path.relative_to(ROOT).as_posix())
    plain = pipeline()
    detector = cfg.model.type
    apply_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'
    assert cfg.model.module.type == detector
    *steps, augment = pipeline()
    assert steps == plain[:-1]
    flips, (pack,) = augment.transforms
    assert [f.prob for f in flips] == [1.0, 0.0]
    keys = pack.meta_keys
    assert set(keys) == {*plain[-1].meta_keys, 'flip', 'flip_direction'}


def test_every_data_set_of_several_is_augmented():
    """Each by its own pipeline, or all by that of the config."""
    from tool_utils import apply_tta

    pipelines = [
        [dict(type='Resize', scale=scale), dict(type='PackDetInputs')]
        for scale in (32, 64)
    ]
    datasets = [dict(pipeline=pipeline) for pipeline in pipelines]
    loader = dict(dataset=dict(type='ConcatDataset', datasets=datasets))
    content = dict(
        default_scope='mmdet', model=dict(type='A'), test_dataloader=loader
    )
    cfg = Config(content)
    apply_tta(cfg)
    first, second = cfg.test_dataloader.dataset.datasets
    assert [d.pipeline[0].scale for d in (first, second)] == [32, 64]
    assert all(d.pipeline[-1].type == 'TestTimeAug' for d in (first, second))
    cfg = Config(dict(content, tta_pipeline=['new']))
    apply_tta(cfg)
    datasets = cfg.test_dataloader.dataset.datasets
    assert [d.pipeline for d in datasets] == [['new'], ['new']]


def test_no_default_for_other_hosts_and_pipelines():
    from tool_utils import apply_tta

    loader = dict(dataset=dict(pipeline=[dict(type='Resize')]))
    cfg = Config(dict(default_scope='mmseg', test_dataloader=loader))
    with pytest.raises(ValueError, match='no tta_model and no tta_pipeline'):
        apply_tta(cfg)
    cfg.default_scope = 'mmdet'
    with pytest.raises(ValueError, match='ends with Resize'):
        apply_tta(cfg)
    del cfg.test_dataloader.dataset['pipeline']
    with pytest.raises(ValueError, match='has no pipeline'):
        apply_tta(cfg)


@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_detections_follow_a_mirrored_image(
    detection, tiny_config, build, kind, capsys
):
    """The second image is the first one mirrored, so with the default the
    boxes are mirrored; without it they are not.
    """
    model = tiny_config(kind, decoder=dict(num_classes=1))
    cfg = Config.fromfile(detection)
    cfg.model = model
    config = f'{kind}_tta.py'
    cfg.dump(config)
    image = Image.open('coco/img/0.png')
    ImageOps.mirror(image).save('coco/img/1.png')
    torch.save(randomize(build(model), 0).state_dict(), 'a.pth')

    def mirrored(*options):
        argv = [config, 'a.pth', '--out', 'out.pkl', *options]
        assert test.main(argv) == 0
        first, second = (
            p['pred_instances'] for p in pickle.loads(read('out.pkl'))
        )
        boxes = first['bboxes'].clone()
        boxes[:, [0, 2]] = 64 - boxes[:, [2, 0]]
        assert len(boxes) > 0
        return len(boxes) == len(second['bboxes']) and (
            (boxes - second['bboxes']).abs().max() < 1e-2
        )

    assert not mirrored()
    assert mirrored('--tta')
    assert 'taking the default of mmdet' in ''.join(capsys.readouterr())


def read(path):
    return Path(path).read_bytes()


def test_classification_by_the_mean_of_both_views(classification):
    assert train.main([classification, '--work-dir', 'w']) == 0
    for name in 'abc':
        image = Image.open(f'images/{name}/0.png')
        ImageOps.mirror(image).save(f'images/{name}/1.png')
    scores = {}
    for options in ((), ('--tta',)):
        argv = [classification, 'w/epoch_1.pth', '--out', 'o.pkl', *options]
        assert test.main(argv) == 0
        predictions = pickle.loads(read('o.pkl'))
        scores[options] = torch.stack([p['pred_score'] for p in predictions])
    first, second = scores[()][0::2], scores[()][1::2]
    assert (first - second).abs().max() > 1e-6
    mean = ((first + second) / 2).repeat_interleave(2, 0)
    torch.testing.assert_close(scores[('--tta',)], mean)
