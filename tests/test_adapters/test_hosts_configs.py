"""Configs with adapters on models of the hosts, at reduced size.

Each is built, trained a step, given random weights, merged, and what it
becomes is loaded by its host in a process without this package.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from stock_process import BLOCKED

from lors_plugin.adapters import (
    adapters_of,
    inject_adapters,
    remove_adapters,
)
from lors_plugin.adapters.hook import check_whole_file
from lors_plugin.build import build_model
from lors_plugin.compat import published_encoding
from lors_plugin.reparam import reparameterize, unmerge
from lors_plugin.reparam.deploy import deploy
from lors_plugin.testing import randomize

SIDE = 64
CLASSES = ('RBC', 'WBC', 'Platelets')
WIDTHS = [16, 32, 64, 128]  # of the stages of backbones
# Options that make a model small, wherever they are in its config.
SMALL = dict(
    embed_dims=32,
    num_heads=2,
    num_layers=2,
    feedforward_channels=32,
    num_feats=16,
    num_queries=12,
    num_dn_queries=4,
    feat_channels=32,
    out_channels=32,
    conv_out_channels=32,
    fc_out_channels=32,
    channels=32,
    embed_dim=32,
    num_dyhead_blocks=1,
    num_points=64,
    max_per_img=10,
)
# Grounding DINO has a width of 256 in its code.
GROUNDING = dict(
    SMALL,
    embed_dims=256,
    num_feats=128,
    out_channels=256,
    v_dim=256,
    l_dim=256,
)
# GLIP takes it for the number of tokens.
GLIP = dict(SMALL, feat_channels=256, out_channels=256)
VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48)
BACKBONES = {
    'ResNet': dict(base_channels=4),
    'SwinTransformer': dict(
        embed_dims=16, depths=[1] * 4, num_heads=[1, 1, 2, 2]
    ),
    'mmpretrain.ConvNeXt': dict(arch=dict(depths=[1] * 4, channels=WIDTHS)),
    'CSPNeXt': dict(widen_factor=0.125),
    'MixVisionTransformer': dict(
        embed_dims=16, num_layers=[1] * 4, num_heads=[1, 2, 4, 8]
    ),
    'VisionTransformer': dict(img_size=(SIDE, SIDE)),
}
# Number of adapters at reduced size.
ADAPTERS = {
    'dino-4scale_r50-rep-adapter_8xb2-12e_coco': 26,
    'deformable-detr_r50-rep-adapter_16xb2-50e_coco': 26,
    'dab-detr_r50-rep-adapter_8xb2-50e_coco': 26,
    'mask-rcnn_swin-t-p4-w7-rep-adapter_fpn_1x_coco': 8,
    'mask-rcnn_convnext-t-p4-w7-rep-adapter_fpn_amp-ms-crop-3x_coco': 4,
    'cascade-mask-rcnn_convnext-t-p4-w7-rep-adapter_fpn_4conv1fc-giou_amp-ms-crop-3x_coco': 4,  # noqa: E501
    'rtmdet_s-rep-adapter_8xb32-300e_coco': 14,
    'mask2former_swin-t-p4-w7-224-rep-adapter_8xb2-lsj-50e_coco': 18,
    'glip_atss_swin-t_a-rep-adapter_fpn_dyhead_16xb2_ms-2x_coco': 12,
    'grounding_dino_swin-t-rep-adapter_16xb2_1x_coco': 36,
    'mm-grounding-dino_swin-t-rep-adapter_8xb4-20e_bccd': 36,
    'dinov2-vit-base-p14_rep-adapter_1xb64-100e_vtab-1k': 4,
    'eva-large-p14_rep-adapter_1xb64-100e_vtab-1k': 4,
    'eva02-base-p14_rep-adapter_1xb64-100e_vtab-1k': 4,
    'beitv2-base-p16_rep-adapter_1xb64-100e_vtab-1k': 4,
    'timm-siglip-vit-base-p16_rep-adapter_1xb64-100e_vtab-1k': 5,
    'hf-dinov2-base-p14_rep-adapter_1xb64-100e_vtab-1k': 4,
    'setr_vit-l-rep-adapter_naive_8xb2-160k_ade20k-512x512': 8,
    'segmenter_vit-s-rep-adapter_mask_8xb1-160k_ade20k-512x512': 4,
    'upernet_vit-b16-rep-adapter_ln-mln_8xb2-160k_ade20k-512x512': 8,
    'upernet_swin-t-p4-w7-rep-adapter_8xb2-160k_ade20k-512x512': 8,
    'segformer_mit-b0-rep-adapter_8xb2-160k_ade20k-512x512': 8,
}

STOCK = (
    BLOCKED
    + """
