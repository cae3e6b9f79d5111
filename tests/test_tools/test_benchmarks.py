"""The benchmarks, in sizes that take no time."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmarks'
NAMES = (
    'adaptive_mixing', 'sampling_3d', 'decoder', 'detector', 'driver',
    'harness', 'models', 'original', 'report',
)  # fmt: skip
TINY = [
    '--device', 'cpu', '--size', 'tiny', '--models', 'lors',
    '--batch-sizes', '1', '--queries', '3', '--repeats', '2',
]  # fmt: skip


@pytest.fixture
def tools(monkeypatch):
    """Import modules of the benchmarks by name, and forget them after."""
    hidden = {name: sys.modules.pop(name, None) for name in NAMES}
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__
    for name, module in hidden.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def run(tools, tmp_path):
    """Run a benchmark; return the exit code and the rows."""

    def command(name, *options):
        code = tools(name).main([*TINY, *options, '--out-dir', str(tmp_path)])
        path = tmp_path / f'{name}_cpu.csv'
        if not path.exists():
            return code, None
        with path.open(newline='') as file:
            return code, list(csv.DictReader(file))

    return command


def select(rows, **values):
    return [r for r in rows if all(r[k] == v for k, v in values.items())]


def test_mixing_as_a_command(tmp_path):
    """The real command, with everything it writes."""
    command = [sys.executable, str(FOLDER / 'adaptive_mixing.py')]
    done = subprocess.run(
        [*command, *TINY, '--threads', '1', '--out-dir', str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert 'lors, batch 1, 3 queries' in done.stdout
    assert 'torch-recompute bfloat16' in done.stdout
    assert (tmp_path / 'adaptive_mixing_cpu.png').stat().st_size > 5000
    with (tmp_path / 'adaptive_mixing_cpu.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    wanted = {'original', 'reference', 'torch', 'torch-recompute', 'bare'}
    if rows[0]['cpu_kernels']:
        wanted.add('torch-plain')
    assert {row['provider'] for row in rows} == wanted
    assert {row['dtype'] for row in rows} == {'float32', 'bfloat16'}
    times = select(rows, metric='time')
    assert {row['mode'] for row in times} == {'forward', 'backward', 'full'}
    for row in times:
        low, middle, high = (float(row[k]) for k in ('p20', 'median', 'p80'))
        assert 0 < low <= middle <= high
        assert (row['unit'], row['repeats']) == ('ms', '2')
        assert (row['threads'], row['torch']) == ('1', torch.__version__)
        assert row['device'] == 'cpu' and row['device_name']
    config = json.loads(rows[0]['config'])
    assert (config['model'], config['batch'], config['queries']) == (
        'lors', 1, 3
    )  # fmt: skip
    for row in select(rows, provider='original', dtype='float32'):
        assert float(row['ratio_to_original']) == 1
    for row in select(rows, provider='torch', dtype='float32'):
        assert 0 < float(row['error']) < 1e-4
    kept = {
        row['provider']: float(row['median'])
        for row in select(rows, metric='kept for backward', dtype='float32')
    }
    assert kept['torch-recompute'] < kept['torch'] < kept['original']


def test_the_plain_lane_is_plain(tools, monkeypatch):
    harness = tools('harness')
    monkeypatch.setenv('LORS_PLUGIN_CPU_KERNELS', 'baseline')

    def run():
        return os.environ['LORS_PLUGIN_CPU_KERNELS']

    for plain, wanted in ((True, 'off'), (False, 'baseline')):
        lane = harness.Lane('any', run, {'x': torch.ones(1)}, plain=plain)
        assert lane.forward(False) == wanted
        assert run() == 'baseline'


@pytest.mark.parametrize(
    ('name', 'extra'),
    [
        ('sampling_3d', ['--memory-format', 'channels_last']),
        ('decoder', ['--dtypes', 'float32']),
        ('detector', ['--dtypes', 'float32', '--models', 'adamixer']),
    ],
)
def test_other_benchmarks(run, name, extra):
    code, rows = run(name, '--no-plots', '--repeats', '1', *extra)
    assert code == 0
    providers = {row['provider'] for row in rows}
    assert providers >= {'original', 'reference', 'torch'}
    assert ('torch-recompute' in providers) == (name == 'decoder')
    compiled = {row['cpu_kernels'] for row in rows} != {''}
    assert ('torch-plain' in providers) == (name == 'decoder' and compiled)
    assert {row['benchmark'] for row in rows} == {name}
    metrics = {'time', 'peak memory', 'kept for backward'}
    if name == 'detector':
        metrics.add('rate')
        (rate,) = select(rows, provider='torch', mode='full', metric='rate')
        (time,) = select(rows, provider='torch', mode='full', metric='time')
        product = float(rate['median']) * float(time['median'])
        assert product == pytest.approx(1000, rel=1e-3)
    assert {row['metric'] for row in rows} == metrics


def scaled(out):
    """Wrong values."""
    return out * 1.01


def steeper(out):
    """Right values, wrong gradients."""
    return out + 0.1 * (out - out.detach())


@pytest.mark.parametrize('spoil', [scaled, steeper])
@pytest.mark.parametrize('lane', ['torch', 'original'])
def test_no_timings_of_wrong_results(
    run, tools, monkeypatch, capsys, lane, spoil
):
    from lors_plugin.adamixer import mixing as layer

    owner, name = tools('original'), 'mixing'
    if lane == 'torch':
        owner, name = layer, 'generated_mixing'
    right = getattr(owner, name)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        backend = os.environ['LORS_PLUGIN_BACKEND']
        return spoil(out) if lane in (backend, 'original') else out

    monkeypatch.setattr(owner, name, wrong)
    code, rows = run(
        'adaptive_mixing', '--dtypes', 'float32', '--no-plots', '--no-memory'
    )
    assert (code, rows) == (1, None)
    error = capsys.readouterr().err
    assert 'no timings' in error
    assert f'{lane}, gradient of' in error


def test_modes_and_providers(run, capsys):
    code, rows = run(
        'adaptive_mixing', '--no-plots', '--no-memory', '--modes', 'forward',
        '--providers', 'original', 'torch', '--dtypes', 'bfloat16',
        '--clock', 'cpu',
    )  # fmt: skip
    assert code == 0
    assert {row['metric'] for row in rows} == {'cpu time'}
    assert {row['provider'] for row in rows} == {'original', 'torch'}
    assert {row['mode'] for row in rows} == {'forward'}
    assert {row['dtype'] for row in rows} == {'float32', 'bfloat16'}
    code, rows = run('sampling_3d', '--profile', 'torch')
    assert (code, rows) == (0, None)
    assert 'Self CPU' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--providers', 'triton'], 'triton: cannot run here'),
        (['--device', 'cuda'], 'sees no GPU'),
        (['--models', 'detr'], 'invalid choice'),
    ],
)
def test_what_cannot_be_measured(tools, monkeypatch, capsys, options, words):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(SystemExit) as error:
        tools('sampling_3d').main(['--device', 'cpu', *options])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_no_plain_lane_where_all_is_plain(tools, monkeypatch, capsys):
    monkeypatch.setenv('LORS_PLUGIN_CPU_KERNELS', 'off')
    command = ['--device', 'cpu', '--providers', 'torch-plain']
    with pytest.raises(SystemExit):
        tools('decoder').main(command)
    assert 'torch-plain: cannot run here' in capsys.readouterr().err


# --- the harness ---------------------------------------------------------


def make_lane(harness, run, provider='x', **kwargs):
    x = torch.ones(1000, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(1000))
    return harness.Lane(
        provider, lambda: run(x, weight), dict(x=x, weight=weight), **kwargs
    )


def test_saved_bytes(tools):
    """Each storage once, views as their storage, parameters not at all."""
    harness = tools('harness')
    lane = make_lane(harness, lambda x, w: [x * x * w])
    # x twice, x * x; the weight is a parameter.
    assert harness.saved_bytes(lane) == 8000
    lane = make_lane(harness, lambda x, w: [x[:10].exp() * x[10:20]])
    assert harness.saved_bytes(lane) == 4000 + 40
    lane = make_lane(harness, lambda x, w: [x + w])
    assert harness.saved_bytes(lane) == 0


def test_peak_memory(tools):
    harness = tools('harness')

    def work():
        a = torch.zeros(10**6)
        b = a + 1
        del a
        return b.exp()

    peak = harness.peak_memory(work, torch.device('cpu'))
    assert peak == pytest.approx(8e6, rel=0.01)


def test_lanes_take_turns_in_random_order(tools):
    harness = tools('harness')
    calls = []

    def lane(name):
        return make_lane(
            harness, lambda x, w: calls.append(name) or [x * 2], name
        )

    seconds = harness.time_lanes(
        [lane(name) for name in 'abc'], ['full'], torch.device('cpu'), 8
    )
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(turn) == list('abc') for turn in rounds)
    assert len(set(rounds)) > 2
    assert {len(seconds[name]['full']) for name in 'abc'} == {8}


def test_no_more_rounds_than_the_time_allows(tools):
    harness = tools('harness')
    lane = make_lane(harness, lambda x, w: [x * 2])
    seconds = harness.time_lanes(
        [lane], ['forward'], torch.device('cpu'), 50, budget=0.0
    )
    assert len(seconds['x']['forward']) == 3


def test_gate_in_half_precision(tools):
    """Twice the error of the reference in that precision is allowed."""
    harness = tools('harness')

    def lane(provider, factor, **kwargs):
        return make_lane(
            harness, lambda x, w: [x * factor], provider, **kwargs
        )

    def check(factor):
        lanes = [
            lane('reference', 1.0),
            lane('reference', 1.02, dtype='bfloat16'),
            lane('torch', factor, dtype='bfloat16'),
        ]
        return harness.check_lanes(lanes, 1e-3, 1e-3)

    assert check(1.039)['torch bf16'] == pytest.approx(0.039, rel=1e-3)
    with pytest.raises(harness.GateError, match='torch bf16, output 0'):
        check(1.05)
    with pytest.raises(harness.GateError):
        check(float('nan'))


def test_a_missing_gradient_is_a_difference(tools):
    harness = tools('harness')
    errors = harness.errors_of(
        {'a': torch.ones(2)}, {'a': torch.ones(2), 'b': torch.ones(2)}
    )
    assert errors == {'a': 0.0, 'b': float('inf')}


def test_lanes_without_room_are_not_trained(tools, monkeypatch, capsys):
    driver = tools('driver')
    monkeypatch.setattr(driver, 'free_memory', lambda device: 10 * 2**30)
    small, large = (
        make_lane(tools('harness'), lambda x, w: [x], name)
        for name in ('small', 'large')
    )
    needs = dict(small=2**30, large=9 * 2**30)
    driver.leave_out([small, large], needs, torch.device('cpu'))
    assert (small.trains, large.trains) == (True, False)
    assert 'large: training left out' in capsys.readouterr().out
