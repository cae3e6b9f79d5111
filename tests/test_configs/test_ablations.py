"""The ablations that LORS-AdaMixer's README lists."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

FOLDER = Path(__file__).parents[2] / 'configs' / 'lors_adamixer'
PATH = 'configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'
ROWS = re.findall(
    r'^\| ([^|]+) \| `(dict\(.*\))` \| ([\d.]+) M \|$',
    (FOLDER / 'README.md').read_text(encoding='utf-8'),
    re.MULTILINE,
)


@pytest.fixture(params=ROWS, ids=lambda row: row[0])
def row(request):
    """Options of the decoder, and its parameters in millions."""
    _, options, parameters = request.param
    config = Config.fromstring(f'decoder = {options}', '.py')
    return config.decoder, parameters


def test_all_kinds_are_there():
    text = ' '.join(options for _, options, _ in ROWS)
    for option in (
        'static_ranks=0',
        'adaptive_ranks=0',
        "static_weights='full'",
        "adaptive_weights='full'",
        "adaptive_weights='private', static_weights='private'",
        'adaptive_groups=',
        'num_stages=',
    ):
        assert option in text


def test_parameters(row, full_size):
    options, parameters = row
    decoder = full_size(PATH, **options).decoder
    count = sum(p.numel() for p in decoder.parameters())
    assert f'{count / 1e6:.3f}' == parameters
