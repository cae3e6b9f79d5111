"""Importing the package, and finding its types by name."""

import json
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
    # What comes before is what hosts print when they are imported.
    return done.stdout.splitlines()


def test_version():
    assert re.fullmatch(r'\d+\.\d+\.\d+\S*', lors_plugin.__version__)


def test_import_is_light():
    """Nothing heavy comes along, so that tools answer at once."""
    out = run(
        'import sys, lors_plugin\n'
        'heavy = ("torch", "numpy", "triton", "mmengine", "mmcv", "mmdet")\n'
        'print(*[name for name in heavy if name in sys.modules])'
    )
    assert out == ['']


HOSTS = """
import json, sys, warnings

sys.modules['faster_coco_eval'] = None
with warnings.catch_warnings(record=True) as found:
    from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS

    part = MODELS.build(dict(
        type='lors_plugin.SharedNormChannelMapping',
        in_channels=[4],
        out_channels=32,
    ))
    wrapper = OPTIM_WRAPPERS.get('lors_plugin.AutocastOptimWrapper')
    hook = HOOKS.get('lors_plugin.EpochSeedHook')
    from mmdet.evaluation.metrics import faster_coco_metric

print(json.dumps(dict(
    types=[
        f'{t.__module__}.{t.__name__}' for t in (type(part), wrapper, hook)
    ],
    warnings=[str(warning.message) for warning in found],
    coco=faster_coco_metric.COCO,
)))
"""


@pytest.fixture(scope='module')
def hosts():
    """What the hosts find in a process without ``import lors_plugin``."""
    return json.loads(run(HOSTS)[-1])


def test_types_are_found_without_custom_imports(hosts):
    """A config names a type, and that is all; MMEngine finds the rest."""
    assert [name.rpartition('.')[2] for name in hosts['types']] == [
        'SharedNormChannelMapping',
        'AutocastOptimWrapper',
        'EpochSeedHook',
    ]
    assert hosts['types'][0].startswith('lors_plugin.adamixer.neck.')


def test_a_warning_that_is_not_true_here(hosts):
    """Of MMDetection, where faster-coco-eval is missing."""
    assert hosts['coco'] is None
    assert not any('faster_coco' in text for text in hosts['warnings'])


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
