"""The configs with adapters, and those they are compared with."""

import re

import mmcv
import numpy as np
import pytest
import torch
import yaml
from mmengine.registry import DATASETS, METRICS, DefaultScope

from lors_plugin.adapters import adapters_of
from lors_plugin.analysis.weightless import EmptyWeights
from lors_plugin.build import build_model
from lors_plugin.compat import MissingOpError
from lors_plugin.reparam.deploy import deploy
from lors_plugin.testing import randomize

FOLDER = 'configs/rep_adapter'
NAMES = [
    'cascade-mask-rcnn_swin-t-p4-w7-rep-adapter_fpn_1x_coco',
    'clip-vit-base-p16_rep-adapter_1xb64-100e_vtab-1k',
    'convnext-base_rep-adapter_1xb64-100e_vtab-1k',
    'lors-adamixer_mobilenetv2-bitfit_49-queries_bccd',
    'lors-adamixer_mobilenetv2-frozen_49-queries_bccd',
    'lors-adamixer_mobilenetv2-full_49-queries_bccd',
    'lors-adamixer_mobilenetv2-lora_49-queries_bccd',
    'lors-adamixer_mobilenetv2-norm_49-queries_bccd',
    'lors-adamixer_mobilenetv2-rep-adapter_49-queries_bccd',
    'lors-adamixer_swin-t-p4-w7-rep-adapter_8xb2-1x_coco',
    'lors-adamixer_vit-small-p14-full_49-queries_bccd-168x126',
    'lors-adamixer_vit-small-p14-rep-adapter_49-queries_bccd-168x126',
    'retinanet_vit-small-p14-rep-adapter_bccd-168x126',
    'setr_vit-small-p14-frozen_camvid-168x126',
    'setr_vit-small-p14-full_camvid-168x126',
    'setr_vit-small-p14-rep-adapter_camvid-168x126',
    'swin-base-p4-w7_rep-adapter_1xb64-100e_vtab-1k',
    'vit-base-p16_full_1xb64-100e_vtab-1k',
    'vit-base-p16_linear-probe_1xb64-100e_vtab-1k',
    'vit-base-p16_lora_1xb64-100e_vtab-1k',
    'vit-base-p16_rep-adapter_1xb64-100e_few-shot',
    'vit-base-p16_rep-adapter_1xb64-100e_vtab-1k',
    'vit-small-p14_full_elpv-70px',
    'vit-small-p14_linear-probe_elpv-70px',
    'vit-small-p14_lora_elpv-70px',
    'vit-small-p14_rep-adapter_elpv-70px',
]
# Of models of the hosts; their table is in the guide, and
# tests/test_adapters/test_hosts_configs.py trains and merges them.
GUIDE = 'docs/en/user_guides/adapters.md'
COUNTED = [
    'rtmdet_s-rep-adapter_8xb32-300e_coco',
    'eva02-base-p14_rep-adapter_1xb64-100e_vtab-1k',
    'segformer_mit-b0-rep-adapter_8xb2-160k_ade20k-512x512',
]
SIZE = 56  # a multiple of all patches, and more than one window
# What is trained of the backbone, by a word of the name.
TRAINED = {
    'full': r'.*',
    'frozen': r'(?!)',
    'linear-probe': r'(?!)',
    'rep-adapter': r'.*\.rep_adapter\.\w+',
    'lora': r'.*\.lora(_\w+)?\.\w+',
    'bitfit': r'.*\.bias',
    'norm': r'.*\.bn\.\w+',
}


def pytest_generate_tests(metafunc):
    if 'name' in metafunc.fixturenames:
        metafunc.parametrize('name', NAMES)


@pytest.fixture
def config(name, load_config):
    return load_config(f'{FOLDER}/{name}.py')


def build_frozen(config):
    """Build the model with what its hooks add and freeze."""
    model = build_model(config)
    for hook in config.get('custom_hooks', []):
        if hook.type == 'lors_plugin.FreezeHook':
            for name in hook.modules:
                model.get_submodule(name).requires_grad_(False)
    return model


