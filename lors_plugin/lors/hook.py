"""Shared stacks by a few lines of a config."""

from copy import deepcopy
from typing import Any, Optional

from torch import nn

from lors_plugin.registry import HOOKS
from lors_plugin.structure import StructureHook
from lors_plugin.utils import part_of

from .linear import LowRankResidualLinear
from .share import share_stack


@HOOKS.register_module()
class LORSHook(StructureHook):
    """Let stacks of a model share weights before it trains or is tested.

    For parts that no config entry builds, such as the layers of DETR's
    decoder. Where one does, ``lors_plugin.LORSStack`` is simpler: the model
    then has its structure wherever it is built.

    Args:
        **options: Of :func:`lors_plugin.lors.share_stack`.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def change(self, model: nn.Module) -> Optional[str]:
        """Share, unless the part of the model has shared stacks already."""
        part = part_of(model, self.options.get('module', ''))
        if any(isinstance(m, LowRankResidualLinear) for m in part.modules()):
            return None
        return share_stack(model, **self.options).table()

    def preview(self, model: nn.Module) -> nn.Module:
        """Copy a model as it will be, to check files against."""
        model = deepcopy(model)
        self.change(model)
        return model
