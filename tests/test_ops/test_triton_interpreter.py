"""The Triton kernels against the reference, under Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')
pytestmark = pytest.mark.slow

RUNNER = Path(__file__).with_name('triton_runner.py')
SPEC = importlib.util.spec_from_file_location('triton_runner', RUNNER)
CASES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(CASES)


@pytest.fixture(scope='module')
def errors():
    """Errors by case, from a process of its own."""
    done = subprocess.run(
        [sys.executable, str(RUNNER)],
        env={**os.environ, 'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def mixing(errors):
    return errors['mixing']


@pytest.fixture
def others(errors):
    return errors['others']


@pytest.mark.parametrize('kernels', ['steps', 'on chip'])
@pytest.mark.parametrize('case', list(CASES.MIXING))
def test_mixing_float32(mixing, case, kernels):
    errors = mixing[f'{case}: {kernels}']
    low_rank = CASES.MIXING[case][6:8]
    assert len(errors) == 3 + 3 * sum(k > 0 for k in low_rank)
    for name, (mine, _) in errors.items():
        assert mine < 2e-6, name


@pytest.mark.parametrize('case', CASES.HALF)
def test_mixing_float16_is_as_good_as_pytorch(mixing, case):
    for name, (mine, plain) in mixing[f'{case}: half'].items():
        assert mine < 2 * plain + 5e-4, name


def test_mixing_below_8_0(mixing):
    """There, backward is float32 between half inputs and results."""
    found = mixing['below 8.0']
    assert 'float32, short slices: False' in found
    for kind, errors in found.items():
        for name, (mine, plain) in errors.items():
            limit = 2e-6 if 'float32' in kind else plain + 2e-4
            assert mine < limit, (kind, name)


@pytest.mark.parametrize('case', list(CASES.SAMPLING))
def test_sampling_float32(others, case):
    for name, error in others[f'{case}: float'].items():
        assert error < 2e-6, name


def test_sampling_float16(others):
    for name, error in others['lors: half'].items():
        assert error < 1e-3, name


def test_points_far_away_read_zero(others):
    assert others['far away'] == dict(outside=0.0, inside=1.0, gradient=0.0)


def test_two_runs_agree_to_the_bit(others):
    assert others['repeated'] == 0.0


def test_public_functions_with_triton(others):
    assert len(others['public']) == 15
    for name, error in others['public'].items():
        assert error < 2e-6, name


def test_operators_are_registered_for_triton_too(others):
    """The compiler sees shapes, types and gradients as they will be."""
    assert others['opcheck'] == {
        name: ['SUCCESS']
        for name in (
            'mixing',
            'mixing_backward',
            'sampling',
            'sampling_backward',
        )
    }
    assert len(others['compiled']) == 9
    for name, error in others['compiled'].items():
        assert error < 2e-6, name
