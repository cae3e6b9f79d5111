"""The C++ code for CPUs: how it is built, checked, chosen and loaded."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

from lors_plugin.ops import adaptive_mixing, cpu_library
from lors_plugin.ops.adaptive_mixing import cpu_impl
from lors_plugin.ops.cpu_library import ENV_NAME, FILE, find_sets, load

X, WEIGHTS = torch.randn(1, 4, 1, 3, 4), torch.randn(1, 4, 1, 16 + 15)


@pytest.fixture(autouse=True)
def built(monkeypatch):
    monkeypatch.delenv(ENV_NAME, raising=False)
    if isinstance(find_sets(), str):
        pytest.skip(find_sets())


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder without C++ code or sources."""
    find_sets.cache_clear()
    monkeypatch.setattr(cpu_library, 'PACKAGE', tmp_path)
    yield tmp_path
    find_sets.cache_clear()


@pytest.fixture
def library(package, root):
    """The library in a package folder without sources."""
    shutil.copy(root / 'lors_plugin' / FILE, package / FILE)
    return package / FILE


@pytest.fixture
def sources(package, root, monkeypatch):
    """The sources in a package folder without the library."""
    flags = [*cpu_library.FLAGS, '-O0']  # nothing is computed with it
    monkeypatch.setattr(cpu_library, 'FLAGS', flags)
    shutil.copytree(root / 'lors_plugin' / 'csrc', package / 'csrc')
    return package / 'csrc'


def test_the_widest_set_that_runs(monkeypatch):
    running = [s.name for s in find_sets() if s.runs]
    assert load().name == running[0]
    assert running[-1] == 'baseline'
    monkeypatch.setenv(ENV_NAME, ' BASELINE')
    assert load().name == 'baseline'
    monkeypatch.setenv(ENV_NAME, 'off')
    assert load() is None
    monkeypatch.setenv(ENV_NAME, 'avx1024')
    with pytest.raises(RuntimeError, match="'avx1024' is none of .*baseline"):
        load()


def test_without_a_library(package, monkeypatch, caplog):
    assert load() is None and load() is None
    (record,) = caplog.records
    assert 'no C++ compiler' in record.message
    wanted = adaptive_mixing(X, WEIGHTS, backend='torch')
    assert torch.equal(adaptive_mixing(X, WEIGHTS), wanted)
    monkeypatch.setenv(ENV_NAME, 'baseline')
    with pytest.raises(RuntimeError, match="'baseline': there is no _cpu.so"):
        load()


def test_a_wheel_without_sources(library):
    assert isinstance(find_sets(), list)


def cut(content):
    return content[: len(content) // 2]


DAMAGE = {
    'cut': cut,
    'without its end': lambda content: content[:-1],
    'one bit': lambda c: c[:5000] + bytes([c[5000] ^ 1]) + c[5001:],
    'a page of zeros': lambda c: c[:8192] + bytes(4096) + c[12288:],
    'longer': lambda c: c + b'\0',
    # What the original check took for whole: the hash of the sources.
    'cut but sealed': lambda c: c[:9000] + c[-cpu_library.SEAL_SIZE :],
    'text': lambda content: b'text',
    'empty': lambda content: b'',
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_library_is_never_loaded(damage, library, caplog):
    library.write_bytes(DAMAGE[damage](library.read_bytes()))
    assert 'damaged' in find_sets() and str(library) in find_sets()
    assert load() is None
    assert 'damaged' in caplog.text
    wanted = adaptive_mixing(X, WEIGHTS, backend='torch')
    assert torch.equal(adaptive_mixing(X, WEIGHTS), wanted)


@pytest.mark.parametrize('state', ['damaged', 'outdated'])
def test_a_checkout_compiles_what_it_needs(sources, root, state):
    file = sources.parent / FILE
    content = (root / 'lors_plugin' / FILE).read_bytes()
    file.write_bytes(cut(content) if state == 'damaged' else content)
    if state == 'outdated':
        source = sources / 'mixing.cpp'
        source.write_text(source.read_text() + '// changed\n')
    assert find_sets()[-1].name == 'baseline'
    assert {p.name for p in sources.parent.iterdir()} == {'csrc', FILE}
    digest = cpu_library.hash_sources(sources)
    assert cpu_library.read_seal(file) == (digest, '')
    before = file.stat().st_mtime_ns
    find_sets.cache_clear()
    find_sets()
    assert file.stat().st_mtime_ns == before


def test_a_checkout_that_does_not_compile(sources, monkeypatch):
    (sources / 'mixing.cpp').write_text('#error "broken here"')
    found = find_sets()
    assert '_cpu.so cannot be compiled' in found and 'broken here' in found
    assert {p.name for p in sources.parent.iterdir()} == {'csrc'}
    monkeypatch.setenv('PATH', str(sources))
    monkeypatch.delenv('CXX', raising=False)
    find_sets.cache_clear()
    assert 'there is no C++ compiler here' in find_sets()


def test_sealing_twice_is_sealing_once(library):
    content = library.read_bytes()
    cpu_library.seal(library, '0' * 16)
    assert len(library.read_bytes()) == len(content)
    assert cpu_library.read_seal(library) == ('0' * 16, '')


FORK = """
import os, signal, torch
from lors_plugin.ops import adaptive_mixing

x = torch.randn(1, 8, 2, 6, 8, requires_grad=True)
weights = torch.randn(1, 8, 2, 64 + 5 * 6)

def mix():
    out = adaptive_mixing(x, weights, backend='cpu')
    (grad,) = torch.autograd.grad(out.sum(), x)
    return torch.cat([out.detach().flatten(), grad.flatten()])

torch.set_num_threads(2)
wanted = mix()
child = os.fork()
if not child:
    signal.alarm(60)
    torch.set_num_threads(2)
    os._exit(0 if torch.equal(mix(), wanted) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_child_mixes_in_one_thread():
    """The threads of OpenMP are gone there, and would be waited for."""
    subprocess.run([sys.executable, '-c', FORK], check=True, timeout=240)


def test_structures_have_no_padding():
    """Fields of eight bytes, so that C++ and ctypes agree on any machine."""

    def fields(structure):
        return sum(
            fields(kind) if hasattr(kind, '_fields_') else 1
            for _, kind in structure._fields_
        )

    size = ctypes.sizeof(cpu_impl._Mixing)
    assert size == 8 * fields(cpu_impl._Mixing)
