import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lors_plugin.ops.cpu_library import hash_sources, read_seal

setuptools = pytest.importorskip('setuptools')

ROOT = Path(__file__).resolve().parents[1]
HOST = re.compile(r'(onedl-)?mm(engine|cv|det|detection|pretrain)\b')


@pytest.fixture
def setup_script(monkeypatch):
    """The names in setup.py and the keywords of its ``setup`` call."""
    keywords = {}
    monkeypatch.setattr(setuptools, 'setup', keywords.update)
    names = runpy.run_path(str(ROOT / 'setup.py'))
    return names, keywords


def test_no_host_distribution_is_required(setup_script):
    _, keywords = setup_script
    hosts = [r for r in keywords['install_requires'] if HOST.match(r)]
    assert hosts == []
    for extra, requirements in keywords['extras_require'].items():
        hosts = [r for r in requirements if HOST.match(r)]
        assert bool(hosts) == (extra == 'onedl'), extra


def test_requirements_have_lower_bounds_for_what_matters(setup_script):
    _, keywords = setup_script
    assert 'torch>=2.4' in keywords['install_requires']
    assert all('>=' in r for r in keywords['extras_require']['onedl'])
    assert keywords['python_requires'] == '>=3.10'


def test_version_is_that_of_the_package(setup_script):
    import lors_plugin

    _, keywords = setup_script
    assert keywords['version'] == lors_plugin.__version__


def test_links_of_the_description(setup_script, monkeypatch):
    """Relative ones lead nowhere outside the repository."""
    read = setup_script[0]['read_readme']
    relative = re.compile(r'\]\((?!\w+:|#)')
    assert relative.search((ROOT / 'README.md').read_text(encoding='utf-8'))
    plain = read()
    assert not relative.search(plain) and '![' not in plain
    assert 'with their configs:' in plain
    assert '](https://arxiv.org/abs/2203.16507)' in plain
    monkeypatch.setenv('LORS_PLUGIN_HOME', 'https://example.org/x/main/')
    linked = read()
    assert not relative.search(linked)
    assert '](https://example.org/x/main/docs/en/model_zoo.md)' in linked
    assert '](https://example.org/x/main/docs/images/' in linked


@pytest.mark.parametrize('link', [True, False], ids=['link', 'copy'])
def test_place_mim_items(setup_script, tmp_path, link):
    place = setup_script[0]['place_mim_items']
    target = tmp_path / '.mim'
    target.mkdir()
    (target / 'stale').write_text('x')
    place(target, link)
    place(target, link)
    assert not (target / 'stale').exists()
    assert (target / 'tools' / 'train.py').is_file()
    assert (target / 'tools').is_symlink() == link
    assert (ROOT / 'tools' / 'train.py').is_file()


def test_what_measures_this_project_is_not_installed(setup_script, tmp_path):
    setup_script[0]['place_mim_items'](tmp_path / '.mim', False)
    kept = {path.name for path in (tmp_path / '.mim' / 'tools').iterdir()}
    there = {path.name for path in (ROOT / 'tools').iterdir()}
    left_out = there - kept - {'__pycache__'}
    assert left_out == {
        'benchmarks', 'build_docs.sh', 'gpu_check.sh', 'lint',
        'quickstart.sh', 'run_tests.sh', 'setup_env.sh', 'studies',
    }  # fmt: skip
    assert list((tmp_path / '.mim' / 'configs').rglob('*.py'))


def test_place_mim_items_without_a_model_index(
    setup_script, tmp_path, monkeypatch
):
    place = setup_script[0]['place_mim_items']
    monkeypatch.setitem(place.__globals__, 'ROOT', tmp_path)
    (tmp_path / 'configs').mkdir()
    place(tmp_path / '.mim', False)
    assert [p.name for p in (tmp_path / '.mim').iterdir()] == ['configs']


def test_every_module_is_in_a_package(setup_script):
    """A folder without ``__init__.py`` would be left out of the wheel."""
    _, keywords = setup_script
    folders = {
        '.'.join(path.relative_to(ROOT).parts[:-1])
        for path in (ROOT / 'lors_plugin').rglob('*.py')
        if '.mim' not in path.parts
    }
    assert sorted(folders - set(keywords['packages'])) == []


@pytest.mark.slow
@pytest.mark.parametrize('compiler', ['', 'false'], ids=['any', 'failing'])
def test_wheel(tmp_path, compiler):
    """Configs, tools, and compiled code where there is a compiler."""
    source = tmp_path / 'source'
    ignored = shutil.ignore_patterns(
        '__pycache__', '.mim', '*.egg-info', '*.so'
    )
    source.mkdir()
    for name in ('lors_plugin', 'configs', 'tools', 'requirements'):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ('setup.py', 'pyproject.toml', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / name, source / name)
    code = (
        'import sys; from setuptools import build_meta; '
        'build_meta.build_wheel(sys.argv[1])'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path)],
        cwd=source,
        env={**os.environ, **dict.fromkeys(('CC', 'CXX'), compiler)}
        if compiler
        else None,
        capture_output=True,
        text=True,
        check=False,
    )
    if 'bdist_wheel' in done.stderr and done.returncode:
        pytest.skip('this setuptools builds no wheels')
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob('*.whl')
    names = zipfile.ZipFile(wheel).namelist()
    assert 'lors_plugin/version.py' in names
    assert 'lors_plugin/.mim/tools/train.py' in names
    assert not any(n.startswith(('tests/', 'tools/')) for n in names)
    for folder in ('benchmarks', 'studies'):
        assert not any(f'/tools/{folder}/' in n for n in names)
    if any((ROOT / 'configs').rglob('*.py')):
        assert any(n.startswith('lors_plugin/.mim/configs/') for n in names)
    compiled = not compiler and shutil.which('g++') is not None
    assert ('lors_plugin/_cpu.so' in names) == compiled
    # Of no version of Python, and without the library of no platform.
    tags = wheel.stem.rsplit('-', 3)[1:]
    assert tags[:2] == ['py3', 'none']
    assert (tags[2] == 'any') == (not compiled)
    for name in ('lint', 'run_tests.sh'):
        assert not any(f'/tools/{name}' in n for n in names)
    if compiled:
        library = zipfile.ZipFile(wheel).extract(
            'lors_plugin/_cpu.so', tmp_path / 'wheel'
        )
        digest = hash_sources(ROOT / 'lors_plugin' / 'csrc')
        assert read_seal(Path(library)) == (digest, '')
    # The checkout is left as it was.
    assert not (source / 'lors_plugin' / '_cpu.so').exists()
    assert not (source / 'lors_plugin' / '.mim').exists()
