"""tools/benchmarks: every case at a tiny size, and what guards the numbers."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import harness
import pytest
import torch

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / 'tools' / 'benchmarks'
QUICK = ['--quick', '--device', 'cpu', '--threads', '1', '--repeats', '1']


def read(folder):
    with (folder / 'benchmarks.csv').open(newline='') as file:
        return list(csv.DictReader(file))


def select(rows, **values):
    return [r for r in rows if all(r[k] == v for k, v in values.items())]


@pytest.fixture(scope='module')
def quick(several):
    """All cases at once: what was printed, the rows, and where they are."""
    results, folder = several
    code, text, error = results['quick']
    assert code == 0, error
    return text, read(folder / 'quick'), folder / 'quick'


@pytest.mark.parametrize(
    ('case', 'names'),
    [
        ('mixing', {'original', 'torch', 'recompute', 'products'}),
        ('sampling', {'original', 'torch'}),
        ('decoder', {'original', 'torch', 'with_cp'}),
        ('detector', {'original', 'torch'}),
        ('parameternet', {'original', 'torch', 'converted'}),
        ('vit_adapters', {'plain', 'adapted', 'merged'}),
        ('coco_evaluation', {'pycocotools', 'faster-coco-eval'}),
        ('onnx_latency', {'MobileNetV2'}),
    ],
)
def test_every_case_at_a_tiny_size(quick, case, names):
    text, rows, folder = quick
    rows = select(rows, case=case)
    assert {row['implementation'] for row in rows} == names
    assert f'{case}: ' in text
    assert (folder / f'{case}.png').stat().st_size > 5000
    times = select(rows, metric='time')
    assert times
    for row in times:
        low, middle, high = (float(row[k]) for k in ('p20', 'median', 'p80'))
        assert 0 < low <= middle <= high
        assert (row['unit'], row['threads']) == ('ms', '1')
        assert row['torch'] == torch.__version__
        assert row['device'] == 'cpu' and row['device_name']
    training = {row['implementation'] for row in select(times, mode='full')}
    is_model = case not in ('coco_evaluation', 'onnx_latency')
    untrained = {'converted', 'merged'}
    assert training == (names - untrained if is_model else set())
    for row in select(times, implementation='original'):
        assert float(row['ratio']) == 1
    for row in select(times, implementation='merged'):
        assert 0 < float(row['error']) < 1e-3
    for row in select(times, implementation='torch'):
        assert 0 <= float(row['error']) < 1e-2


def test_what_a_report_says_besides(quick):
    _, rows, _ = quick
    config = json.loads(select(rows, case='mixing')[0]['config'])
    assert (config['model'], config['batch'], config['queries']) == (
        'lors', 2, 5
    )  # fmt: skip
    kept = {
        row['implementation']: float(row['median'])
        for row in select(rows, case='mixing', metric='kept for backward')
    }
    assert kept['recompute'] < kept['torch'] < kept['original']
    wanted = dict(case='detector', implementation='torch', mode='full')
    (rate,) = select(rows, metric='rate', **wanted)
    (time,) = select(rows, metric='time', **wanted)
    images = float(rate['median']) * float(time['median']) / 1000
    assert images == pytest.approx(2, rel=1e-3)
    (size,) = select(rows, metric='parameters', implementation='MobileNetV2')
    assert float(size['median']) == pytest.approx(3.504872, rel=1e-5)


# Runs several commands in one process, where sampling is wrong on demand.
SEVERAL = """
import contextlib, io, json, os, sys, torch
import lors_plugin.ops as ops
right, spoil = ops.sampling_3d, None

class Steeper(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, grad: grad * 1.1)

def sampling_3d(*args):
    out = right(*args)
    if spoil is None or os.environ['LORS_PLUGIN_BACKEND'] != 'torch':
        return out
    return out * 1.01 if spoil == 'value' else Steeper.apply(out)

ops.sampling_3d = sampling_3d
import run
sys.executable = sys.argv[2]  # that of another commit imports anew
results = {}
for name, (spoil, argv) in json.loads(sys.argv[1]).items():
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run.main(argv)
        except SystemExit as error:
            code = error.code
    results[name] = code, out.getvalue(), err.getvalue()
