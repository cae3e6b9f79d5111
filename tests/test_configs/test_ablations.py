"""The ablations that the READMEs of AdaMixer and LORS-AdaMixer list."""

import re
from pathlib import Path

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).parents[2] / 'configs'
PATHS = [
    'adamixer/adamixer_r50_8xb2-1x_coco.py',
    'lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
]


def rows(path):
    """Name, options and parameters in millions of each line of the table."""
    readme = (CONFIGS / path).with_name('README.md')
    return re.findall(
        r'^\| ([^|]+) \| `(dict\(.*\))` \| ([\d.]+) M \|$',
        readme.read_text(encoding='utf-8'),
        re.MULTILINE,
    )


def test_all_kinds_are_there():
    text = ' '.join(options for path in PATHS for _, options, _ in rows(path))
    for option in (
        'static_ranks=0',
        'adaptive_ranks=0',
        "static_weights='full'",
        "adaptive_weights='full'",
        "adaptive_weights='private', static_weights='private'",
        'adaptive_groups=',
        'static_groups=',
        'num_stages=',
        "mixing_steps=['channel']",
        "mixing_steps=['spatial']",
        "mixing_steps=['spatial', 'channel']",
        'fixed_mixing=',
        'scale_offsets=False',
        'overlap_bias=False',
        'position_encoding=',
    ):
        assert option in text


@pytest.mark.parametrize(
    ('path', 'options', 'parameters'),
    [(path, *row[1:]) for path in PATHS for row in rows(path)],
)
def test_parameters(path, options, parameters, full_size):
    options = Config.fromstring(f'decoder = {options}', '.py').decoder
    decoder = full_size(f'configs/{path}', **options).decoder
    count = sum(p.numel() for p in decoder.parameters())
    assert f'{count / 1e6:.3f}' == parameters
