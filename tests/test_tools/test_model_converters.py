import mobilenetv2_trunk as tool
import pytest
import torch
from torchvision.models import mobilenet_v2


@pytest.fixture
def trunk():
    """Random weights, with normalisations that are not the identity."""
    torch.manual_seed(0)
    state = {}
    # The plain names number the layers of a block through.
    for i, module in enumerate(mobilenet_v2(weights=None).features):
        prefix = f'features.{i}.' + 'conv.' * hasattr(module, 'conv')
        leaves = [m for m in module.modules() if not list(m.children())]
        for position, leaf in enumerate(leaves):
            for key, value in leaf.state_dict().items():
                state[f'{prefix}{position}.{key}'] = value
    for key, value in state.items():
        if key.endswith(('running_var', 'running_mean', 'bias')):
            value.uniform_(0.5, 1.5)
    return state


def test_converted_trunk_computes_the_same(trunk, tmp_path):
    source, target = tmp_path / 'a.pt', tmp_path / 'new' / 'b.pth'
    torch.save(trunk, source)
    assert tool.main([str(source), str(target)]) == 0
    assert [p.name for p in target.parent.iterdir()] == ['b.pth']
    converted = torch.load(target, weights_only=True)
    assert len(converted['state_dict']) == len(trunk) == 312
    assert converted['meta']['to_rgb'] is True

    from lors_plugin.compat import install_mmcv_ext_fallback

    install_mmcv_ext_fallback()
    from mmdet.models.backbones import MobileNetV2

    backbone = MobileNetV2(
        out_indices=(1, 2, 4, 6),
        init_cfg=dict(type='Pretrained', checkpoint=str(target)),
    )
    backbone.init_weights()
    backbone.eval()
    outputs = backbone(torch.zeros(1, 3, 64, 64))
    assert [o.shape[1] for o in outputs] == [24, 32, 96, 320]
    assert [64 // o.shape[2] for o in outputs] == [4, 8, 16, 32]
    torch.testing.assert_close(
        backbone.layer2[1].depthwise_conv.bn.running_mean,
        trunk['features.3.conv.4.running_mean'],
    )


def test_check_sees_exchanged_weights(trunk):
    target = tool.map_keys(trunk)
    assert tool.check_trunk(trunk, target) < 1e-5
    a = 'layer3.1.linear_conv.bn.running_mean'
    b = 'layer3.2.linear_conv.bn.running_mean'
    target[a], target[b] = target[b] + 1, target[a]
    assert tool.check_trunk(trunk, target) > 1e-3


@pytest.mark.parametrize(
    'key',
    ['classifier.1.weight', 'features.30.0.weight', 'features.0.conv.0.weight']
    + ['features.3.0.weight', 'features.3.conv.2.weight'],
)
def test_foreign_key_is_named(key):
    with pytest.raises(tool.ConversionError, match=key):
        tool.map_keys({key: torch.zeros(1)})


@pytest.mark.parametrize('case', ['missing file', 'missing key', 'shape'])
def test_errors_write_nothing(trunk, tmp_path, caplog, case):
    source, target = tmp_path / 'a.pt', tmp_path / 'b.pth'
    if case == 'missing key':
        trunk.pop('features.4.conv.0.weight')
    elif case == 'shape':
        trunk['features.0.0.weight'] = torch.zeros(32, 1, 3, 3)
    if case != 'missing file':
        torch.save(trunk, source)
    assert tool.main([str(source), str(target)]) == 1
    assert 'error' in caplog.text and not target.exists()
