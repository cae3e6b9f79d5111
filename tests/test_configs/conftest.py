"""The configs there are."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ('adamixer', 'lors_adamixer')
    for path in (ROOT / 'configs' / folder).glob('*.py')
)
COCO = [path for path in CONFIGS if path.endswith('_coco.py')]


def stem(path):
    return Path(path).stem


@pytest.fixture(params=CONFIGS, ids=stem)
def path(request):
    """A config file of a detector of this package."""
    return request.param


@pytest.fixture(params=COCO, ids=stem)
def coco_path(request):
    """A config file of a published model."""
    return request.param
