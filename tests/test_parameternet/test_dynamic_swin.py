"""Swin with dynamic linear layers."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from lors_plugin.parameternet.dynamic_linear import DynamicLinear
from lors_plugin.parameternet.dynamic_swin import dynamic_swin_transformer
from lors_plugin.parameternet.routing import ExpertRouter
from lors_plugin.registry import MODELS

ARCH = dict(embed_dims=8, depths=[2, 1], num_heads=[2, 2])


@pytest.fixture
def swin():
    def make(**options):
        model = MODELS.build(
            dict(
                type='lors_plugin.DynamicSwinTransformer',
                arch=ARCH,
                window_size=4,
                out_indices=(0, 1),
                pad_small_map=True,
                **{'num_experts': 3, **options},
            )
        )
        for module in model.modules():
            if isinstance(module, ExpertRouter):
                nn.init.normal_(module.fc.weight, std=3.0)
        model.eval()
        return model

    return make


def test_all_linear_layers_of_the_stages_are_dynamic(swin):
    model = swin()
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert plain
    assert all('.routing.' in name for name in plain)
    dynamic = [m for m in model.modules() if isinstance(m, DynamicLinear)]
    # Four in a block and one in patch merging.
    assert len(dynamic) == 4 * 3 + 1
    assert {m.num_experts for m in dynamic} == {3}


def test_windows_of_an_image_are_routed_together(swin):
    model = swin()
    seen = []
    router = model.stages[0].blocks[1].attn.w_msa.qkv.routing
    router.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(3, 3, 37, 48)
    together = model(x)
    assert seen[0].shape == (3, 3)
    alone = [torch.cat(outs) for outs in zip(*(model(i[None]) for i in x))]
    for left, right in zip(together, alone):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_a_copy_looks_at_itself(swin):
    model = swin()
    copy = deepcopy(model)
    copy(torch.randn(2, 3, 32, 48))
    # Patches of 4 x 4 pixels, windows of 4 x 4 patches.
    assert copy.stages[0].blocks[0].attn.w_msa.qkv.num_windows == 6
    assert model.stages[0].blocks[0].attn.w_msa.qkv.num_windows == 1


def test_one_expert_is_swin(swin):
    model = swin(num_experts=1)
    assert not any(isinstance(m, DynamicLinear) for m in model.modules())


def test_starts_as_swin_does(swin):
    """The mixture has the deviation that Swin's weights have."""
    torch.manual_seed(0)
    model = dynamic_swin_transformer(
        arch=dict(embed_dims=64, depths=[1], num_heads=[2]), out_indices=(0,)
    )
    layer = model.stages[0].blocks[0].ffn.layers[1]
    mixed = layer.weight.mean(0)
    assert mixed.std().item() == pytest.approx(0.02, rel=0.05)
    assert not layer.bias.any()


def test_trains(swin):
    model = swin()
    model.train()
    sum(
        out.square().mean() for out in model(torch.randn(2, 3, 32, 32))
    ).backward()
    unused = [k for k, p in model.named_parameters() if p.grad is None]
    assert unused == []
