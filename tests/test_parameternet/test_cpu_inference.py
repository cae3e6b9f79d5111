"""The conversion for inference computes what the modules compute."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lors_plugin.parameternet import cpu_inference
from lors_plugin.parameternet.backbone import ParameterNet
from lors_plugin.parameternet.cpu_inference import can_convert, is_converted
from lors_plugin.parameternet.dynamic_conv import DynamicConv2d
from lors_plugin.parameternet.expert_usage import ExpertUsage
from lors_plugin.parameternet.ghost import ConvNorm, GhostBottleneck
from lors_plugin.reparam import MergeError, reparameterize, unmerge
from lors_plugin.testing import randomize

# Five blocks, the stem and the last 1x1.
BLOCKS = 6
OPTIONS = {
    'GhostNet': dict(num_experts=1),
    'dynamic': dict(num_experts=4),
    'softmax': dict(num_experts=3, routing='softmax_mlp', temperature=3.0),
    'SiLU': dict(act_cfg=dict(type='SiLU')),
    'no stride': dict(act_cfg=dict(type='ReLU', inplace=True), stem_stride=1),
    'branches': dict(conv='rep'),
    'SyncBN': dict(norm_cfg=dict(type='SyncBN')),
}


def check(model, x, tolerance=1e-5):
    """Convert, compare and convert back; return the converted copy."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(x)
        assert reparameterize(model) >= BLOCKS
        converted = copy.deepcopy(model)
        found = model(x)
        assert reparameterize(model) == 0
        assert unmerge(model) >= BLOCKS
        again = model(x)
    for old, new, back in zip(wanted, found, again):
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        # Different images, or the routing would not be seen.
        assert len(x) == 1 or old.std(0).mean() > 1e-5
        assert (new - old).abs().max() <= tolerance * old.abs().max()
        assert torch.equal(back, old)
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    return converted


@pytest.mark.parametrize(
    ('batch', 'size'), [(3, (32, 28)), (1, (33, 45)), (1, (1, 1))], ids=str
)
@pytest.mark.parametrize('name', OPTIONS)
def test_equals_the_modules(tiny, name, batch, size):
    options = dict(OPTIONS[name])
    norm_cfg = options.pop('norm_cfg', None)
    model = tiny(torch.float32, **options)
    if norm_cfg:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    x = torch.randn(batch, 3, *size)
    converted = check(model, x)
    for kind in (nn.BatchNorm2d, nn.SyncBatchNorm, DynamicConv2d):
        assert not any(isinstance(m, kind) for m in converted.modules())


@pytest.mark.parametrize('outputs', [(0,), (1, -1), (2, 0)], ids=str)
def test_outputs_of_stages(tiny, outputs):
    model = tiny(torch.float32)
    model.out_indices = tuple(i % 4 for i in outputs)
    check(model, torch.randn(2, 3, 30, 27))


@pytest.mark.parametrize('memory', ['channels_last', 'strided', 'expanded'])
def test_images_of_any_strides(tiny, memory):
    x = torch.randn(2, 3, 64, 64)
    if memory == 'channels_last':
        x = x.contiguous(memory_format=torch.channels_last)
    elif memory == 'strided':
        x = x[:, :, ::2, 1::2]
    else:
        x = torch.cat([x[:1].expand(2, -1, -1, -1), x[1:]])
    before = x.clone()
    check(tiny(torch.float32), x)
    assert torch.equal(x, before)