import pathlib
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
for path in sys.argv[1:]:
    file = torch.load(path, weights_only=True)
    with DefaultScope.overwrite_default_scope(file['scope']):
        model = MODELS.build(ConfigDict(file['model']))
    model.load_state_dict(file['state_dict'], strict=True)
    pathlib.Path(path).with_suffix('.loaded').touch()
assert 'lors_plugin' not in sys.modules
"""
)


@pytest.fixture(scope='module', autouse=True)
def deformable_convolution():
    """That of torchvision, as MMCV's is compiled."""
    from mmcv.ops import modulated_deform_conv
    from torchvision.ops import deform_conv2d

    def convolve(x, offset, mask, weight, bias, stride, padding, dilation, *_):
        # GLIP gives the offsets of a larger map; MMCV reads what it needs.
        height, width = (-(-side // stride[0]) for side in x.shape[-2:])
        offset, mask = (y[..., :height, :width] for y in (offset, mask))
        return deform_conv2d(
            x, offset, weight, bias, stride, padding, dilation, mask
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            modulated_deform_conv, 'modulated_deform_conv2d', convolve
        )
        yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Folders of Hugging Face: a tiny BERT with its tokenizer, a DINOv2."""
    import transformers

    root = tmp_path_factory.mktemp('folders')
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', ',']
    words += [*'abcdefghijklmnopqrstuvwxyz', 'rbc', 'wbc', 'platelets']
    (root / 'vocab.txt').write_text('\n'.join(words))
    bert = str(root / 'bert')
    transformers.BertTokenizerFast(str(root / 'vocab.txt')).save_pretrained(
        bert
    )
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    transformers.BertModel(config).save_pretrained(bert)
    dino = str(root / 'dinov2')
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
    )
    transformers.Dinov2ForImageClassification(config).save_pretrained(dino)
    return SimpleNamespace(bert=bert, dino=dino)


def shrink(node, sizes):
    """Make a config of a model small, in place."""
    if isinstance(node, (list, tuple)):
        for item in node:
            shrink(item, sizes)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        shrink(value, sizes)
        if isinstance(value, int) and key in sizes:
            node[key] = sizes[key]
        elif key == 'in_channels' and isinstance(value, int) and value > 3:
            node[key] = sizes['out_channels']
        elif key == 'in_channels' and isinstance(value, list):
            wide = len(value) > 1 and len(set(value)) == 1
            node[key] = [32] * len(value) if wide else WIDTHS[-len(value) :]
    kind = node.get('type')
    if kind == 'SyncBN':
        node['type'] = 'BN'
    elif kind == 'RoIAlign':
        node['use_torchvision'] = True


def small_config(name, load_config, folders):
    """The config of a name with a small model; kinds of layers stay."""
    config = load_config(f'configs/rep_adapter/{name}.py')
    model = config.model
    if config.default_scope == 'mmpretrain':
        shrink_classifier(model, folders)
        return config
    sizes = dict(GLIP=GLIP, GroundingDINO=GROUNDING).get(model.type, SMALL)
    shrink(model, sizes)
    backbone = model.backbone
    backbone.update(BACKBONES[backbone.type])
    if len(backbone.get('out_indices', ())) == 4:
        backbone.out_indices = (0, 1, 2, 3)
        if backbone.type == 'VisionTransformer':
            backbone.num_layers = 4
    if 'encoder' in model:
        model.bbox_head.embed_dims = sizes['embed_dims']
    if 'language_model' in model:
        model.language_model.name = folders.bert
    if model.type == 'GLIP':
        model.bbox_head.update(
            lang_model_name=folders.bert, num_dyhead_blocks=1
        )
    auxiliary = model.get('auxiliary_head')
    if isinstance(auxiliary, dict) and 'Swin' in backbone.type:
        auxiliary.in_channels = WIDTHS[auxiliary.in_index]
    preprocessor = model.data_preprocessor
    preprocessor.pop('batch_augments', None)
    if config.default_scope == 'mmseg':
        preprocessor.size = (SIDE, SIDE)
        model.test_cfg = dict(mode='whole')
    return config


def shrink_classifier(model, folders):
    if model.type == 'TimmClassifier':
        model.update(
            pretrained=False, img_size=56, embed_dim=32, depth=2, num_heads=2
        )
    elif model.type == 'HuggingFaceClassifier':
        model.model_name = folders.dino
    else:
        model.backbone.update(img_size=56, arch=VIT)
        model.head.in_channels = VIT['embed_dims']


def make_data(config):
    """Two images of noise with what their loss needs."""
    torch.manual_seed(0)
    scope = config.default_scope
    side = 56 if scope == 'mmpretrain' else SIDE
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i) for i in range(2)]
    elif scope == 'mmseg':
        samples = [segmented(side) for _ in range(2)]
    else:
        samples = [detected(side) for _ in range(2)]
        if 'mask_head' not in str(config.model) and (
            config.model.type != 'Mask2Former'
        ):
            for sample in samples:
                del sample.gt_instances.masks
    inputs = [torch.randint(256, (3, side, side), dtype=torch.uint8)] * 2
    return dict(inputs=inputs, data_samples=samples)


def segmented(side):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    shape = (side, side)
    return SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(150, (1, *shape))),
        metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape),
    )


def detected(side):
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import PolygonMasks
    from mmengine.structures import InstanceData

    box = np.array([8, 8, 40, 8, 40, 48, 8, 48], float)
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 40.0, 48.0]] * 2),
            labels=torch.tensor([0, 2]),
            masks=PolygonMasks([[box], [box]], side, side),
        ),
        metainfo=dict(
            img_id=0,
            img_shape=(side, side),
            ori_shape=(side, side),
            scale_factor=(1.0, 1.0),
            text=CLASSES,
            custom_entities=True,
        ),
    )


@torch.no_grad()
def outputs(model, data):
    """Everything a model computes of two images, as a list of tensors."""
    data = model.data_preprocessor(data, False)
    if hasattr(model, 'roi_head'):
        return tensors(model.extract_feat(data['inputs']))
    if hasattr(model, 'language_model'):
        found = model(**data, mode='predict')
        found = [sample.pred_instances for sample in found]
        return [x for f in found for x in (f.scores, f.bboxes, f.labels)]
    return tensors(model(**data, mode='tensor'))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors(item)]


@pytest.fixture(scope='module')
def merged(folders, tmp_path_factory, load_config):
    """Train the model of a config for a step and merge it, once each."""
    root, done = tmp_path_factory.mktemp('merged'), {}

    def make(name):
        if name not in done:
            config = small_config(name, load_config, folders)
            done[name] = train_and_merge(config, root / f'{name}.pth')
        return done[name]

    return make


def train_and_merge(config, path):
    torch.manual_seed(0)
    model = build_model(config)
    if hasattr(model, 'level_embed'):  # memory as it was, so far
        torch.nn.init.normal_(model.level_embed)
    adapters = len(adapters_of(model))
    params = dict(model.named_parameters())
    trained = {k for k, p in params.items() if p.requires_grad}
    data = model.train().data_preprocessor(make_data(config), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    reached = {k for k, p in params.items() if p.grad is not None}
    before = {k: params[k].clone() for k in trained}
    torch.optim.SGD([params[k] for k in trained], lr=0.1).step()
    moved = {k for k in trained if not params[k].equal(before[k])}
    randomize(model).eval()
    wanted = outputs(model, make_data(config))
    deployed = deploy(model, config)
    torch.save(
        dict(
            model=deployed.cfg.model.to_dict(),
            scope=config.default_scope,
            state_dict=deployed.state,
        ),
        path,
    )
    return SimpleNamespace(
        path=path,
        adapters=adapters,
        moved=moved,
        reached=reached,
        trained=trained,
        wanted=wanted,
        found=outputs(deployed.model, make_data(config)),
    )


@pytest.mark.parametrize('name', ADAPTERS)
def test_trains_a_step_and_merges(merged, name):
    result = merged(name)
    assert result.adapters == ADAPTERS[name]
    assert result.reached == result.trained
    assert {k for k in result.trained if k.endswith('.up_bias')} <= (
        result.moved
    )
    assert len(result.found) == len(result.wanted) > 0
    for value, other in zip(result.found, result.wanted):
        assert value.isfinite().all()
        scale = other.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            value / scale, other / scale, rtol=1e-4, atol=1e-4
        )


def test_names_that_a_wrapper_changes(folders, load_config):
    """MMPretrain's wrapper leaves 'model.' out of its state dict."""
    name = 'hf-dinov2-base-p14_rep-adapter_1xb64-100e_vtab-1k'
    config = small_config(name, load_config, folders)
    model = build_model(config)
    state = model.state_dict()
    assert not state.keys() <= dict(model.named_parameters()).keys()
    check_whole_file(model, dict(state_dict=state))
    one = next(key for key in state if key.endswith('.rep_adapter.up_bias'))
    odd = {k: v for k, v in state.items() if not k.startswith(one[:-8])}
    with pytest.raises(ValueError, match='1 layers are adapted on one side'):
        check_whole_file(model, dict(state_dict=odd))


@pytest.mark.thorough
def test_stock_hosts_load_them(merged):
    paths = [merged(name).path for name in ADAPTERS]
    command = [sys.executable, '-c', STOCK, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert all(path.with_suffix('.loaded').exists() for path in paths)


GROUNDED = 'mm-grounding-dino_swin-t-rep-adapter_8xb4-20e_bccd'
PARTS = ('backbone', 'language_model', 'encoder', 'decoder')


@pytest.fixture(scope='module')
def grounding_dino(folders, load_config):
    """The base of the config for classes of one's own, and its images."""
    config = small_config(GROUNDED, load_config, folders)
    torch.manual_seed(0)
    model = randomize(build_model(config, adapters=False)).eval()
    return model, make_data(config)


@pytest.mark.parametrize('part', PARTS)
def test_parts_of_grounding_dino_are_on_or_off(grounding_dino, part):
    model = grounding_dino[0]
    report = inject_adapters(model, '', exclude=[part])
    parts = {name.partition('.')[0] for name in report.adapted}
    assert parts == set(PARTS) - {part}
    only = set(PARTS) - parts
    remove_adapters(model)
    report = inject_adapters(model, '', exclude=sorted(parts))
    assert {name.partition('.')[0] for name in report.adapted} == only
    remove_adapters(model)


def test_grounding_dino_without_its_adapters_is_the_base(grounding_dino):
    """Bit for bit, also after they were merged and taken out again."""
    model, data = grounding_dino
    base = outputs(model, data)
    inject_adapters(model, '')
    fresh = outputs(model, data)
    assert all(map(torch.equal, fresh, base))
    for adapter in adapters_of(model).values():
        randomize(adapter)
    tuned = outputs(model, data)
    assert not torch.equal(tuned[0], base[0])
    reparameterize(model)
    unmerge(model)
    assert all(map(torch.equal, outputs(model, data), tuned))
    remove_adapters(model)
    assert all(map(torch.equal, outputs(model, data), base))


def test_boxes_are_encoded_as_published():
    from mmdet.models.layers.transformer.utils import (
        MLP,
        coordinate_to_encoding,
    )

    boxes = torch.rand(2, 5, 4)
    published = coordinate_to_encoding(boxes, num_feats=128)
    head = MLP(512, 256, 256, 2)
    (encoded,) = published_encoding(
        head, (coordinate_to_encoding(boxes, num_feats=256),)
    )
    assert encoded.equal(published)
    assert published_encoding(head, (published,))[0] is published
