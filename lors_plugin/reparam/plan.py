"""What merging one module changes, computed before anything is written."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from lors_plugin.adapters import RepAdapter, adapters_of
from lors_plugin.adapters.inject import CHILD, adapt_input, remove_hook
from lors_plugin.adapters.sites import absorb


@dataclass
class AdapterMerge:
    """A RepAdapter goes into the layer that it adapts.

    Attributes:
        name (str): Of the layer, for messages.
        layer (nn.Module): What is adapted.
        adapter (RepAdapter): What vanishes.
        old (list[tuple]): Module, name and former parameter, once merged.
    """

    name: str
    layer: nn.Module
    adapter: RepAdapter
    old: list = field(default_factory=list)

    def values(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Modules, names of their parameters and new values, float64."""
        return absorb(self.layer, *self.adapter.affine())

    def apply(self) -> None:
        """Change the structure, once the values are written."""
        remove_hook(self.layer)
        delattr(self.layer, CHILD)

    def undo(self) -> None:
        """Change it back."""
        self.layer.add_module(CHILD, self.adapter)
        self.layer.register_forward_pre_hook(adapt_input, with_kwargs=True)


def plan(model: nn.Module) -> list[AdapterMerge]:
    """Everything in a model that can merge.

    Args:
        model (nn.Module): Any model.

    Returns:
        list[AdapterMerge]: In the order of the model's modules.
    """
    return [
        AdapterMerge(name, model.get_submodule(name), adapter)
        for name, adapter in adapters_of(model).items()
    ]
