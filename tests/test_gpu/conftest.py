"""Tests for a GPU: ``pytest -m gpu``.

Without one they are skipped, but for a child process of
``test_without_gpu.py``: there the same tests run on the CPU where they can,
the kernels in Triton's interpreter and at tiny sizes.
"""

import os

import pytest
import torch

ON_CPU = 'LORS_GPU_TESTS_ON_CPU'
NO_GPU = 'needs a GPU that PyTorch can use'


def pytest_collection_modifyitems(items):
    """Mark all tests here, and skip what the device at hand cannot do.

    ``needs_gpu`` marks what is pointless or impossible on a CPU.
    """
    if torch.cuda.is_available():
        return
    on_cpu = os.environ.get(ON_CPU) == '1'
    for item in items:
        if not item.get_closest_marker('gpu'):
            continue
        if not on_cpu or item.get_closest_marker('needs_gpu'):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture
def device():
    """The GPU; the CPU where these tests are tried without one."""
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture
def poisoned():
    """New tensors hold NaN, so that what no kernel writes is seen."""
    kept = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(kept)


@pytest.fixture
def no_tf32():
    """Exact products and convolutions in float32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    kept = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = kept