def count_trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def shrink(config):
    """Few channels and layers; kinds and places of layers stay."""
    backbone = config.model.backbone
    backbone = backbone.get('module', backbone)
    if backbone.type.endswith('VisionTransformer'):
        backbone.img_size = SIZE
        backbone.arch = dict(
            embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48
        )
        width = 32
    elif backbone.type == 'ConvNeXt':
        backbone.arch = dict(depths=[1] * 4, channels=[8, 16, 24, 32])
        width = 32
    elif 'arch' in backbone:
        backbone.update(img_size=SIZE, pad_small_map=True)
        backbone.arch = dict(
            embed_dims=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 2, 2]
        )
        width = 64
    elif backbone.type == 'SwinTransformer':
        backbone.update(embed_dims=24, depths=[1, 2, 1, 1])
        config.model.neck.in_channels = [24, 48, 96, 192]
    else:
        assert backbone.type == 'MobileNetV2'
    if 'head' in config.model:
        config.model.head.in_channels = width
    if 'decode_head' in config.model:
        config.model.decode_head.in_channels = width
        config.model.data_preprocessor.size = (SIZE, SIZE)
    if backbone.type == 'mmpretrain.VisionTransformer':
        neck = config.model.get('neck') or [dict()]
        (neck[0] if isinstance(neck, list) else neck)['in_channels'] = width


def rows_of_hosts(root):
    """Cells of the table of the guide, by the name of the config."""
    text = (root / GUIDE).read_text('utf-8')
    pattern = rf'(?m)^\| \[[^]]*\]\([./]*{FOLDER}/(.+?)\.py\) \|(.*)\|$'
    return {
        name: [cell.strip() for cell in cells.split('|')]
        for name, cells in re.findall(pattern, text)
    }


def metadata(root):
    """Metadata of the configs, by their names."""
    content = (root / FOLDER / 'metafile.yml').read_text()
    models = yaml.safe_load(content)['Models']
    return {entry['Name']: entry['Metadata'] for entry in models}


def test_all_are_there(root):
    there = {p.stem for p in (root / FOLDER).glob('*.py')}
    assert there == {*NAMES, *rows_of_hosts(root)} == metadata(root).keys()


def test_the_table_of_hosts_is_the_metafile(root):
    facts = metadata(root)
    for host, cells in rows_of_hosts(root).items():
        trained = facts[host]['Trained Parameters']
        share = 100 * trained / facts[host]['Parameters']
        assert cells[3:5] == [f'{trained / 1e6:.3f} M', f'{share:.2f} %'], host


@pytest.mark.parametrize('host', COUNTED)
def test_counts_of_hosts(host, load_config, root):
    with EmptyWeights():
        model = build_model(load_config(f'{FOLDER}/{host}.py'))
    facts, cells = metadata(root)[host], rows_of_hosts(root)[host]
    adapters = adapters_of(model).values()
    inside = sum(p.numel() for a in adapters for p in a.parameters())
    assert cells[1:3] == [str(len(adapters)), f'{inside / 1e6:.3f} M']
    assert facts['Trained Parameters'] == count_trained(model)
    total = sum(p.numel() for p in model.parameters())
    assert facts['Parameters'] == total


def test_trains_a_step(name, config, make_samples):
    """What the name says is trained gets gradients, and nothing else."""
    shrink(config)
    if 'decoder' in config.model:
        config.model.decoder.update(in_points=4, out_points=8, num_stages=2)
    model = build_frozen(config).train()
    inputs = [torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)] * 2
    if 'head' in config.model:
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i) for i in range(2)]
    elif 'decode_head' in config.model:
        samples = [segmented(classes=12) for _ in inputs]
    else:
        classes = 3 if 'bccd' in name else 80
        samples = make_samples((2, 1), classes, (SIZE, SIZE))
        if 'cascade' in name:
            add_masks(samples)
    data = dict(inputs=inputs, data_samples=samples)
    data = model.data_preprocessor(data, training=True)
    try:
        losses = model(**data, mode='loss')
    except MissingOpError as error:
        assert 'cascade' in name
        pytest.skip(str(error))
    loss, _ = model.parse_losses(losses)
    assert loss.isfinite()
    loss.backward()
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    reached = {k for k, p in model.named_parameters() if p.grad is not None}
    assert trained == reached
    (word,) = (word for word in TRAINED if re.search(f'[-_]{word}_', name))
    pattern = TRAINED[word]
    if '_coco' in name:
        # Of the outputs; in no classifier, so they begin untrained.
        pattern += r'|norm\d\.\w+'
    own = {k for k, _ in model.backbone.named_parameters()}
    backbone = {k for k in own if f'backbone.{k}' in trained}
    assert backbone == {k for k in own if re.fullmatch(pattern, k)}
    assert bool(backbone) == (pattern != TRAINED['frozen'])


