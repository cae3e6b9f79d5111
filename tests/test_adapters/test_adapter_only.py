"""Adapter-only checkpoints in real runners."""

import copy

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from lors_plugin.adapters import (
    AdapterFileError,
    inject_adapters,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.engine.checkpoint_fit import check_checkpoint

EMA = dict(type='EMAHook', momentum=0.5)
SCALE = 'backbone.0.used.rep_adapter.scale'


@pytest.fixture
def base(tmp_path, tiny):
    """A file of pretrained weights."""
    torch.manual_seed(3)
    path = tmp_path / 'base.pth'
    torch.save(dict(state_dict=tiny.Model(norm=True).state_dict()), path)
    return path


def build(tiny, tmp_path, base, name, adapter_only=True, **kwargs):
    kwargs['adapt'] = {
        **dict(adapter_only=adapter_only),
        **kwargs.get('adapt', {}),
    }
    kwargs.setdefault('model', dict(norm=True, pretrained=base))
    return tiny.make(tmp_path, name, **kwargs)


def read(path):
    return torch.load(path, weights_only=False)


def equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def outputs(tiny, model):
    model.eval()
    x = torch.stack([tiny.Numbers()[i]['x'] for i in range(8)])
    with torch.no_grad():
        return torch.stack(model(x))


@pytest.mark.parametrize('ema', [False, True])
def test_files_are_small_and_resumed_to_the_last_bit(
    tiny, tmp_path, base, ema
):
    def run(name, **kwargs):
        hooks = [copy.copy(EMA)] if ema else []
        return build(tiny, tmp_path, base, name, hooks=hooks, **kwargs)

    whole = run('whole', adapter_only=False)
    whole.train()
    small = run('small')
    small.train()
    first = tmp_path / 'small/epoch_1.pth'
    resumed = run('resumed', load_from=str(first), resume=True)
    resumed.train()
    equal(whole.model.state_dict(), small.model.state_dict())
    equal(whole.model.state_dict(), resumed.model.state_dict())

    plain = read(tmp_path / 'whole/epoch_2.pth')
    for name in ('small', 'resumed'):
        file = read(tmp_path / name / 'epoch_2.pth')
        assert is_adapter_checkpoint(file)
        keys = set(file['meta'][META]['keys'])
        assert keys == file['state_dict'].keys()
        assert SCALE in keys
        assert not any('used.weight' in key for key in keys)
        for key in keys:
            assert torch.equal(
                file['state_dict'][key], plain['state_dict'][key]
            )
        assert (
            file['optimizer']['state'].keys()
            == plain['optimizer']['state'].keys()
        )
        if ema:
            averaged = file['ema_state_dict']
            assert averaged.keys() == {'steps', *(f'module.{k}' for k in keys)}
            for key, value in averaged.items():
                assert torch.equal(value, plain['ema_state_dict'][key]), key


def test_hosts_that_have_other_names_in_files(tiny, tmp_path, base):
    """As MMPretrain's wrappers of timm and Hugging Face do."""

    def run(name, adapter_only, start=None):
        path = start and str(tmp_path / start)
        runner = build(
            tiny, tmp_path, base, name, adapter_only,
            model=dict(norm=True, pretrained=base, renamed=True),
            load_from=path, resume=bool(path),
        )  # fmt: skip
        runner.train()
        return runner.model.state_dict()

    whole = run('whole', False)
    assert SCALE.replace('backbone', 'trunk') in whole
    equal(whole, run('small', True))
    equal(whole, run('a', True, 'small/epoch_1.pth'))
    equal(whole, run('b', False, 'whole/epoch_1.pth'))
    file = read(tmp_path / 'small/epoch_2.pth')
    assert SCALE in file['state_dict']


def test_a_file_is_tested_on_the_base_of_init_cfg(tiny, tmp_path, base):
    build(tiny, tmp_path, base, 'a', hooks=[copy.copy(EMA)]).train()
    path = str(tmp_path / 'a/epoch_2.pth')
    runner = build(tiny, tmp_path, base, 'b', epochs=0, load_from=path)
    metrics = runner.test()
    model = tiny.Model(norm=True)
    model.load_state_dict(read(base)['state_dict'])
    load_adapter_checkpoint(model, path)
    equal(model.state_dict(), runner.model.state_dict())
    wanted = (outputs(tiny, model) - 1).square().mean().item()
    assert metrics['distance'] == pytest.approx(wanted)
    # With averaging in the config the averaged weights are tested too.
    runner = build(
        tiny,
        tmp_path,
        base,
        'c',
        epochs=0,
        load_from=path,
        hooks=[copy.copy(EMA)],
    )
    assert runner.test() == metrics


def test_a_base_that_the_config_names(tiny, tmp_path, base):
    """Instead of ``load_from``: resuming and testing replace that."""
    kwargs = dict(model=dict(norm=True), adapt=dict(base=str(base)))
    whole = build(tiny, tmp_path, base, 'a')
    whole.train()
    named = build(tiny, tmp_path, base, 'b', **copy.deepcopy(kwargs))
    named.train()
    equal(whole.model.backbone.state_dict(), named.model.backbone.state_dict())
    kwargs['load_from'] = str(tmp_path / 'b/epoch_1.pth')
    resumed = build(
        tiny, tmp_path, base, 'c', resume=True, **copy.deepcopy(kwargs)
    )
    resumed.train()
    equal(named.model.state_dict(), resumed.model.state_dict())
    runner = build(
        tiny, tmp_path, base, 'd', epochs=0, **copy.deepcopy(kwargs)
    )
    assert runner.test()['distance'] > 0


def test_whole_files_count_more_than_the_base(tiny, tmp_path, base):
    adapt = dict(base=str(base))
    whole = build(tiny, tmp_path, base, 'a', adapter_only=False, adapt=adapt)
    whole.train()
    resumed = build(
        tiny,
        tmp_path,
        base,
        'b',
        adapter_only=False,
        adapt=adapt,
        load_from=str(tmp_path / 'a/epoch_1.pth'),
        resume=True,
    )
    equal(whole.model.state_dict(), resumed.train().state_dict())


def test_load_from_is_recorded(tiny, tmp_path, base):
    kwargs = dict(model=dict(norm=True))
    whole = build(tiny, tmp_path, base, 'a', load_from=str(base), **kwargs)
    whole.train()
    first = str(tmp_path / 'a/epoch_1.pth')
    assert read(first)['meta'][META]['source'] == str(base)
    resumed = build(
        tiny, tmp_path, base, 'b', load_from=first, resume=True, **kwargs
    )
    resumed.train()
    equal(whole.model.state_dict(), resumed.model.state_dict())
    last = str(tmp_path / 'b/epoch_2.pth')
    assert read(last)['meta'][META]['source'] == str(base)
    tested = build(
        tiny, tmp_path, base, 'c', epochs=0, load_from=last, **kwargs
    )
    tested.test()
    equal(whole.model.state_dict(), tested.model.state_dict())
    base.rename(tmp_path / 'elsewhere.pth')
    lost = build(tiny, tmp_path, base, 'd', epochs=0, load_from=last, **kwargs)
    with pytest.raises(AdapterFileError, match='another base'):
        lost.test()


def test_the_best_file_is_small_too(tiny, tmp_path, base):

    runner = build(
        tiny,
        tmp_path,
        base,
        'a',
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                save_best='distance',
                rule='less',
                published_keys=['meta', 'state_dict'],
            )
        ),
        val_dataloader=dict(dataset=tiny.Numbers(), **tiny.LOADER),
        val_cfg=dict(),
        val_evaluator=[tiny.Distance()],
    )
    runner.train()
    names = sorted(p.name for p in (tmp_path / 'a').glob('best*.pth'))
    assert len(names) == 2  # and what is published of it
    for name in names:
        file = read(tmp_path / 'a' / name)
        assert is_adapter_checkpoint(file)
        assert ('message_hub' in file) == (name == names[1])


