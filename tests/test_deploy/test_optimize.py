"""optimize(): the same outputs from fewer operations."""

import pytest
import torch
from torch import nn

from lors_plugin.deploy import optimize
from lors_plugin.export import for_export
from lors_plugin.export.cases import random_images
from lors_plugin.reparam.compare import detections_difference, prepare
from lors_plugin.testing import randomize


def count(model, kind):
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.parametrize(
    'backbone',
    [None, dict(type='MobileNetV2', out_indices=(1, 2, 4, 7))],
    ids=['resnet', 'mobilenet'],
)
def test_a_detector(backbone, tiny_detector, tiny_config, build):
    config = tiny_config()
    if backbone:
        config['backbone'] = backbone
        config['neck']['in_channels'] = [24, 32, 96, 1280]
    model = randomize(build(config)).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = optimize(model)
    assert count(model, nn.BatchNorm2d) and not count(fast, nn.BatchNorm2d)
    batch = prepare(model, random_images(2, (64, 96), 0))
    inputs = batch['inputs'], batch['data_samples']
    results = []
    with torch.no_grad():
        for each in (model, fast):
            found = each.predict(*inputs, rescale=False)
            results.append(
                [
                    dict(
                        boxes=image.pred_instances.bboxes.clone(),
                        scores=image.pred_instances.scores.clone(),
                        labels=image.pred_instances.labels.clone(),
                    )
                    for image in found
                ]
            )
    assert detections_difference(*results).within(1e-4)
    # The model itself is as it was.
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(ValueError, match='export the model that it was made'):
        for_export(fast)


class Net(nn.Module):
    """A norm that is not only fed by the convolution in front of it."""

    def __init__(self, twice):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.twice = twice
        self.backbone = nn.Identity()

    def extract_feat(self, x):
        y = self.conv(x)
        if self.twice:
            return self.norm(y), self.norm(x)
        return self.norm(y), y


def test_norms_that_cannot_be_folded():
    shared = randomize(Net(twice=True)).eval()
    assert count(optimize(shared), nn.BatchNorm2d) == 1
    # Its convolution is read elsewhere, too.
    with pytest.raises(RuntimeError, match='change features by'):
        optimize(randomize(Net(twice=False)).eval())


def test_mistakes(tiny_detector):
    with pytest.raises(ValueError, match='call model.eval()'):
        optimize(tiny_detector())
    with pytest.raises(ValueError, match='torch.bfloat16, for models'):
        optimize(tiny_detector().eval(), torch.float16)


def test_bfloat16(tiny_detector):
    model = tiny_detector().eval()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        with pytest.raises(ValueError, match='no instructions for bfloat16'):
            optimize(model, torch.bfloat16)
        return
    fast = optimize(model, torch.bfloat16)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(
            fast.extract_feat(image), model.extract_feat(image)
        ):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, atol=0.2, rtol=0.1)