print('RESULTS' + json.dumps(results))
"""
SAMPLING = ['sampling', *QUICK, '--models', 'lors', '--output']
WRONG = dict(
    value='torch, output',
    gradient='torch, gradient of level',
)  # what is spoiled, and what the error says
ALL = [
    *QUICK,
    *('--models', 'lors', '600m', 'vit-b', 'coco-val', 'imagenet'),
    *('--implementations', 'original', 'torch', 'recompute', 'products'),
    *('plain', 'adapted', 'merged'),
    *('converted', 'with_cp', 'faster-coco-eval', 'pycocotools'),
    *('MobileNetV2', '--output', 'quick'),
]
REFUSED = {
    'no case': (['mixin'], "no case 'mixin'"),
    'triton': (['sampling', '--implementations', 'triton'], 'triton'),
    'compiled': (['mixing', '--implementations', 'compiled'], 'runs here'),
    'no model': (['sampling', '--models', '600m'], 'no case has such a model'),
    'no checkout': (['mixing', '--against', 'nowhere'], 'no checkout'),
    'no threads': (['mixing', '--threads', '0'], 'must be at least 1'),
}


@pytest.fixture(scope='module')
def several(quick_python, tmp_path_factory):
    """Exit code, output and errors of commands, and where they ran."""
    folder = tmp_path_factory.mktemp('several')
    root = str(FOLDER.parents[1])
    commands = dict(
        quick=(None, ALL),
        list=(None, ['--list']),
        against=(None, [*SAMPLING, 'against', '--against', root]),
    )
    for kind in WRONG:
        commands[kind] = kind, [*SAMPLING, kind]
    for name, options in gpu_check.BENCHMARKS.items():
        plan = None, [*options, '--device', 'cpu', '--list']
        commands[f'plan {name}'] = plan
    for name, (options, _) in REFUSED.items():
        commands[name] = None, ['--device', 'cpu', *options]
    # Scripts import neighbours by their names.
    paths = [str(FOLDER), root, os.environ.get('PYTHONPATH', '')]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
    environment.pop('TRITON_INTERPRET', None)
    done = subprocess.run(
        [quick_python, '-c', SEVERAL, json.dumps(commands), sys.executable],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition('RESULTS')[2]), folder


def test_against_another_commit(several):
    results, folder = several
    code, text, error = results['against']
    assert code == 0, error
    rows = read(folder / 'against')
    there = f'torch@{FOLDER.parents[1].name}'
    assert {row['implementation'] for row in rows} == {
        'reference', 'original', 'torch', there
    }  # fmt: skip
    for row in select(rows, implementation=there):
        (twin,) = select(
            rows,
            implementation='torch',
            mode=row['mode'],
            metric=row['metric'],
        )
        assert row['repeats'] == twin['repeats'] and float(row['ratio']) > 0
        if row['metric'] == 'kept for backward':
            assert row['median'] == twin['median']
        assert 0 < float(row['error']) < 1e-5


@pytest.mark.parametrize('kind', WRONG)
def test_nothing_is_timed_that_is_wrong(several, kind):
    results, folder = several
    code, _, error = results[kind]
    assert code == 1
    assert 'error: sampling, lors, batch 2, 5 queries' in error
    assert 'no timings' in error and WRONG[kind] in error
    assert not (folder / kind).exists()


def test_list(several):
    code, text, _ = several[0]['list']
    assert code == 0
    for name in ('mixing', 'sampling', 'decoder', 'detector', 'parameternet',
                 'coco_evaluation', 'onnx_latency'):  # fmt: skip
        assert f'{name}\n    ' in text
    assert 'implementations: reference, original, torch' in text


@pytest.mark.parametrize('name', gpu_check.BENCHMARKS)
def test_what_the_gpu_check_measures(several, name):
    """Its command lines are understood."""
    code, _, error = several[0][f'plan {name}']
    assert code == 0, error


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_measured(several, name):
    code, _, error = several[0][name]
    assert code == 2
    assert REFUSED[name][1] in error


# --- the harness ---------------------------------------------------------


def make(run, name='x', **options):
    x = torch.ones(1000, requires_grad=True)
    weight = torch.nn.Parameter(torch.ones(1000))
    return harness.Implementation(
        name, lambda: run(x, weight), dict(x=x, weight=weight), **options
    )


@pytest.mark.parametrize(
    ('run', 'wanted'),
    [
        # x twice and x * x; the weight is a parameter.
        (lambda x, w: [x * x * w], 8000),
        (lambda x, w: [x[:10].exp() * x[10:20]], 4000 + 40),
        (lambda x, w: [x + w], 0),
    ],
    ids=['storages once', 'views as storage', 'nothing'],
)
def test_saved_bytes(run, wanted):
    assert make(run).saved_bytes() == wanted


def test_peak_memory():
    def work():
        a = torch.zeros(10**6)
        b = a + 1
        del a
        return b.exp()

    peak = harness.peak_memory(work, torch.device('cpu'))
    assert peak == pytest.approx(8e6, rel=0.01)


def test_turns_in_random_order():
    calls = []

    def each(name):
        return make(lambda x, w: calls.append(name) or [x * 2], name)

    seconds = harness.time_in_turns([*map(each, 'abc')], ['full'], 8)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(turn) == list('abc') for turn in rounds)
    assert len(set(rounds)) > 2
    assert {len(seconds[name]['full']) for name in 'abc'} == {8}


def test_no_more_rounds_than_the_budget_allows():
    each = make(lambda x, w: [x * 2])
    seconds = harness.time_in_turns([each], ['forward'], 50, budget=0.0)
    assert len(seconds['x']['forward']) == 3


def test_gate_in_half_precision():
    """Twice the error of the reference in that precision is allowed."""

    def check(factor):
        def times(factor, name, dtype='float32'):
            return make(lambda x, w: [x * factor], name, dtype=dtype)

        return harness.check(
            [
                times(1.0, 'reference'),
                times(1.02, 'reference', 'bfloat16'),
                times(factor, 'torch', 'bfloat16'),
            ],
            1e-3,
            1e-3,
        )

    assert check(1.039)['torch bf16'] == pytest.approx(0.039, rel=1e-3)
    for factor in (1.05, float('nan')):
        with pytest.raises(harness.GateError, match='torch bf16, output 0'):
            check(factor)


def test_a_missing_gradient_is_wrong():
    implementations = [
        make(lambda x, w: [x * w], 'reference'),
        make(lambda x, w: [x * w.detach()], 'torch'),
    ]
    with pytest.raises(harness.GateError, match='gradient of weight: inf'):
        harness.check(implementations, 1e-3, 1e-3)