def test_another_base_is_refused(tiny, tmp_path, base):
    build(tiny, tmp_path, base, 'a').train()
    path = str(tmp_path / 'a/epoch_2.pth')
    torch.save(dict(state_dict=tiny.Model(norm=True).state_dict()), base)
    for name, options in (
        ('test', dict(epochs=0)),
        ('resume', dict(resume=True)),
    ):
        runner = build(tiny, tmp_path, base, name, load_from=path, **options)
        with pytest.raises(AdapterFileError, match='backbone.0.*init_cfg'):
            getattr(runner, 'test' if name == 'test' else 'train')()


def test_a_base_without_all_frozen_weights(tiny, tmp_path, base):
    state = read(base)['state_dict']
    del state['backbone.1.unused.bias']
    torch.save(dict(state_dict=state), base)
    runner = build(
        tiny,
        tmp_path,
        base,
        'a',
        model=dict(norm=True),
        adapt=dict(base=str(base)),
    )
    with pytest.raises(
        ValueError, match='lacks 1 of .*backbone.1.unused.bias'
    ):
        runner.train()


def test_statistics_of_frozen_norms_stay(tiny, tmp_path, base):
    runner = build(tiny, tmp_path, base, 'a')
    before = read(base)['state_dict']
    model = runner.train()
    for key, value in before.items():
        if key.startswith('backbone'):
            assert torch.equal(model.state_dict()[key], value), key