def test_channels_last_weights(tiny):
    model = tiny(torch.float32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 28)
    check(model, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_other_types(tiny, dtype):
    x = torch.randn(2, 3, 32, 28).to(dtype)
    check(tiny(dtype), x, 1e-12 if dtype == torch.float64 else 0.1)


def test_a_batch_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr(cpu_inference, 'CHUNK_PIXELS', 2 * 32 * 32)
    check(tiny(torch.float32), torch.randn(5, 3, 32, 32))


@pytest.mark.parametrize('batch', [0, 1, 2])
def test_results_are_contiguous(tiny, batch):
    model = tiny(torch.float32)
    reparameterize(model)
    with torch.no_grad():
        outs = model(torch.randn(batch, 3, 32, 32))
    assert all(out.is_contiguous() and len(out) == batch for out in outs)


def test_results_stay(tiny):
    """Nothing is written into what earlier calls returned."""
    model = tiny(torch.float32)
    reparameterize(model)
    with torch.no_grad():
        first = model(torch.randn(2, 3, 32, 32))
        kept = [out.clone() for out in first]
        model(torch.randn(2, 3, 32, 32))
    assert_close(list(first), kept, rtol=0, atol=0)


def test_experts_with_a_bias():
    """Mixed with the experts, while the shift of the norm is not."""
    for experts in (1, 3):
        conv = DynamicConv2d(
            4, 6, 3, padding=1, bias=True, num_experts=experts
        )
        block = ConvNorm(conv, 6, dict(type='BN'))
        model = randomize(nn.Sequential(block)).eval()
        x = torch.randn(3, 4, 7, 6)
        with torch.no_grad():
            wanted = model(x)
            assert reparameterize(model) == 1
            assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_inside_a_larger_model(tiny):
    model = nn.ModuleDict(dict(backbone=tiny(torch.float32))).eval()
    assert reparameterize(model) == BLOCKS
    assert not any(isinstance(m, GhostBottleneck) for m in model.modules())
    assert not any(p.requires_grad for p in model['backbone'].parameters())
    assert unmerge(model) == BLOCKS
    assert all(p.requires_grad for p in model.parameters())


def test_refuses_training(tiny):
    model = tiny(torch.float32)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    reparameterize(model)
    with pytest.raises(RuntimeError, match=r'training mode.*unmerge\(model\)'):
        model.train()
    with pytest.raises(RuntimeError, match=r'gradients.*unmerge\(model\)'):
        model(x)
    model.eval()
    unmerge(model)
    model.train()(x)[0].sum().backward()


def test_what_cannot_be_converted(tiny):
    model = tiny(torch.float32)
    with pytest.raises(MergeError, match='training mode'):
        reparameterize(model.train())
    model.eval().stem.conv.register_forward_hook(lambda *_: None)
    with pytest.raises(MergeError, match='stem.*hook'):
        reparameterize(model)
    assert not any(map(is_converted, model.modules()))
    model.stem.conv._forward_hooks.clear()
    with torch.no_grad():
        model.stem.norm.weight[0] = torch.nan
    with pytest.raises(MergeError, match='stem.*not finite'):
        reparameterize(model)


@pytest.mark.parametrize(
    'norm_cfg',
    [
        dict(type='GN', num_groups=2),
        dict(type='BN', track_running_stats=False),
    ],
    ids=str,
)
def test_other_norms_stay(norm_cfg):
    rows = [[(3, 16, 16, 0, 1)], [(3, 48, 24, 0.25, 2)]]
    model = ParameterNet(dict(rows=rows), norm_cfg=norm_cfg).eval()
    assert not any(map(can_convert, model.modules()))
    assert reparameterize(model) == 0


def test_convert_is_optional(tiny):
    model = tiny(torch.float32, conv='rep')
    reparameterize(model, convert=False)
    assert not any(map(is_converted, model.modules()))
    # Branches have merged; the rest is converted now.
    assert reparameterize(model) == BLOCKS


def test_the_config_can_ask_for_it(tiny):
    """Weights of a converted model fit strictly, those of training do not."""
    model = tiny(torch.float32)
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 32, 28)
    reparameterize(model)
    arch = dict(
        width=0.5,
        rows=[
            [(3, 16, 16, 0, 1)],
            [(3, 50, 22, 0, 2)],
            [(5, 72, 40, 0.25, 2), (3, 120, 40, 0.25, 1)],
        ],
    )
    built = ParameterNet(arch, out_indices=(1, -1), deploy=True)
    with pytest.raises(RuntimeError, match='Missing key'):
        built.load_state_dict(other.state_dict())
    built.load_state_dict(model.state_dict())
    built.init_weights()
    with torch.no_grad():
        assert_close(built(x), model(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='deploy=True'):
        built.train()


def test_copies_files_and_compilers():
    rows = [[(3, 16, 16, 0, 1)], [(3, 24, 16, 0.25, 2)]]
    model = randomize(ParameterNet(dict(rows=rows))).eval()
    x = torch.randn(2, 3, 32, 28)
    reparameterize(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = dict(
        copy=copy.deepcopy(model),
        file=torch.load(file, weights_only=False),
        traced=torch.jit.trace(model, x),
        exported=torch.export.export(model, (x,)).module(),
        compiled=torch.compile(model, fullgraph=True, backend='aot_eager'),
    )
    x = torch.randn(2, 3, 32, 28)
    with torch.no_grad():
        wanted = model(x)
        for name, other in others.items():
            assert_close(other(x), wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_experts_in_use_are_recorded(tiny):
    """The routers are still there, and still called."""
    model = tiny(torch.float32)
    x = torch.randn(3, 3, 32, 28)
    results = []
    for _ in range(2):
        with torch.no_grad(), ExpertUsage(model) as usage:
            model(x)
        results.append(list(usage.result().values()))
        reparameterize(model)
    assert len(results[0]) == len(results[1]) > 10
    for old, new in zip(*results):
        assert new.shares == pytest.approx(old.shares, abs=1e-4)
