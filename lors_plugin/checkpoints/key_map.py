"""Names of weights in the original programs, and here.

A rule is a pair of patterns in which ``{s}`` is the number of a stage,
``{i}`` another number and ``{p}`` the rest of the key. Rules work in both
directions.
"""

import re
from typing import NamedTuple, Optional

_FIELDS = {'s': r'(?P<s>\d+)', 'i': r'(?P<i>\d+)', 'p': r'(?P<p>.+)'}


class Rule(NamedTuple):
    """One line of a key map.

    Attributes:
        old (str): Pattern of the original program.
        new (str): Pattern of this package.
        stacked (bool): Whether the original stacks groups and parameter
            groups, (G K, rows, cols), where we have (G, K, rows, cols).
    """

    old: str
    new: str
    stacked: bool = False
    optional: bool = False

    def translate(self, key: str, reverse: bool = False) -> Optional[str]:
        """The key on the other side, or None where the rule is another's."""
        source, target = (self.new, self.old) if reverse else self[:2]
        pattern = re.escape(source).replace(r'\{', '{').replace(r'\}', '}')
        match = re.fullmatch(pattern.format(**_FIELDS), key)
        return match and target.format(**match.groupdict())


_STAGE_OLD = 'roi_head.bbox_head.{s}.'
_STAGE_NEW = 'decoder.stages.{s}.'

_TRUNK = [
    Rule('backbone.{p}', 'backbone.{p}'),
    Rule('neck.lateral_convs.{i}.conv.{p}', 'neck.convs.{i}.{p}'),
    Rule('neck.gn_out.{p}', 'neck.norm.{p}'),
    Rule(
        'rpn_head.init_content_features.weight',
        'query_generator.content.weight',
    ),
]

_STAGE = [
    Rule(_STAGE_OLD + old, _STAGE_NEW + new, optional='_fcs' in old)
    for old, new in (
        ('iof_tau', 'attention.overlap_scale'),
        ('attention.attn.in_proj_weight', 'attention.qkv.weight'),
        ('attention.attn.in_proj_bias', 'attention.qkv.bias'),
        ('attention.attn.out_proj.{p}', 'attention.proj.{p}'),
        ('attention_norm.{p}', 'attention_norm.{p}'),
        ('ffn.layers.{p}', 'ffn.layers.{p}'),
        ('ffn_norm.{p}', 'ffn_norm.{p}'),
        ('cls_fcs.{p}', 'cls_branch.{p}'),
        ('reg_fcs.{p}', 'reg_branch.{p}'),
        ('fc_cls.{p}', 'fc_cls.{p}'),
        ('fc_reg.{p}', 'fc_reg.{p}'),
    )
]

_ADAMIXER = [
    Rule(
        _STAGE_OLD + 'sampling_n_mixing.sampling_offset_generator.0.{p}',
        _STAGE_NEW + 'sampling.offsets.{p}',
    ),
    Rule(
        _STAGE_OLD + 'sampling_n_mixing.norm.{p}',
        _STAGE_NEW + 'mixing_norm.{p}',
    ),
    Rule(
        _STAGE_OLD
        + 'sampling_n_mixing.adaptive_mixing.parameter_generator.0.{p}',
        'decoder.mixing.{s}.generator.{p}',
    ),
    Rule(
        _STAGE_OLD + 'sampling_n_mixing.adaptive_mixing.out_proj.{p}',
        'decoder.mixing.{s}.out_proj.{p}',
    ),
]

_LORS = [
    Rule(
        _STAGE_OLD + 'sampling.sampling_offset_generator.0.{p}',
        _STAGE_NEW + 'sampling.offsets.{p}',
    ),
    *(
        Rule('roi_head.adaptive_mixing.' + old, 'decoder.' + new, stacked)
        for old, new, stacked in (
            ('ml_parameters.{s}', 'mixing.channel_part.left.{s}', True),
            ('mr_parameters.{s}', 'mixing.channel_part.right.{s}', True),
            ('sl_parameters.{s}', 'mixing.spatial_part.left.{s}', True),
            ('sr_parameters.{s}', 'mixing.spatial_part.right.{s}', True),
            ('common_parameter_generator.{p}', 'mixing.generator.{p}', False),
            (
                'private_parameter_generator.{s}.{p}',
                'mixing.core_generators.{s}.{p}',
                False,
            ),
            ('base_out_proj.weight', 'mixing.out_proj.weight', False),
            ('out_weight_add_A.{s}', 'mixing.out_proj.down.{s}', False),
            ('out_weight_add_B.{s}', 'mixing.out_proj.up.{s}', False),
            ('out_weight_bias.{s}', 'mixing.out_proj.bias.{s}', False),
            ('out_norm.{s}.{p}', 'stages.{s}.mixing_norm.{p}', False),
        )
    ),
]

KEY_MAPS = {
    'adamixer': _TRUNK + _STAGE + _ADAMIXER,
    'lors': _TRUNK + _STAGE + _LORS,
}

# The original keeps the position of the initial queries as a parameter that
# is never trained: the whole image, whatever the file says.
CONSTANT_KEY = 'rpn_head.init_proposal_bboxes.weight'
CONSTANT_ROW = (0.5, 0.5, 1.0, 1.0)


def find_rule(rules: list[Rule], key: str, reverse: bool = False):
    """The first rule that knows a key.

    Returns:
        tuple[Rule, str] | None: The rule and the translated key.
    """
    for rule in rules:
        other = rule.translate(key, reverse)
        if other:
            return rule, other
    return None
