"""Ways to tune: what each trains, its files, its merged model."""

import pytest
import torch
from torch import nn

from lors_plugin.adapters import (
    AdapterBank,
    LoRA,
    adapter_checkpoint,
    adapters_of,
    inject_adapters,
    load_adapter_checkpoint,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

LORA = dict(method='lora', targets=[r'\d\.used'], rank=2, alpha=3.0)
# What of the tiny model's backbone is trained by each method.
METHODS = dict(
    lora=(LORA, [f'{i}.used.lora.{x}' for i in '01' for x in 'AB']),
    bitfit=(
        dict(method='bitfit'),
        [f'{i}.{x}.bias' for i in '01' for x in ('norm', 'used', 'unused')],
    ),
    norm=(
        dict(method='norm'),
        [f'{i}.norm.{x}' for i in '01' for x in ('weight', 'bias')],
    ),
    linear_probe=(dict(method='linear_probe'), []),
)


def trained(model):
    return {k for k, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('method', METHODS)
def test_train_save_resume_and_test(tiny, tmp_path, method):
    """The same hook, table and small files for every method."""
    options, keys = METHODS[method]
    options = dict(options, adapter_only=True)
    model = dict(norm=True)
    hooks = [dict(type='CheckpointHook', interval=1)]
    runner = tiny.make(tmp_path, 'a', 2, options, model=model)
    wanted = runner.train()
    head = {'head.weight', 'head.bias'}
    assert trained(wanted) == {f'backbone.{k}' for k in keys} | head
    file = torch.load(tmp_path / 'a' / 'epoch_2.pth', weights_only=False)
    params = {k for k in file['state_dict'] if k in trained(wanted)}
    assert params == trained(wanted)
    assert file['meta'][META]['version'] == 2
    assert file['meta'][META]['options']['method'] == method

    again = tiny.make(tmp_path, 'b', 2, options, model=model, hooks=hooks)
    again._resume, again._load_from = True, str(tmp_path / 'a/epoch_1.pth')
    resumed = again.train()
    for key, value in wanted.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value)

    base = tiny.Model(norm=True)
    base.load_state_dict(wanted.state_dict(), strict=False)
    load_adapter_checkpoint(base, file)
    x = [torch.randn(6) for _ in range(4)]
    with torch.no_grad():
        before = torch.stack(wanted.eval()(x))
        assert torch.equal(torch.stack(base.eval()(x)), before)
        count = reparameterize(base)
        assert count == len(adapters_of(wanted))
        torch.testing.assert_close(torch.stack(base(x)), before)
    assert not adapters_of(base)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False)
    )


@pytest.mark.parametrize('bias', [False, True])
@torch.no_grad()
def test_lora_by_the_formula(bias):
    model = layers().eval()
    options = dict(rank=3, alpha=6.0, bias=bias)
    inject_adapters(model, '', ['0', '2'], method='lora', **options)
    x = torch.randn(5, 8)
    assert torch.equal(model(x), layers().eval()(x))
    randomize(model)
    for adapter in adapters_of(model).values():
        adapter.scale.fill_(2.0)
    wanted = x
    for layer in (model[0], None, model[2]):
        if layer is None:
            wanted = model[1](wanted)
            continue
        lora = layer.lora
        shift = lora.bias if bias else 0
        update = wanted @ (lora.B @ lora.A).T + shift
        wanted = nn.functional.linear(wanted, layer.weight, layer.bias)
        wanted = wanted + 2 * update
    torch.testing.assert_close(model(x), wanted)
    assert reparameterize(model) == 2
    torch.testing.assert_close(model(x), wanted)


def test_ranks_and_alphas_per_layer():
    model = layers()
    inject_adapters(
        model, '', ['0', '2'], method='lora', rank=4, alpha=8.0,
        rank_pattern={'2': 2}, alpha_pattern={'0': 2.0},
    )  # fmt: skip
    assert [len(m.A) for m in adapters_of(model).values()] == [4, 2]
    assert [m.scale.item() for m in adapters_of(model).values()] == [0.5, 4.0]
    other = layers()
    load_adapter_checkpoint(other, adapter_checkpoint(model))
    assert [len(m.A) for m in adapters_of(other).values()] == [4, 2]


def test_dropout_of_the_input_in_training_only():
    lora = randomize(LoRA(8, 6, dropout=0.5))
    layer, x = nn.Linear(8, 6), torch.ones(200, 8)
    lora.train()
    assert not torch.equal(lora(layer, x), lora(layer, x))
    lora.eval()
    assert torch.equal(lora(layer, x), lora(layer, x))


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(method='dora'), "method='dora' must be one of .*'lora'"),
        (dict(method='lora', scale=2), "'lora' has no option 'scale'.*alpha"),
        (dict(rank=2), "'rep_adapter' has no option 'rank'.*hidden_dims"),
        (dict(method='norm', targets='0'), 'adapts no layers; leave out targ'),
        (dict(method='bitfit', placement='attn'), 'leave out placement'),
        (dict(method='lora', targets='0', rank=0), 'rank=0 must be'),
        (
            dict(method='lora', targets='0', rank_pattern={'3': 2}),
            "rank_pattern: '3' fits none of the adapted layers",
        ),
        (dict(method='lora', targets='0', rank_pattern=3), 'rank_pattern=3 '),
        (
            dict(method='lora', targets='0', alpha_pattern={'[': 1}),
            r"alpha_pattern: '\[' is no regular",
        ),
        # True in Python, and PEFT's option of this name takes such words.
        (dict(method='lora', targets='0', bias='none'), "bias='none' must"),
        (dict(targets=[]), r'targets=\[\] must be a list'),
        (dict(targets=5), 'targets=5 must be a list'),
        (dict(exclude=5, targets='0'), 'exclude=5 must be a list'),
        (
            dict(method='linear_probe', trainable='3'),
            "'3' matches no parameter",
        ),
    ],
)
def test_bad_options(options, match):
    model = layers()
    with pytest.raises(ValueError, match=match):
        inject_adapters(model, '', **options)
    assert not adapters_of(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('use', [inject_adapters, AdapterBank])
def test_no_model(use):
    with pytest.raises(ValueError, match='None is no model'):
        use(None)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match='nothing .* trained'):
        inject_adapters(layers(), '', method='linear_probe')
