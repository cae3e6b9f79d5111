"""LORS inside models of the hosts: built, trained, merged, loaded there."""

import copy
import os
import re

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from lors_plugin.lors import LowRankResidualLinear, share_stack
from lors_plugin.lors.targets import find_stacks, weight_of
from lors_plugin.registry import MODELS
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

VIT = dict(
    type='mmpretrain.VisionTransformer',
    arch=dict(
        embed_dims=12, num_layers=3, num_heads=3, feedforward_channels=24
    ),
    img_size=16,
    patch_size=8,
    with_cls_token=False,
    out_type='avg_featmap',
)
VIT_TARGETS = [
    r'layers\.(\d+)\.attn\.qkv',
    r'layers\.(\d+)\.attn\.proj',
    r'layers\.(\d+)\.ffn\.layers\.0\.0',
    r'layers\.(\d+)\.ffn\.layers\.1',
]
SWIN = dict(
    type='mmpretrain.SwinTransformer',
    arch=dict(embed_dims=6, depths=[2, 4], num_heads=[1, 2]),
    img_size=16,
    patch_size=2,
    window_size=4,
    out_indices=(1,),
)
SWIN_TARGETS = [
    r'stages\.(\d)\.blocks\.(\d+)\.attn\.w_msa\.qkv',
    r'stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1',
]
DETR = dict(
    num_layers=3,
    layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=8, num_heads=2, batch_first=True),
        cross_attn_cfg=dict(embed_dims=8, num_heads=2, batch_first=True),
        ffn_cfg=dict(
            embed_dims=8,
            feedforward_channels=16,
            num_fcs=2,
            act_cfg=dict(type='ReLU', inplace=True),
        ),
    ),
    return_intermediate=True,
)
DETR_TARGETS = [
    r'layers\.(\d)\.ffn\.layers\.0\.0',
    r'layers\.(\d)\.ffn\.layers\.1',
    # Read by PyTorch's attention, which never calls it.
    r'layers\.(\d)\.self_attn\.attn\.out_proj',
    r'layers\.(\d)\.cross_attn\.attn\.in_proj',
    dict(pattern=r'layers\.(\d)\.self_attn\.attn\.in_proj', ranks=1),
]
RESNEXT = dict(
    type='mmpretrain.ResNeXt',
    depth=50,
    groups=2,
    width_per_group=2,
    base_channels=8,
    stem_channels=8,
    out_indices=(3,),
)
RESNEXT_TARGETS = [
    # The first block of a stage has other channels.
    r'layer(\d)\.([1-5])\.conv1',
    r'layer(\d)\.(\d)\.conv2',
    dict(pattern=r'layer(\d)\.(\d)\.conv3', ranks=3),
]


def vit():
    return build(VIT), VIT_TARGETS, dict(x=torch.randn(2, 3, 16, 16))


def swin():
    return build(SWIN), SWIN_TARGETS, dict(x=torch.randn(2, 3, 16, 16))


def detr():
    from mmdet.models.layers import DetrTransformerDecoder

    with DefaultScope.overwrite_default_scope('mmdet'):
        model = DetrTransformerDecoder(**copy.deepcopy(DETR))
    query, value = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    inputs = dict(
        query=query,
        key=value,
        value=value,
        query_pos=torch.randn(2, 5, 8),
        key_pos=torch.randn(2, 7, 8),
        key_padding_mask=None,
    )
    return model, DETR_TARGETS, inputs


def resnext():
    inputs = dict(x=torch.randn(2, 3, 32, 32))
    return build(RESNEXT), RESNEXT_TARGETS, inputs


def build(config):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(config))


def output(model, inputs):
    out = model(**inputs)
    return out[-1] if isinstance(out, (tuple, list)) else out


@pytest.fixture(params=[vit, swin, detr, resnext], ids=lambda f: f.__name__)
def host(request):
    """A plain model of a host, targets in it, and its inputs."""
    return request.param()