def test_norms_that_are_trained_are_in_the_file(tiny, tmp_path, base):
    options = dict(trainable=[r'\d\.norm'])
    runner = build(tiny, tmp_path, base, 'a', adapt=dict(options))
    model = runner.train()
    mean = model.backbone[1].norm.running_mean
    assert not torch.equal(mean, torch.zeros(6))
    file = read(tmp_path / 'a/epoch_2.pth')['state_dict']
    assert torch.equal(file['backbone.1.norm.running_mean'], mean)
    resumed = build(
        tiny,
        tmp_path,
        base,
        'b',
        adapt=dict(options),
        load_from=str(tmp_path / 'a/epoch_1.pth'),
        resume=True,
    )
    equal(model.state_dict(), resumed.train().state_dict())


class Unfreeze(Hook):
    """What a host's ``train()`` might do."""

    priority = 'VERY_HIGH'

    def __init__(self, what):
        self.what = what

    def before_train_epoch(self, runner):
        block = runner.model.backbone[0]
        if self.what == 'gradients':
            block.requires_grad_(True)
        else:
            block.used.weight.data.add_(1e-3)


def test_a_host_that_unfreezes(tiny, tmp_path, base):
    runner = build(tiny, tmp_path, base, 'a')
    runner.register_hook(Unfreeze('gradients'))
    after = runner.train().state_dict()
    for key, value in read(base)['state_dict'].items():
        if key.startswith('backbone'):
            assert torch.equal(after[key], value), key


def test_a_base_that_changes_all_the_same(tiny, tmp_path, base):
    runner = build(tiny, tmp_path, base, 'a')
    runner.register_hook(Unfreeze('values'))
    with pytest.raises(
        RuntimeError, match='1 frozen weights.*backbone.0.used.weight'
    ):
        runner.train()
    assert not list((tmp_path / 'a').glob('*.pth'))


def test_the_first_look_at_a_file(tiny, tmp_path, base):
    """What the tools check before anything starts."""
    build(tiny, tmp_path, base, 'a').train()
    path = str(tmp_path / 'a/epoch_2.pth')
    runner = build(tiny, tmp_path, base, 'b', epochs=0)
    assert check_checkpoint(runner.model, path, hooks=runner.hooks).complete
    with pytest.raises(ValueError, match='no lors_plugin.RepAdapterHook'):
        check_checkpoint(runner.model, path, hooks=[])
    with pytest.raises(ValueError, match='epoch_2.pth: .*another base') as e:
        check_checkpoint(tiny.Model(), path)
    assert 'lacks 10 of its entries (backbone.0.norm' in str(e.value)
    wider = tiny.Model(norm=True)
    wider.head = nn.Linear(6, 2)
    with pytest.raises(ValueError, match='head.weight .*number of classes'):
        check_checkpoint(wider, path)


def test_whole_files_of_other_adapters(tiny, tmp_path, base):
    build(tiny, tmp_path, base, 'a', adapter_only=False).train()
    path = str(tmp_path / 'a/epoch_2.pth')
    for options, match in (
        (dict(targets=[r'0\.used']), '1 layers .*backbone.1.used'),
        (dict(groups=1), '2 weights have another shape'),
    ):
        runner = build(
            tiny, tmp_path, base, 'b', epochs=0, adapt=options, load_from=path
        )
        with pytest.raises(ValueError, match=match):
            runner.test()


def test_whole_weights_with_adapters_need_the_hook(tiny, tmp_path):
    """Else what was trained would be left out, with a warning in the log."""
    model = tiny.Model()
    inject_adapters(model, targets=[r'\d\.used'], hidden_dims=4)
    path = tmp_path / 'whole.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    with pytest.raises(ValueError, match='adapters .* no lors_plugin.RepAd'):
        check_checkpoint(tiny.Model(), str(path), hooks=[])
    hooks = tiny.make(tmp_path, epochs=0).hooks
    assert check_checkpoint(tiny.Model(), str(path), hooks=hooks).complete
