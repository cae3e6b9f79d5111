"""A config entry that builds a module and lets its stacks share."""

from typing import Any

from mmengine.logging import print_log
from torch import nn

from lors_plugin.registry import MODELS

from .share import share_stack


@MODELS.register_module(name='LORSStack')
def build_lors_stack(module: dict, **options: Any) -> nn.Module:
    r"""Build a module and let its stacks of linear layers share weights.

    The result is the module itself, not a wrapper: what its host expects of
    it is there, and keys have no further prefix.

    Args:
        module (dict): Config of any module, such as a backbone.
        **options: Of :func:`share_stack`.

    Returns:
        nn.Module: What ``module`` describes, changed.

    Examples:
        >>> backbone = dict(
        ...     type='lors_plugin.LORSStack',
        ...     module=dict(type='VisionTransformer', arch='deit-tiny'),
        ...     targets=[r'layers\.(\d+)\.ffn\.layers\.(?:0\.0)'],
        ...     ranks=32,
        ... )
    """
    built = MODELS.build(module)
    report = share_stack(built, **options)
    print_log(f'LORS\n{report.table()}', logger='current')
    return built
