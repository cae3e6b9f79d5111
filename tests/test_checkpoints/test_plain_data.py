"""Pickles of plain values are read, all others refused before they run."""

import collections
import os
import pickle

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lors_plugin.checkpoints import ConversionError, load_pickle_file


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PLAIN = dict(
    number=1.5,
    text='a',
    data=b'b',
    items=[None, (True, {3})],
    ordered=collections.OrderedDict(a=1),
    tensor=torch.arange(6.0).reshape(2, 3),
    half=torch.ones(2).half(),
    array=np.arange(3),
    scalar=np.float32(2.5),
)


@pytest.mark.parametrize('protocol', range(2, 6))
def test_plain_values(tmp_path, protocol):
    path = tmp_path / 'a.pkl'
    path.write_bytes(pickle.dumps(PLAIN, protocol))
    have = load_pickle_file(path)
    for name, value in PLAIN.items():
        if name in ('tensor', 'half', 'array'):
            assert_close(have[name], value)
        else:
            assert have[name] == value


@pytest.mark.parametrize('protocol', range(2, 6))
def test_code_runs_only_with_trust(tmp_path, protocol):
    path, mark = tmp_path / 'a.pkl', tmp_path / 'mark'
    path.write_bytes(pickle.dumps([Code(mark)], protocol))
    with pytest.raises(ConversionError, match=r'a\.pkl .*mkdir.*--trust'):
        load_pickle_file(path)
    assert not mark.exists()
    load_pickle_file(path, trust=True)
    assert mark.exists()


def test_code_in_the_storage_of_a_tensor(tmp_path):
    """PyTorch pickles storages by a function that unpickles by itself."""
    path, mark = tmp_path / 'a.pkl', tmp_path / 'mark'
    torch.save(Code(mark), tmp_path / 'inner.pth')
    inner = (tmp_path / 'inner.pth').read_bytes()
    head = b'ctorch.storage\n_load_from_bytes\n'
    data = pickle.dumps((inner,), protocol=2)[2:-1]
    path.write_bytes(b'\x80\x02' + head + data + b'R.')
    with pytest.raises(ConversionError, match='--trust'):
        load_pickle_file(path)
    assert not mark.exists()


@pytest.mark.parametrize('share', [0.0, 0.5, 0.95])
def test_half_a_file(tmp_path, share):
    data = pickle.dumps(PLAIN)
    path = tmp_path / 'a.pkl'
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConversionError, match=r'a\.pkl') as error:
        load_pickle_file(path)
    assert '\n' not in str(error.value)
