"""What merging one module changes, computed before anything is written."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import nn

from lors_plugin.adapters import RepAdapter
from lors_plugin.adapters.inject import CHILD, adapt_input, remove_hook
from lors_plugin.adapters.sites import absorb
from lors_plugin.parameternet.cpu_inference import can_convert, convert

from .checks import (
    MergeError,
    check_at_hand,
    check_evaluating,
    check_finite,
    like_former,
)


@dataclass
class AdapterMerge:
    """A RepAdapter goes into the layer that it adapts.

    Attributes:
        name (str): Of the layer, for messages.
        layer (nn.Module): What is adapted.
        adapter (RepAdapter): What vanishes.
        new (list[tuple]): Module, name and new parameter, once prepared.
        old (list[tuple]): The same with the former ones, once merged.
        size (int): How many modules vanish.
    """

    name: str
    layer: nn.Module
    adapter: RepAdapter
    new: list = field(default_factory=list)
    old: list = field(default_factory=list)
    size: int = 1

    def prepare(self) -> None:
        """Compute and check everything; write nothing."""
        check_evaluating(self.adapter, self.name)
        values = absorb(self.layer, *self.adapter.affine())
        self.new = [
            (module, name, like_former(module, name, value, self.name))
            for module, name, value in values
        ]

    def apply(self) -> None:
        """Write the new weights and take the adapter off."""
        for module, name, param in self.new:
            self.old.append((module, name, module._parameters[name]))
            module._parameters[name] = param
        self.new = []
        remove_hook(self.layer)
        del self.layer._modules[CHILD]

    def undo(self) -> None:
        """Change it back, where the model is now."""
        device = _device_of(self.layer)
        for module, name, param in self.old:
            if param is not None and param.device != device:
                param = nn.Parameter(param.to(device), param.requires_grad)
            module._parameters[name] = param
        self.old = []
        self.layer.add_module(CHILD, self.adapter.to(device))
        self.layer.register_forward_pre_hook(adapt_input, with_kwargs=True)


@dataclass
class ReplaceMerge:
    """A module gives way to a simpler one that does the same.

    Attributes:
        name (str): Of the module, for messages.
        old (nn.Module): It has a method ``merged()``, or is a block that is
            converted for inference on CPUs.
        places (list[tuple]): Every parent and name where it is.
        new (nn.Module, optional): What takes its place, once prepared.
        size (int): How many modules vanish, with those inside.
    """

    name: str
    old: nn.Module
    places: list = field(default_factory=list)
    new: Optional[nn.Module] = None
    size: int = 1

    def prepare(self) -> None:
        """Compute and check everything; write nothing."""
        check_evaluating(self.old, self.name)
        for tensor in self.old.state_dict().values():
            check_at_hand(tensor, self.name)
        self._check_hooks()
        self.new, self.size = _simpler(self.old, self.name)
        for key, value in self.new.state_dict().items():
            check_finite(value, f'{self.name}.{key}')

    def apply(self) -> None:
        """Put the new module into every place of the old one."""
        for parent, name in self.places:
            parent._modules[name] = self.new

    def undo(self) -> None:
        """Change it back, where the model is now."""
        old = self.old.to(_device_of(self.new))
        for parent, name in self.places:
            parent._modules[name] = old

    def _check_hooks(self) -> None:
        """Hooks of others would be lost without a word."""
        old, hooks = self.old, []
        for part in old.modules():
            hooks += part._forward_hooks.values()
            hooks += part._backward_hooks.values()
            hooks += part._forward_pre_hooks.values()
        hooks = [hook for hook in hooks if hook is not adapt_input]
        if hooks:
            raise MergeError(
                f'{self.name}: {type(old).__name__} is replaced by merging, '
                f'and its hook {hooks[0]} would be lost; remove it first'
            )


def plan(model: nn.Module, with_conversion: bool = False) -> list:
    """Everything inside a model that can merge.

    Args:
        model (nn.Module): Any model.
        with_conversion (bool): Whether to convert blocks for inference on
            CPUs, too. Defaults to False.

    Returns:
        list[AdapterMerge | ReplaceMerge]: In the order of the model's
        modules. What is inside a replaced module merges with it.
    """
    merges, replaced = [], {}
    for name, parent, child_name, child in _edges(model, with_conversion):
        if has_simpler(child, with_conversion):
            if id(child) not in replaced:
                replaced[id(child)] = ReplaceMerge(name, child)
                merges.append(replaced[id(child)])
            replaced[id(child)].places.append((parent, child_name))
        elif child_name == CHILD and isinstance(child, RepAdapter):
            layer = name.removesuffix(CHILD).removesuffix('.')
            merges.append(AdapterMerge(layer, parent, child))
    return merges


def has_simpler(module: nn.Module, with_conversion: bool = False) -> bool:
    """Whether a simpler module is known that does the same."""
    if callable(getattr(type(module), 'merged', None)):
        return True
    return with_conversion and can_convert(module) and _is_on_cpu(module)


def _is_on_cpu(module: nn.Module) -> bool:
    return all(p.device.type == 'cpu' for p in module.parameters())


def _edges(model: nn.Module, with_conversion: bool) -> Iterator[tuple]:
    """Name, parent, name in it and child; once for each parent and name.

    Nothing is looked for inside of what is replaced as a whole.
    """
    waiting, seen = [('', model)], {id(model)}
    while waiting:
        prefix, parent = waiting.pop()
        inner = []
        for name, child in parent._modules.items():
            if child is None:
                continue
            yield f'{prefix}{name}', parent, name, child
            whole = has_simpler(child, with_conversion)
            if id(child) not in seen and not whole:
                seen.add(id(child))
                inner.append((f'{prefix}{name}.', child))
        waiting += reversed(inner)


@torch.no_grad()
def _simpler(module: nn.Module, where: str) -> tuple[nn.Module, int]:
    """What does the same as a module and its adapter; how many vanish."""
    adapter, size = module._modules.get(CHILD), 1
    if plan(module):
        # All that is inside merges first, in a copy.
        module = deepcopy(module)
        if adapter is not None:
            remove_hook(module)
            del module._modules[CHILD]
        for merge in plan(module):
            merge.prepare()
            merge.apply()
            size += merge.size
    new = module.merged() if has_simpler(module) else convert(module)
    new.eval()
    if adapter is not None:
        size += 1
        for part, name, value in absorb(new, *adapter.affine()):
            part._parameters[name] = like_former(part, name, value, where)
    return new, size


def _device_of(module: nn.Module) -> Optional[torch.device]:
    return next((p.device for p in module.parameters()), None)
