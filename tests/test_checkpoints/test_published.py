"""Conversion of every published model, there and back."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lors_plugin.checkpoints import (
    guess_source,
    to_lors_plugin,
    to_original,
)
from lors_plugin.checkpoints.key_map import CONSTANT_KEY
from lors_plugin.testing import randomize

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    path.stem: path.relative_to(ROOT).as_posix()
    for folder in ('adamixer', 'lors_adamixer')
    for path in sorted((ROOT / 'configs' / folder).glob('*_coco.py'))
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_full_size(name, full_size):
    """All keys and shapes, without memory for the numbers."""
    model = full_size(PUBLISHED[name])
    ours = model.state_dict()
    source = 'lors' if name.startswith('lors-') else 'adamixer'
    original = to_original(ours, source)
    assert guess_source(original) == source
    trunk = ('backbone.', 'neck.lateral_convs.', 'neck.gn_out.')
    parts = ('rpn_head.init_', 'roi_head.bbox_head.')
    mixing = ('roi_head.adaptive_mixing.',) if source == 'lors' else ()
    assert all(key.startswith((*trunk, *parts, *mixing)) for key in original)
    queries = model.query_generator.num_queries
    assert original[CONSTANT_KEY].shape == (queries, 4)
    back = to_lors_plugin(original, source)
    assert {k: v.shape for k, v in back.items()} == {
        k: v.shape for k, v in ours.items()
    }


@pytest.mark.parametrize(
    'name', [name for name in PUBLISHED if '300-queries_8xb2-crop' in name]
)
def test_numbers(name, narrow_config, build):
    """Of narrow models: exactly the same after both ways."""
    model = randomize(build(narrow_config(PUBLISHED[name])), 0)
    state = model.state_dict()
    source = 'lors' if name.startswith('lors-') else 'adamixer'
    original = to_original(state, source)
    if 'dconv' in name:
        key = 'backbone.layer2.0.conv2.conv_offset.bias'
        assert key in original
        assert_close(original[key], state[key], rtol=0, atol=0)
    if 'swin' in name:
        assert any('.attn.w_msa.qkv.' in key for key in original)
    back = to_lors_plugin(original, source)
    assert_close(back, dict(state), rtol=0, atol=0)
    fresh = build(narrow_config(PUBLISHED[name]))
    fresh.load_state_dict(back)
    with torch.no_grad():
        for mine, theirs in zip(fresh.parameters(), model.parameters()):
            assert torch.equal(mine, theirs)
