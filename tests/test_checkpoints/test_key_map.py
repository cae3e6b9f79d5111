"""Single rules of the key maps."""

import pytest

from lors_plugin.checkpoints.key_map import KEY_MAPS, Rule, find_rule

EXAMPLES = [
    (
        'adamixer',
        'roi_head.bbox_head.5.sampling_n_mixing.adaptive_mixing.'
        'parameter_generator.0.bias',
        'decoder.mixing.5.generator.bias',
    ),
    (
        'adamixer',
        'roi_head.bbox_head.2.sampling_n_mixing.norm.weight',
        'decoder.stages.2.mixing_norm.weight',
    ),
    (
        'lors',
        'roi_head.adaptive_mixing.out_norm.3.bias',
        'decoder.stages.3.mixing_norm.bias',
    ),
    (
        'lors',
        'roi_head.adaptive_mixing.ml_parameters.4',
        'decoder.mixing.channel_part.left.4',
    ),
    (
        'lors',
        'neck.lateral_convs.1.conv.weight',
        'neck.convs.1.weight',
    ),
]


@pytest.mark.parametrize(('source', 'old', 'new'), EXAMPLES)
def test_both_directions(source, old, new):
    rules = KEY_MAPS[source]
    assert find_rule(rules, old)[1] == new
    assert find_rule(rules, new, reverse=True)[1] == old


def test_dots_are_dots():
    rule = Rule('a.{i}.b', 'c.{i}')
    assert rule.translate('a.12.b') == 'c.12'
    for key in ('a.12xb', 'a.x.b', 'xa.1.b', 'a.1.b.c', 'a.1.2.b'):
        assert rule.translate(key) is None


@pytest.mark.parametrize('source', KEY_MAPS)
def test_rules_do_not_overlap(source):
    """Each pattern of either side stands in one rule only."""
    rules = KEY_MAPS[source]
    assert len({rule.old for rule in rules}) == len(rules)
    assert len({rule.new for rule in rules}) == len(rules)


@pytest.mark.parametrize(
    'key', ['roi_head.bbox_head.x.fc_cls.weight', 'rpn_head.conv.weight', '']
)
def test_unknown(key):
    assert find_rule(KEY_MAPS['lors'], key) is None
