"""Memory in large pages."""

import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lors_plugin.ops import memory

LARGE = (2**23 + 3, 3)  # 100 MB, and no whole number of pages


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked for."""
    calls, advise = [], memory._advise()
    if advise is None:
        pytest.skip('a system without large pages')

    def note(*args):
        calls.append(args)
        return advise(*args)

    monkeypatch.setattr(memory, '_advise', lambda: note)
    return calls


@pytest.mark.parametrize('dtype', [None, torch.int16])
def test_memory_of_its_own(dtype, asked):
    like = torch.zeros(1)
    out = memory.new_large(like, LARGE, dtype)
    assert out.shape == LARGE and out.dtype == (dtype or torch.float32)
    assert (out.fill_(3) == 3).all()
    [(start, size, advice)] = asked
    assert advice == mmap.MADV_HUGEPAGE
    # Whole pages, and none of a neighbour's.
    assert start % mmap.PAGESIZE == size % mmap.PAGESIZE == 0
    assert 0 <= start - out.data_ptr() < mmap.PAGESIZE
    end = out.data_ptr() + out.nbytes
    assert 0 <= end - (start + size) < mmap.PAGESIZE


def test_small_ones_and_those_without_memory_are_left_alone(asked):
    like = torch.zeros(1)
    assert memory.new_large(like, (3, 2)).shape == (3, 2)
    assert memory.new_large(like.to('meta'), LARGE).is_meta
    with FakeTensorMode() as mode:
        assert memory.new_large(mode.from_tensor(like), LARGE).shape == LARGE
    assert not asked


def test_systems_without_large_pages(monkeypatch):
    monkeypatch.setattr(memory.sys, 'platform', 'darwin')
    memory._advise.cache_clear()
    try:
        assert memory._advise() is None
        assert memory.new_large(torch.zeros(1), LARGE).shape == LARGE
    finally:
        memory._advise.cache_clear()
