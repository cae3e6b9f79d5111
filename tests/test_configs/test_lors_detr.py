"""Detectors of the host whose stacks share: counts, a step, merging."""

from copy import deepcopy

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

from lors_plugin.build import build_model
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

FOLDER = 'configs/lors_detr'
COUNTS = {
    'lors-deformable-detr_r50_16xb2-50e_coco': (40118934, 33925782),
    'lors-dino-4scale_r50_8xb2-12e_coco': (47833484, 37183884),
    'lors-mask2former_r50_8xb2-lsj-50e_coco': (44023377, 31063633),
}


@pytest.mark.parametrize('name', COUNTS)
def test_parameters(name, full_size, root):
    count = sum(
        p.numel() for p in full_size(f'{FOLDER}/{name}.py').parameters()
    )
    before, after = COUNTS[name]
    assert count == after
    readme = (root / FOLDER / 'README.md').read_text(encoding='utf-8')
    assert f'{before / 1e6:.3f} M | {after / 1e6:.3f} M |' in readme


def shrink(model):
    """Make the model of a config small: two layers a stack, few channels."""
    model = deepcopy(model)
    model.backbone.update(depth=18, base_channels=8)
    if model.type == 'Mask2Former':
        head = model.panoptic_head
        head.in_channels = [8, 16, 32, 64]
        head.num_queries = 5
        head.pixel_decoder.encoder.num_layers = 2
        head.transformer_decoder.num_layers = 2
        head.num_transformer_feat_level = 3
    else:
        model.neck.in_channels = [16, 32, 64]
        model.num_queries = 5
        model.encoder.num_layers = model.decoder.num_layers = 2
    return model


@pytest.mark.parametrize('name', COUNTS)
def test_trains_and_merges_into_the_model_of_the_host(
    name, load_config, make_samples
):
    config = load_config(f'{FOLDER}/{name}.py')
    config.model = shrink(config.model)
    model = build_model(config).train()
    # Until then the hosts leave `level_embed` as the memory was.
    model.init_weights()
    plain = deepcopy(config)
    plain.custom_hooks = []
    plain = build_model(plain).eval()
    samples = make_samples([2, 1], classes=80)
    for sample in samples:
        if 'mask2former' in name:
            from mmdet.structures.mask import BitmapMasks

            count = len(sample.gt_instances)
            masks = torch.randint(0, 2, (count, 64, 96)).numpy()
            sample.gt_instances.masks = BitmapMasks(
                masks.astype('uint8'), 64, 96
            )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    images = torch.randn(2, 3, 64, 96)
    with DefaultScope.overwrite_default_scope('mmdet'):
        losses = model.loss(images, samples)
        model.parse_losses(losses)[0].backward()
    shared = [
        (key, param)
        for key, param in model.named_parameters()
        if key.endswith(('shared_weight', '.up'))
    ]
    assert len(shared) >= 20
    for key, param in shared:
        assert param.grad is not None and param.grad.any(), key

    randomize(model).eval()
    with torch.no_grad(), DefaultScope.overwrite_default_scope('mmdet'):
        wanted = outputs(model, images, samples)
        reparameterize(model)
        plain.load_state_dict(model.state_dict(), strict=True)
        found = outputs(plain, images, samples)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def outputs(model, images, samples):
    """Raw outputs of the decoder."""
    if hasattr(model, 'panoptic_head'):
        feats = model.extract_feat(images)
        scores, masks = model.panoptic_head(feats, samples)
        return [*scores, *masks]
    return list(model._forward(images, samples)[:1])
