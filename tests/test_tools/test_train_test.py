"""``tools/train.py`` and ``tools/test.py`` on small stock models."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture(scope='module')
def tools():
    """The modules of both tools, imported as their directory sees them."""
    sys.path.insert(0, str(TOOLS))
    hidden = {n: sys.modules.pop(n, None) for n in ('train', 'test')}
    try:
        import test
        import train

        yield train, test
    finally:
        sys.path.remove(str(TOOLS))
        for name, module in hidden.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Run below ``tmp_path`` and leave no default scope behind."""
    monkeypatch.chdir(tmp_path)
    scopes = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)


def write_image(path, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(str(path)))
    pixels = generator.integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_config(name, **content):
    path = Path(f'{name}.py')
    path.write_text(Config(content).pretty_text)
    return str(path)


@pytest.fixture
def classification(request):
    """A LeNet on six images of three classes."""
    for name in 'abc':
        for index in range(2):
            write_image(Path('images') / name / f'{index}.png')
    pipeline = [
        dict(type='LoadImageFromFile', color_type='grayscale'),
        dict(type='PackInputs'),
    ]
    loader = dict(
        batch_size=3,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CustomDataset', data_root='images', pipeline=pipeline
        ),
    )
    return write_config(
        request.node.name.split('[')[0],
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='LeNet5'),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=3,
                in_channels=120,
                loss=dict(type='CrossEntropyLoss'),
            ),
            data_preprocessor=dict(mean=[127.0], std=[64.0], num_classes=3),
        ),
        train_dataloader=loader,
        val_dataloader=loader,
        test_dataloader=loader,
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        test_evaluator=dict(type='Accuracy', topk=(1,)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        val_cfg=dict(),
        test_cfg=dict(),
        auto_scale_lr=dict(base_batch_size=6),
        default_hooks=dict(visualization=dict(type='VisualizationHook')),
    )


@pytest.fixture
def detection(request):
    """A tiny DETR on two images with one box each."""
    images, annotations = [], []
    for index in range(2):
        write_image(Path('coco') / 'img' / f'{index}.png', 64)
        images.append(
            dict(id=index, file_name=f'{index}.png', width=64, height=64)
        )
        annotations.append(
            dict(
                id=index,
                image_id=index,
                category_id=1,
                bbox=[8, 8, 24, 30],
                area=720,
                iscrowd=0,
            )
        )
    Path('coco/a.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='tree')],
            )
        )
    )
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='CocoDataset',
            data_root='coco',
            ann_file='a.json',
            data_prefix=dict(img='img'),
            metainfo=dict(classes=('tree',)),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 64)),
                dict(type='PackDetInputs', meta_keys=meta),
            ],
        ),
    )
    evaluator = dict(type='CocoMetric', ann_file='coco/a.json', metric='bbox')
    attention = dict(embed_dims=16, num_heads=2)
    ffn = dict(embed_dims=16, feedforward_channels=16)
    return write_config(
        request.node.name.split('[')[0],
        default_scope='mmdet',
        model=dict(
            type='DETR',
            num_queries=5,
            data_preprocessor=dict(type='DetDataPreprocessor'),
            backbone=dict(type='ResNet', depth=18, num_stages=1,
                          strides=(1,), dilations=(1,), out_indices=(0,),
                          base_channels=8),
            neck=dict(type='ChannelMapper', in_channels=[8], kernel_size=1,
                      out_channels=16, num_outs=1, norm_cfg=None),
            encoder=dict(num_layers=1, layer_cfg=dict(
                self_attn_cfg=attention, ffn_cfg=ffn)),
            decoder=dict(num_layers=1, layer_cfg=dict(
                self_attn_cfg=attention, cross_attn_cfg=attention,
                ffn_cfg=ffn), return_intermediate=True),
            positional_encoding=dict(num_feats=8, normalize=True),
            bbox_head=dict(
                type='DETRHead', num_classes=1, embed_dims=16,
                loss_cls=dict(type='CrossEntropyLoss', bg_cls_weight=0.1,
                              use_sigmoid=False, loss_weight=1.0,
                              class_weight=1.0)),
            train_cfg=dict(assigner=dict(
                type='HungarianAssigner',
                match_costs=[dict(type='ClassificationCost', weight=1.0)])),
            test_cfg=dict(max_per_img=5),
        ),
        train_dataloader=loader,
        test_dataloader=loader,
        test_evaluator=evaluator,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        test_cfg=dict(),
        default_hooks=dict(visualization=dict(type='DetVisualizationHook')),
    )  # fmt: skip


def fails(capsys, main, *argv):
    """Run a tool, expect exit code 2 and return what it said."""
    with pytest.raises(SystemExit) as error:
        main(list(argv))
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert 'Traceback' not in text
    return text[text.index('error: ') :]


