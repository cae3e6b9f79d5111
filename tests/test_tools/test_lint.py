import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = ROOT / 'tools' / 'lint'
METAFILE = """\
Collections:
  - Name: A
    README: configs/a/README.md
Models:
  - Name: a_r50
    In Collection: A
    Config: configs/a/a_r50.py
"""


def run(script, *args):
    pytest.importorskip('yaml')
    return subprocess.run(
        [sys.executable, str(LINT / script), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / 'configs' / 'a'
    folder.mkdir(parents=True)
    (folder / 'README.md').write_text('')
    (folder / 'a_r50.py').write_text('')
    (folder / 'metafile.yml').write_text(METAFILE)
    (tmp_path / 'model-index.yml').write_text(
        'Import:\n  - configs/a/metafile.yml\n'
    )
    return tmp_path


def test_a_good_metafile(repository):
    done = run('check_metafile.py', '--root', repository)
    assert (done.returncode, done.stdout) == (0, '')


def test_everything_wrong_is_named(repository):
    folder = repository / 'configs' / 'a'
    (folder / 'a_r50.py').rename(folder / 'a_r101.py')
    (folder / 'README.md').unlink()
    (repository / 'model-index.yml').write_text(
        'Import:\n  - configs/b/metafile.yml\n'
    )
    done = run('check_metafile.py', '--root', repository)
    assert done.returncode == 1
    for text in (
        'README configs/a/README.md does not exist',
        'Config configs/a/a_r50.py does not exist',
        'no entry for configs/a/a_r101.py',
        'configs/b/metafile.yml does not exist',
        'does not import configs/a/metafile.yml',
    ):
        assert text in done.stdout


def test_the_metafiles_of_this_repository():
    done = run('check_metafile.py')
    assert done.returncode == 0, done.stdout
