"""Map the names of parameters and modules to parts of a model."""

import re

DECODER = 'decoder'
SEPARATOR = ' / '
_STAGE = r'decoder\.stages\.\d+\.'
_MIXING = r'decoder\.mixing(?:\.\d+)?'
# The first that matches counts. A norm belongs to what it follows.
_RULES = tuple(
    (re.compile(f'{pattern}(?:\\.|$)'), f'{DECODER}{SEPARATOR}{part}')
    for pattern, part in (
        (_STAGE + 'attention(?:_norm)?', 'attention'),
        (_STAGE + 'sampling', 'sampling'),
        (_MIXING + r'\.generator', 'mixing: generator'),
        (
            _MIXING + r'\.(?:core_generators|channel_part|spatial_part'
            r'|low_rank|out_proj\.(?:down|up))',
            'mixing: low rank',
        ),
        (_MIXING + r'\.out_proj', 'mixing: output projection'),
        (_STAGE + 'mixing_norm', 'mixing: output projection'),
        (_MIXING + '.*', 'mixing: products'),
        (_STAGE + 'ffn(?:_norm)?', 'FFN'),
        (_STAGE + '(?:cls_branch|reg_branch|fc_cls|fc_reg)', 'branches'),
    )
)


def part_of(name: str) -> str:
    """Name the part that a parameter or module belongs to.

    Args:
        name (str): As ``named_parameters`` or ``named_modules`` give it.

    Returns:
        str: The name of the model's child; in AdaMixer's decoder
        ``'decoder / attention'``, ``'decoder / mixing: low rank'`` and so
        on. ``'model'`` for the model itself.
    """
    for pattern, part in _RULES:
        if pattern.match(name):
            return part
    return name.split('.')[0] or 'model'