def at_full_rank(model, targets):
    """A target for each stack, with the full rank of its layers."""
    for stack in find_stacks(model, targets, ranks=0, groups=1):
        start = os.path.commonprefix(stack.names)
        end = os.path.commonprefix([name[::-1] for name in stack.names])[::-1]
        numbers = [
            n.removeprefix(start).removesuffix(end) for n in stack.names
        ]
        yield dict(
            pattern=f'{re.escape(start)}({"|".join(numbers)}){re.escape(end)}',
            ranks=min(weight_of(stack.layers[0]).flatten(1).shape),
        )


def test_full_rank_is_the_plain_model(host):
    """By singular values, and by loading the weights of a plain model."""
    model, targets, inputs = host
    randomize(model).eval()
    state, other = model.state_dict(), copy.deepcopy(model)
    wanted = output(model, inputs)
    targets = list(at_full_rank(model, targets))
    share_stack(model, targets, init='svd')
    share_stack(other, targets)
    other.load_state_dict(state, strict=True)
    for shared in (model, other):
        torch.testing.assert_close(
            output(shared, inputs), wanted, rtol=1e-4, atol=1e-5
        )


def test_copies_and_files(host):
    model, targets, inputs = host
    share_stack(model, targets, ranks=2)
    randomize(model).eval()
    wanted = output(model, inputs)
    other = copy.deepcopy(model)
    assert torch.equal(output(other, inputs), wanted)
    # A copy shares among its own layers.
    for layer in other.modules():
        if isinstance(layer, LowRankResidualLinear):
            layer.shared.data.zero_()
    assert not torch.equal(output(other, inputs), wanted)
    assert torch.equal(output(model, inputs), wanted)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(output(other, inputs), wanted)


def test_trains_and_merges_into_the_plain_model(host):
    model, targets, inputs = host
    plain = copy.deepcopy(model)
    share_stack(model, targets, ranks=2)
    model.init_weights()
    model.train()
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
            paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
        ),
    )
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for _ in range(2):
        wrapper.update_params(output(model, inputs).square().mean())
    output(model, inputs).square().mean().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        if 'shared' in name or name.endswith(('.up', '.down')):
            assert not torch.equal(param, before[name]), name

    randomize(model)
    model.eval()
    wanted = output(model, inputs)
    reparameterize(model)
    torch.testing.assert_close(
        output(model, inputs), wanted, rtol=1e-4, atol=1e-5
    )
    assert not any(
        isinstance(m, LowRankResidualLinear) for m in model.modules()
    )
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.eval()
    assert torch.equal(output(plain, inputs), output(model, inputs))


def test_hosts_leave_shared_weights_as_they_were_drawn():
    """Hosts initialise every nn.Linear of a block on their own."""
    model, targets, _ = vit()
    share_stack(model, targets, ranks=2)
    kept = copy.deepcopy(model.state_dict())
    model.init_weights()
    for key, value in model.state_dict().items():
        if key.endswith(('shared_weight', 'up', 'down')):
            assert torch.equal(value, kept[key]), key


def test_config_entry_starts_from_a_plain_checkpoint(tmp_path):
    plain = randomize(build(VIT))
    state = {f'backbone.{k}': v for k, v in plain.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'plain.pth')
    start = dict(
        type='Pretrained',
        checkpoint=str(tmp_path / 'plain.pth'),
        prefix='backbone.',
    )
    model = build(
        dict(
            type='lors_plugin.LORSStack',
            module=dict(VIT, init_cfg=start),
            targets=VIT_TARGETS,
            ranks=12,
        )
    )
    assert type(model) is type(plain)
    model.init_weights()
    model.eval()
    plain.eval()
    inputs = dict(x=torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(
        output(model, inputs), output(plain, inputs), rtol=1e-4, atol=1e-5
    )


def test_autocast():
    model, targets, inputs = vit()
    share_stack(model, targets, ranks=2)
    randomize(model)
    model.eval()
    wanted = output(model, inputs)
    with torch.autocast('cpu', torch.bfloat16):
        out = output(model, inputs)
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.1)
