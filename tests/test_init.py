"""Importing the package, and finding its types by name."""

import re
import subprocess
import sys

import pytest

import lors_plugin
from lors_plugin import models
from lors_plugin.registry import MODELS


def run(code):
    """Run a program of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_version():
    assert re.fullmatch(r'\d+\.\d+\.\d+\S*', lors_plugin.__version__)


def test_import_is_light():
    """Nothing heavy comes along, so that tools answer at once."""
    out = run(
        'import sys, lors_plugin\n'
        'heavy = ("torch", "numpy", "triton", "mmengine", "mmcv", "mmdet")\n'
        'print(*[name for name in heavy if name in sys.modules])'
    )
    assert out == []


def test_types_are_found_without_custom_imports():
    """A config names a type, and that is all; MMEngine finds the rest."""
    out = run(
        'from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS\n'
        'part = MODELS.build(dict(\n'
        '    type="lors_plugin.SharedNormChannelMapping",\n'
        '    in_channels=[4], out_channels=32))\n'
        'print(type(part).__module__)\n'
        'for registry, name in ((OPTIM_WRAPPERS, "AutocastOptimWrapper"),\n'
        '                       (HOOKS, "EpochSeedHook")):\n'
        '    print(registry.get(f"lors_plugin.{name}").__name__)\n'
    )
    # What comes before is what hosts print when they are imported.
    assert out[-3:] == [
        'lors_plugin.adamixer.neck',
        'AutocastOptimWrapper',
        'EpochSeedHook',
    ]


def test_unknown_types_are_refused():
    with pytest.raises(KeyError, match='NoSuchThing'):
        MODELS.build(dict(type='lors_plugin.NoSuchThing'))


@pytest.mark.parametrize('name', sorted(MODELS.module_dict))
def test_registered_types_are_public(name):
    assert MODELS.get(f'lors_plugin.{name}') is getattr(models, name)
    assert name in models.__all__


def test_everything_public_exists():
    for name in models.__all__:
        assert getattr(models, name).__doc__
