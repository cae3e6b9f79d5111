"""Adapter files of every method by tools/reparam.py, into stock hosts."""

import copy

import pytest
import reparam
import torch
from mmengine.config import Config

from lors_plugin.adapters import adapter_checkpoint, adapters_of
from lors_plugin.reparam import reparameterize, unmerge
from lors_plugin.reparam.compare import difference, prepare
from lors_plugin.reparam.structure import adapt, build_base

FAST = ['--shape', '64', '64', '--repeats', '0']
ATTENTION = dict(
    self_attn_cfg=dict(embed_dims=16, num_heads=2, batch_first=True),
    ffn_cfg=dict(embed_dims=16, feedforward_channels=32, num_fcs=2),
)
DETR = dict(
    default_scope='mmdet',
    model=dict(
        type='DETR',
        num_queries=5,
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.0] * 3,
                               std=[60.0] * 3),
        backbone=dict(type='ResNet', depth=18, stem_channels=8,
                      base_channels=8, num_stages=1, strides=(2,),
                      dilations=(1,), out_indices=(0,)),
        neck=dict(type='ChannelMapper', in_channels=[8], kernel_size=1,
                  out_channels=16, act_cfg=None, norm_cfg=None, num_outs=1),
        encoder=dict(num_layers=1, layer_cfg=ATTENTION),
        decoder=dict(num_layers=1, return_intermediate=True, layer_cfg=dict(
            ATTENTION, cross_attn_cfg=ATTENTION['self_attn_cfg'])),
        positional_encoding=dict(num_feats=8, normalize=True),
        # The host writes into its default loss_cls.
        bbox_head=dict(type='DETRHead', num_classes=3, embed_dims=16,
                       sync_cls_avg_factor=True, loss_cls=dict(
                           type='CrossEntropyLoss', class_weight=1.0)),
        test_cfg=dict(max_per_img=5),
    ),
)  # fmt: skip
# Its state dict has other names than its modules.
TIMM = dict(
    default_scope='mmpretrain',
    model=dict(
        type='TimmClassifier', model_name='vit_tiny_patch16_224', img_size=32,
        embed_dim=24, depth=2, num_heads=2, num_classes=3,
        data_preprocessor=dict(mean=[127.0] * 3, std=[60.0] * 3),
    ),
)  # fmt: skip
# Host, and options of the hook.
CASES = dict(
    lora=('vit', dict(method='lora', rank=3, alpha=6, bias=True)),
    lora_conv=('resnet', dict(method='lora', rank=2,
                              targets=[r'layer\d\.\d\.conv[123]'])),
    bitfit=('vit', dict(method='bitfit')),
    norm=('resnet', dict(method='norm')),
    linear_probe=('vit', dict(method='linear_probe')),
    mha=('detr', dict(module='decoder', targets=[
        r'layers\.\d\.self_attn', (r'layers\.\d\.cross_attn', 'kv')])),
    mha_lora=('detr', dict(module='decoder', method='lora',
                           targets=[r'layers\.\d\.ffn\.layers\.0\.0'])),
    timm=('timm', dict(module='model', trainable=['head'], targets=[
        r'blocks\.\d\.attn\.qkv', r'blocks\.\d\.mlp\.fc1'])),
    mha_bitfit=('detr', dict(module='decoder', method='bitfit')),
)  # fmt: skip


@pytest.fixture(scope='module')
def tuned(hosts, tmp_path_factory):
    """A folder with the files of a case, and its trained model."""
    made = {}

    def make(case):
        if case in made:
            return made[case]
        host, hook = CASES[case]
        content = dict({**hosts.configs, 'detr': DETR, 'timm': TIMM}[host])
        content['custom_hooks'] = [
            dict(type='lors_plugin.RepAdapterHook', **hook)
        ]
        folder = tmp_path_factory.mktemp(case)
        cfg = Config(copy.deepcopy(content))
        cfg.dump(folder / 'config.py')
        torch.manual_seed(0)
        model = build_base(cfg)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
        torch.save(dict(state_dict=model.state_dict()), folder / 'base.pth')
        adapt(model, cfg, {})
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.1 * torch.randn_like(param))
        torch.save(adapter_checkpoint(model), folder / 'adapter.pth')
        made[case] = folder, model.eval()
        return made[case]

    return make


@torch.no_grad()
def outputs(model, dtype):
    rng = torch.Generator().manual_seed(1)
    size = (2, 3, 64, 64)
    images = torch.randint(256, size, generator=rng, dtype=torch.uint8)
    if not hasattr(model, 'bbox_head'):
        images = images[..., :32, :32]
    batch = prepare(model, list(images))
    return model.to(dtype)(
        batch['inputs'].to(dtype), batch['data_samples'], mode='tensor'
    )


@pytest.mark.parametrize(
    ('case', 'dtype'),
    [(case, 'float32') for case in CASES]
    + [(c, d) for c in ('lora', 'mha') for d in ('float16', 'bfloat16')],
)
def test_merged_and_loaded_strictly(tuned, tmp_path, case, dtype):
    folder, model = tuned(case)
    shape = ['--shape', '32', '32'] if CASES[case][0] != 'detr' else []
    argv = [
        str(folder / 'config.py'), str(tmp_path), '--dtype', dtype,
        '--adapter', str(folder / 'adapter.pth'),
        '--base', str(folder / 'base.pth'), *FAST, *shape,
    ]  # fmt: skip
    assert reparam.main(argv) == 0
    text = (tmp_path / 'adapter.py').read_text()
    assert 'lors_plugin' not in text
    plain = build_base(Config.fromfile(tmp_path / 'adapter.py'))
    state = torch.load(tmp_path / 'adapter.pth')['state_dict']
    plain.load_state_dict(state, strict=True)
    floats = {v.dtype for v in state.values() if v.is_floating_point()}
    assert floats == {getattr(torch, dtype)}
    gap = difference('', outputs(model, torch.float32),
                     outputs(plain, torch.float32))  # fmt: skip
    assert gap.within(reparam.TOLERANCES[dtype])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', ['lora', 'lora_conv', 'mha', 'bitfit'])
def test_undone_bit_for_bit_in_half_precision(tuned, case, dtype):
    model = copy.deepcopy(tuned(case)[1]).to(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    number = len(adapters_of(model))
    assert reparameterize(model, convert=False) == number
    merged = model.state_dict()
    assert any(not merged[k].equal(v) for k, v in before.items()
               if k in merged) == (number > 0)  # fmt: skip
    assert {merged[k].dtype for k in before if k in merged} <= {
        dtype, torch.int64
    }  # fmt: skip
    assert unmerge(model) == number
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[k].equal(v) for k, v in before.items())
