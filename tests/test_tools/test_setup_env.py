"""Parts of ``tools/setup_env.sh`` that need no installation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'setup_env.sh'


def bash(code, **env):
    """Run shell code after sourcing the script."""
    drop = ('PYTHON', 'VIRTUAL_ENV', 'CONDA_PREFIX')
    clean = {k: v for k, v in os.environ.items() if k not in drop}
    return subprocess.run(
        ['bash', '-c', f'set -euo pipefail\n. "{SCRIPT}"\n{code}'],
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(path, version):
    """Write an interpreter that is too old or too new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '#!/bin/sh\ncase "$2" in *python_version*) '
        f'echo {version};; *) exit 1;; esac\n'
    )
    path.chmod(0o755)
    return str(path)


def test_unfit_interpreter_is_named(tmp_path):
    python = fake_python(tmp_path / 'python', '3.8.1')
    done = bash('setup_env tests', PYTHON=python)
    assert done.returncode == 1
    assert f'{python} is not Python 3.10 to 3.13 (3.8.1)' in done.stderr
    assert 'PYTHON=/path/to/python3.12' in done.stderr


def test_unfit_active_environment_is_named(tmp_path):
    python = fake_python(tmp_path / 'bin' / 'python', '3.14.0')
    done = bash('setup_env', VIRTUAL_ENV=str(tmp_path))
    assert done.returncode == 1
    assert f'{python} is not Python 3.10 to 3.13 (3.14.0)' in done.stderr


def test_the_active_environment_is_taken():
    done = bash('_lors_find_python; echo "$PYTHON"', VIRTUAL_ENV=sys.prefix)
    if not (Path(sys.prefix) / 'bin' / 'python').exists():
        pytest.skip('no bin/python in this prefix')
    assert done.stdout.strip() == str(Path(sys.prefix) / 'bin' / 'python')


def test_too_little_room_stops_before_anything_is_made():
    base = getattr(sys, '_base_executable', sys.executable)
    code = 'import os, sys; print(sys.prefix == sys.base_prefix and not '
    code += 'os.path.isdir(sys.prefix + "/conda-meta"))'
    bare = subprocess.run(
        [base, '-c', f'import venv, ensurepip; {code}'],
        capture_output=True,
        text=True,
        check=False,
    )
    if bare.stdout.strip() != 'True':
        pytest.skip('no interpreter outside of an environment')
    done = bash('setup_env', PYTHON=base, LORS_NEED_GB='99999999')
    assert done.returncode == 1
    assert 'takes about 99999999 GB' in done.stderr


def test_missing_modules_by_import_name():
    done = bash('_lors_missing json no_such_module', PYTHON=sys.executable)
    assert done.stdout.strip() == 'no_such_module'


def test_stamp_depends_on_the_extras():
    code = '_lors_stamp tests; _lors_stamp tests; _lors_stamp tests,optional'
    done = bash(code, PYTHON=sys.executable)
    first, again, other = done.stdout.split()
    assert first == again != other


@pytest.mark.parametrize(
    ('installed', 'kind'),
    [
        (['onedl-mmengine', 'onedl-mmcv'], 'fork'),
        (['mmengine', 'MMCV', 'mmdet'], 'original'),
        (['onedl_mmcv_x', 'mmcls', 'torch'], 'none'),
        ([], 'none'),
    ],
)
def test_host_kind_by_distributions(tmp_path, installed, kind):
    """By an interpreter that sees no other packages than these."""
    for name in installed:
        folder = tmp_path / f'{name}-1.0.dist-info'
        folder.mkdir()
        (folder / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
    python = tmp_path / 'python'
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    path = str(tmp_path)
    done = bash('_lors_host_kind', PYTHON=str(python), PYTHONPATH=path)
    assert done.stdout.strip() == kind, done.stderr


@pytest.mark.parametrize(
    ('given', 'spins'),
    [
        ({}, '10000'),
        ({'GOMP_SPINCOUNT': '7'}, '7'),
        ({'OMP_WAIT_POLICY': 'PASSIVE'}, 'None'),
    ],
)
def test_threads_that_wait_soon_sleep(monkeypatch, given, spins):
    """What the user has set stays; a policy of the user's counts alone."""
    for name in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'):
        monkeypatch.delenv(name, raising=False)
    done = bash(
        '"$PYTHON" -c "import os; print(os.environ.get(\'GOMP_SPINCOUNT\'))"',
        PYTHON=sys.executable,
        **given,
    )
    assert done.stdout.strip() == spins


def test_paths_with_spaces_and_relative_ones(tmp_path):
    python = tmp_path / 'my env' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    code = f'cd "{tmp_path}"; _lors_find_python; echo "$PYTHON"'
    for given in (
        dict(VIRTUAL_ENV=str(tmp_path / 'my env')),
        dict(PYTHON='my env/bin/python'),
    ):
        assert bash(code, **given).stdout.strip() == str(python)


def test_another_checkout_is_not_this_one(tmp_path):
    code = '_lors_is_installed && echo yes || echo no'
    root = str(SCRIPT.parents[1])
    for path, answer in ((root, 'yes'), (str(tmp_path), 'no')):
        (tmp_path / 'lors_plugin').mkdir(exist_ok=True)
        (tmp_path / 'lors_plugin' / '__init__.py').touch()
        done = bash(code, PYTHON=sys.executable, PYTHONPATH=path)
        assert done.stdout.strip() == answer