def test_classification_is_trained_resumed_and_tested(tools, classification):
    train, test = tools
    assert train.main([classification, '--auto-scale-lr']) == 0
    work_dir = Path('work_dirs') / Path(classification).stem
    first = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    assert first['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.005)

    more = ['--resume', '--cfg-options', 'train_cfg.max_epochs=2']
    assert train.main([classification, *more]) == 0
    second = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert second['meta']['epoch'] == 2

    checkpoint = str(work_dir / 'epoch_2.pth')
    outputs = ['--out', 'out.pkl', '--show-dir', 'shown']
    assert test.main([classification, checkpoint, *outputs]) == 0
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert len(predictions) == 6
    assert predictions[0]['pred_score'].shape == (3,)
    assert len(list(Path('shown').iterdir())) > 0


def test_detection_is_trained_and_tested(tools, detection):
    pytest.importorskip('mmdet')
    train, test = tools
    assert train.main([detection, '--work-dir', 'here']) == 0
    outputs = ['--out', 'out.pkl', '--show-dir', str(Path('shown').resolve())]
    argv = [detection, 'here/epoch_1.pth', '--work-dir', 'there', *outputs]
    assert test.main(argv) == 0
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert len(predictions) == 2
    assert predictions[0]['pred_instances']['bboxes'].shape == (5, 4)
    assert len(list(Path('shown').glob('*.png'))) == 2


def test_user_mistakes_before_anything_is_built(tools, classification, capsys):
    train, test = tools
    text = fails(capsys, train.main, 'none.py')
    assert 'config file none.py does not exist' in text

    data = ['--cfg-options', 'train_dataloader.dataset.data_root=nowhere']
    text = fails(capsys, train.main, classification, *data)
    assert 'train_dataloader.dataset.data_root: nowhere' in text

    classes = ['--cfg-options', 'model.head.num_classes=7']
    text = fails(capsys, train.main, classification, *classes)
    assert 'model.head.num_classes=7' in text
    assert 'has 3 classes' in text

    text = fails(capsys, train.main, classification, '--resume', 'none.pth')
    assert '--resume: the checkpoint file none.pth does not exist' in text

    text = fails(capsys, test.main, classification, 'none.pth')
    assert 'CHECKPOINT: the checkpoint file none.pth' in text

    Path('x.pth').write_bytes(b'')
    text = fails(capsys, test.main, classification, 'x.pth', '--tta')
    assert 'no tta_model and no tta_pipeline' in text

    text = fails(
        capsys, test.main, classification, 'x.pth', '--out', 'out.json'
    )
    assert 'must end in .pkl' in text

    Path('broken.py').write_text('model = dict(')
    text = fails(capsys, train.main, 'broken.py')
    assert 'broken.py cannot be read' in text
    assert not Path('work_dirs').exists()


def test_mistakes_in_the_model(tools, classification, capsys):
    train, test = tools
    options = ['--cfg-options', 'model.neck.foo=1']
    text = fails(capsys, train.main, classification, *options)
    assert "unexpected keyword argument 'foo'" in text
    assert '--debug' in text
    with pytest.raises(TypeError, match='foo'):
        train.main([classification, *options, '--debug'])

    torch.save(
        dict(state_dict={'backbone.features.0.weight': torch.zeros(4, 1)}),
        'other.pth',
    )
    text = fails(capsys, test.main, classification, 'other.pth')
    assert 'other.pth does not fit the model of this config' in text
    assert 'backbone.features.0.weight (file (4, 1)' in text
    load = ['--cfg-options', 'load_from=other.pth']
    text = fails(capsys, train.main, classification, *load)
    assert 'same architecture' in text


@pytest.mark.parametrize(
    ('given', 'cuda', 'dtype'),
    [
        ('auto', False, 'bfloat16'),
        ('auto', True, 'float16'),
        ('float16', False, 'float16'),
        ('bfloat16', True, 'bfloat16'),
    ],
)
def test_amp(tools, monkeypatch, given, cuda, dtype):
    train, _ = tools
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    options = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1),
        clip_grad=dict(max_norm=1),
    )
    cfg = Config(dict(optim_wrapper=options))
    train.apply_amp(cfg, given)
    expected = dict(
        options, type='lors_plugin.AutocastOptimWrapper', dtype=dtype
    )
    assert cfg.optim_wrapper.to_dict() == expected


def test_amp_where_the_config_decides(tools):
    train, _ = tools
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper')))
    train.apply_amp(cfg, 'auto')
    assert cfg.optim_wrapper.to_dict() == dict(type='AmpOptimWrapper')
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(ValueError, match='ApexOptimWrapper'):
        train.apply_amp(cfg, 'auto')


def test_auto_scale_lr_needs_a_base(tools):
    train, _ = tools
    with pytest.raises(ValueError, match='base_batch_size'):
        train.apply_auto_scale_lr(Config(dict()))


def test_tta_wraps_model_and_innermost_pipeline(tools):
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