def segmented(classes):
    """A sample with a label for each pixel."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    labels = torch.randint(classes, (1, SIZE, SIZE))
    sample = SegDataSample(metainfo=dict(img_shape=(SIZE, SIZE)))
    return sample.set_data(dict(gt_sem_seg=PixelData(data=labels))) or sample


def add_masks(samples):
    """Masks for the mask heads."""
    from mmdet.structures.mask import BitmapMasks

    for sample in samples:
        count = len(sample.gt_instances)
        ones = torch.ones(count, SIZE, SIZE, dtype=torch.uint8).numpy()
        sample.gt_instances.masks = BitmapMasks(ones, SIZE, SIZE)


def test_counts(name, config, root):
    """Metafile and table tell the truth."""
    if config.model.backbone.type == 'LoRAModel':
        pytest.skip('LoRAModel initialises weights while it is built')
    with EmptyWeights():
        model = build_frozen(config)
    count = count_trained
    folder = root / FOLDER
    facts = metadata(root)[name]
    assert facts['Trained Parameters'] == count(model)
    assert facts['Parameters'] == sum(p.numel() for p in model.parameters())
    (row,) = (
        line
        for line in (folder / 'README.md').read_text().splitlines()
        if line.startswith(f'| [{name}]({name}.py) |')
    )
    numbers = [f'{count(m) / 1e6:.3f} M' for m in (model, model.backbone)]
    assert row.endswith('| ' + ' | '.join(numbers) + ' |')


def test_published_recipe(load_config):
    config = load_config(
        f'{FOLDER}/vit-base-p16_rep-adapter_1xb64-100e_vtab-1k.py'
    )
    assert config.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-3, weight_decay=1e-4
    )
    assert config.train_dataloader.batch_size == 64
    assert config.train_cfg.max_epochs == 100
    warmup, cosine = config.param_scheduler
    assert (warmup.end, cosine.begin, cosine.end) == (10, 10, 100)
    kinds = [step.type for step in config.train_pipeline]
    assert kinds == ['LoadImageFromFile', 'Resize', 'PackInputs']


SETR = f'{FOLDER}/setr_vit-small-p14-rep-adapter_camvid-168x126.py'


def test_merged_segmentor_needs_its_host_alone(load_config):
    """Nothing of this package is left, and it computes the same."""
    config = load_config(SETR)
    shrink(config)
    model = randomize(build_model(config)).eval()
    deployed = deploy(model, config)
    assert deployed.merged == 4
    assert 'lors_plugin' not in deployed.cfg.pretty_text
    image = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        before, after = model(image), deployed.model(image)
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-4)


def test_road_scenes(read_config, tmp_path):
    """Photos get small, labels for evaluation do not, and what is unlabelled
    counts neither way."""
    config = read_config(SETR)
    labels = np.arange(360 * 480).reshape(360, 480).astype(np.uint8) % 12
    for part in ('train', 'val'):
        for kind, value, end in (
            ('images', np.stack([labels * 20] * 3, -1), 'jpg'),
            ('labels', labels, 'png'),
        ):
            mmcv.imwrite(value, str(tmp_path / kind / part / f'a.{end}'))
    with DefaultScope.overwrite_default_scope('mmseg'):
        samples = {}
        for part in ('train', 'val'):
            dataset = config[f'{part}_dataloader'].dataset
            dataset.data_root = str(tmp_path)
            samples[part] = DATASETS.build(dataset)[0]
        metric = METRICS.build(config.val_evaluator)
    sizes = dict(train=(126, 168), val=(360, 480))
    for part, sample in samples.items():
        assert sample['inputs'].shape == (3, 126, 168)
        truth = sample['data_samples'].gt_sem_seg.data[0]
        assert truth.shape == sizes[part]
    truth = truth.long()
    metric.dataset_meta = config.metainfo
    for wrong, expected in (((), 100), ((0, 1), 9 / 11 * 100)):
        guess = torch.where(truth == 11, 3, truth)
        for label in wrong:
            guess[truth == label] = 1 - label
        sample = dict(
            pred_sem_seg=dict(data=guess[None]),
            gt_sem_seg=dict(data=truth[None]),
        )
        metric.process({}, [sample])
        result = metric.evaluate(1)
        assert result['mIoU'] == pytest.approx(expected, abs=0.01)
