"""Plain models of transformers and timm, adapted by a call."""

import copy

import pytest
import torch

from lors_plugin.adapters import adapters_of, inject_adapters
from lors_plugin.reparam import reparameterize, unmerge
from lors_plugin.testing import randomize

SIZE = dict(
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
IMAGES = dict(SIZE, image_size=32, patch_size=8)
WORDS = dict(SIZE, vocab_size=40, max_position_embeddings=16)
SWIN = dict(
    image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[1, 2],
    window_size=4,
)  # fmt: skip
# Class, options of its config, layers that are adapted.
TRANSFORMERS = [
    ('ViTModel', IMAGES, 4),
    ('DeiTModel', IMAGES, 4),
    ('Dinov2Model', dict(IMAGES, mlp_ratio=2), 4),
    ('Dinov2Model', dict(IMAGES, mlp_ratio=2, use_swiglu_ffn=True), 4),
    ('Dinov2WithRegistersModel', dict(IMAGES, mlp_ratio=2), 4),
    ('DINOv3ViTModel', IMAGES, 4),
    ('DINOv3ViTModel', dict(IMAGES, use_gated_mlp=True), 6),
    ('CLIPVisionModel', IMAGES, 4),
    ('CLIPTextModel', WORDS, 4),
    ('SiglipVisionModel', IMAGES, 5),
    ('BeitModel', IMAGES, 4),
    ('BertModel', WORDS, 4),
    ('SwinModel', SWIN, 4),
]
VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
TIMM = [
    ('vit_base_patch16_224', VIT, 4),
    ('vit_base_patch16_siglip_224', VIT, 5),
    ('vit_small_patch14_dinov2', VIT, 4),
    ('vit_giant_patch14_dinov2', dict(VIT, mlp_ratio=2), 4),
    ('deit3_base_patch16_224', VIT, 4),
    ('beit_base_patch16_224', VIT, 4),
    ('eva02_tiny_patch14_224', VIT, 2),  # rotates keys: FFN only
    (
        'swin_tiny_patch4_window7_224',
        dict(img_size=32, embed_dim=12, depths=(1, 1), num_heads=(1, 2),
             window_size=4),
        4,
    ),
    (
        'swinv2_tiny_window8_256',  # normalises keys: FFN only
        dict(img_size=32, embed_dim=12, depths=(1, 1), num_heads=(1, 2),
             window_size=4),
        2,
    ),
    ('convnext_atto', dict(depths=(1,) * 4, dims=(8, 8, 16, 16)), 4),
]  # fmt: skip


def build_transformers(name, options):
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**options)), (
        dict(input_ids=torch.arange(10)[None])
        if 'vocab_size' in options
        else dict(pixel_values=torch.randn(2, 3, 32, 32))
    )


def build_timm(name, options):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    return model, dict(x=torch.randn(2, 3, 32, 32))


CASES = [(build_transformers, *case) for case in TRANSFORMERS]
CASES += [(build_timm, *case) for case in TIMM]


@pytest.mark.parametrize(
    ('build', 'name', 'options', 'number'),
    CASES,
    ids=[f'{case[1]}-{i}' for i, case in enumerate(CASES)],
)
def test_a_call_adapts_and_merging_fits_the_stock_model(
    build, name, options, number
):
    model, inputs = build(name, options)
    stock = copy.deepcopy(model).eval()
    report = inject_adapters(model, '', hidden_dims=4, dropout=0.0)
    assert len(report.adapted) == number
    randomize(model).eval()
    wanted = joined(model(**inputs))
    wanted.square().mean().backward()
    for layer, adapter in adapters_of(model).items():
        for key, param in adapter.named_parameters():
            assert param.grad.abs().max() > 0, f'{layer}.{key}'
    before = copy.deepcopy(model.state_dict())
    reparameterize(model)
    stock.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        found = joined(stock(**inputs))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


def joined(outputs):
    """All tensors that a model returns, as one."""
    if isinstance(outputs, torch.Tensor):
        outputs = [outputs]
    elif hasattr(outputs, 'to_tuple'):
        outputs = outputs.to_tuple()
    return torch.cat([output.flatten() for output in outputs])
