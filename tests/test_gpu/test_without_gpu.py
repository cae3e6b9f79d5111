"""The tests for a GPU, tried without one: known to run at all.

In a child process, since Triton's interpreter has to be chosen before Triton
is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import quick_python
import torch

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location('c', HERE / 'conftest.py')
SHARED = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(SHARED)


@pytest.mark.thorough
@pytest.mark.skipif(torch.cuda.is_available(), reason='they run by themselves')
def test_what_can_run_on_a_cpu(tmp_path):
    pytest.importorskip('triton')
    report = tmp_path / 'report.xml'
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-m', 'gpu', '-q'),
            *('-p', 'no:cacheprovider', f'--junitxml={report}', str(HERE)),
        ],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            SHARED.ON_CPU: '1',
            'TRITON_INTERPRET': '1',
            'OMP_NUM_THREADS': '1',
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    skipped, passed = {}, []
    for case in ElementTree.parse(report).iter('testcase'):
        reason = case.find('skipped')
        name = case.get('name')
        if reason is None:
            passed.append(name)
        else:
            skipped.setdefault(reason.get('message'), []).append(name)
    kinds = {name.partition('[')[0] for name in passed}
    # What is left is what the device at hand cannot do.
    assert kinds >= {
        'test_against_float64', 'test_autocast', 'test_no_queries',
        'test_any_strides', 'test_two_runs_agree_to_the_bit',
        'test_training_step', 'test_averaged_weights',
        'test_gradients_are_those_of_the_cpu', 'test_accumulated_steps',
        'test_evaluation_is_that_of_the_cpu', 'test_parameternet',
        'test_adapters',
    }  # fmt: skip
    assert set(skipped) == {
        SHARED.NO_GPU,
        'sampling computes in float32',
    }
    gone = {name.partition('[')[0] for name in skipped[SHARED.NO_GPU]} - kinds
    assert gone == {
        'test_compiled', 'test_on_another_stream', 'test_on_a_second_device',
        'test_cuda_graph', 'test_mixing_beyond_32_bits',
        'test_sampling_beyond_32_bits', 'test_compiled_detector',
        'test_export_of_a_model_on_the_gpu',
    }  # fmt: skip


def test_no_process_is_forked_where_there_is_a_gpu(monkeypatch):
    """What is forked after the hosts have asked for GPUs cannot use them."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert quick_python.start('gpu', os.getpid()) == sys.executable
