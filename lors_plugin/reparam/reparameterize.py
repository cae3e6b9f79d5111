"""Merge adapters, branches and shared layers: first compute, then write."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.adapters import SiteError
from lors_plugin.adapters.adapter import Adapter, AdapterHook
from lors_plugin.adapters.inject import attach_to, detach_from
from lors_plugin.adapters.methods import adapter_of
from lors_plugin.parameternet import cpu_inference

_RECORD = '_lors_plugin_merged'


class MergeError(ValueError):
    """The model cannot be merged; nothing was changed."""


@torch.no_grad()
def reparameterize(model: nn.Module, convert: bool = True) -> int:
    """Merge every part that can merge, in place.

    Adapters go into the layers behind them. A module with a method
    ``merged()``, which returns a simpler module with the same outputs in
    evaluation mode, is replaced by that one everywhere in the model;
    adapters and other such modules inside of it merge first. Blocks of
    ParameterNet on a CPU are converted for inference there: their norms are
    folded, and they refuse to train. All is computed in float64 for the whole
    model and checked before the first weight is written. Merging again
    changes nothing; :func:`unmerge` restores every former weight and module
    bit for bit.

    Args:
        model (nn.Module): In evaluation mode.
        convert (bool): Convert blocks for inference on CPUs. Defaults to
            True.

    Returns:
        int: Number of merged modules.

    Raises:
        MergeError: If a part that merges is in training mode, its weights
            are sharded or on the meta device, or a new weight is not finite.
            Nothing is changed then.
    """
    if model.training:
        _check_evaluating(model, 'the model')
    if _is_replaceable(model):
        raise MergeError(
            f'the model itself is a {type(model).__name__}, for which '
            'another module steps in: use model.merged() instead'
        )
    merges = _plan(model, convert)
    for merge in merges:
        merge.prepare()
    for merge in merges:
        merge.apply()
    if merges:
        record = getattr(model, _RECORD, [])
        object.__setattr__(model, _RECORD, [*record, *merges])
    return sum(merge.size for merge in merges)


@torch.no_grad()
def unmerge(model: nn.Module) -> int:
    """Undo :func:`reparameterize`, bit for bit.

    Args:
        model (nn.Module): The very model that was merged.

    Returns:
        int: Number of restored modules; 0 if none was merged.
    """
    merges = getattr(model, _RECORD, [])
    for merge in reversed(merges):
        merge.undo()
    if merges:
        object.__delattr__(model, _RECORD)
    return sum(merge.size for merge in merges)


@dataclass
class AdapterMerge:
    """Merge an adapter into the layer that it adapts.

    Attributes:
        name (str): Of the layer, for messages.
        layer (nn.Module): The adapted layer.
        adapter (Adapter): Removed by the merge.
        new (list[tuple]): Module, name and new parameter, once prepared.
        old (list[tuple]): The same with the former ones, once merged.
        size (int): Number of modules that vanish.
    """

    name: str
    layer: nn.Module
    adapter: Adapter
    new: list = field(default_factory=list)
    old: list = field(default_factory=list)
    size: int = 1

    def prepare(self) -> None:
        """Compute and check the new weights; write nothing."""
        _check_evaluating(self.adapter, self.name)
        try:
            values = self.adapter.merged_weights(self.layer)
        except SiteError as error:
            # A parametrization, say, that came after the adapter.
            raise MergeError(f'{self.name}: {error}') from error
        self.new = [
            (module, name, _new_parameter(module, name, value, self.name))
            for module, name, value in values
        ]

    def apply(self) -> None:
        """Write the new weights and remove the adapter."""
        for module, name, param in self.new:
            self.old.append((module, name, module._parameters[name]))
            module._parameters[name] = param
        self.new = []
        detach_from(self.layer)

    def undo(self) -> None:
        """Restore weights and adapter on the model's present device."""
        device = _device_of(self.layer)
        for module, name, param in self.old:
            if param is not None and param.device != device:
                param = nn.Parameter(param.to(device), param.requires_grad)
            module._parameters[name] = param
        self.old = []
        attach_to(self.layer, self.adapter)


@dataclass
class ReplaceMerge:
    """Replace a module by a simpler one with the same outputs.

    Attributes:
        name (str): Of the module, for messages.
        old (nn.Module): It has a method ``merged()``, or is a block that is
            converted for inference on CPUs.
        places (list[tuple]): Every parent and the module's name in it.
        new (nn.Module, optional): The replacement, once prepared.
        size (int): Number of modules that vanish, with those inside.
    """

    name: str
    old: nn.Module
    places: list = field(default_factory=list)
    new: Optional[nn.Module] = None
    size: int = 1

    def prepare(self) -> None:
        """Compute and check the new module; write nothing."""
        _check_evaluating(self.old, self.name)
        for tensor in self.old.state_dict().values():
            _check_local(tensor, self.name)
        self._check_hooks()
        self.new, self.size = _simplified(self.old, self.name)
        for key, value in self.new.state_dict().items():
            _check_finite(value, f'{self.name}.{key}')

    def apply(self) -> None:
        """Put the new module wherever the old one was."""
        for parent, name in self.places:
            parent._modules[name] = self.new

    def undo(self) -> None:
        """Restore the old module on the model's present device."""
        old = self.old.to(_device_of(self.new))
        for parent, name in self.places:
            parent._modules[name] = old

    def _check_hooks(self) -> None:
        """Refuse to drop hooks of others silently."""
        old, hooks = self.old, []
        for part in old.modules():
            hooks += part._forward_hooks.values()
            hooks += part._backward_hooks.values()
            hooks += part._forward_pre_hooks.values()
        hooks = [h for h in hooks if not isinstance(h, AdapterHook)]
        if hooks:
            raise MergeError(
                f'{self.name}: {type(old).__name__} is replaced by merging, '
                f'and its hook {hooks[0]} would be lost; remove it first'
            )


def _plan(model: nn.Module, convert: bool = False) -> list:
    """List the merges inside a model, in the order of its modules.

    What is inside a replaced module merges with it. With ``convert``, blocks
    for inference on CPUs are among them.
    """
    merges, replaced = [], {}
    for name, parent, child_name, child in _edges(model, convert):
        if _is_replaceable(child, convert):
            if id(child) not in replaced:
                replaced[id(child)] = ReplaceMerge(name, child)
                merges.append(replaced[id(child)])
            replaced[id(child)].places.append((parent, child_name))
        elif isinstance(child, Adapter):
            layer = name.rpartition('.')[0]
            merges.append(AdapterMerge(layer, parent, child))
    return merges


def _is_replaceable(module: nn.Module, convert: bool = False) -> bool:
    if callable(getattr(type(module), 'merged', None)):
        return True
    on_cpu = all(p.device.type == 'cpu' for p in module.parameters())
    return convert and on_cpu and cpu_inference.can_convert(module)


def _edges(model: nn.Module, convert: bool) -> Iterator[tuple]:
    """Yield name, parent, name in it and child, once per parent and name.

    The inside of modules that are replaced as a whole is left out.
    """
    waiting, seen = [('', model)], {id(model)}
    while waiting:
        prefix, parent = waiting.pop()
        inner = []
        for name, child in parent._modules.items():
            if child is None:
                continue
            yield f'{prefix}{name}', parent, name, child
            whole = _is_replaceable(child, convert)
            if id(child) not in seen and not whole:
                seen.add(id(child))
                inner.append((f'{prefix}{name}.', child))
        waiting += reversed(inner)


def _simplified(module: nn.Module, where: str) -> tuple[nn.Module, int]:
    """Merge a replaceable module with its adapter; count what vanishes."""
    adapter, size = adapter_of(module), 1
    if _plan(module):
        # What is inside merges first, in a copy.
        module = deepcopy(module)
        if adapter is not None:
            detach_from(module)
        for merge in _plan(module):
            merge.prepare()
            merge.apply()
            size += merge.size
    if _is_replaceable(module):
        new = module.merged()
    else:
        new = cpu_inference.convert(module)
    new.eval()
    if adapter is not None:
        size += 1
        for part, name, value in adapter.merged_weights(new):
            part._parameters[name] = _new_parameter(part, name, value, where)
    return new, size


def _device_of(module: nn.Module) -> Optional[torch.device]:
    return next((p.device for p in module.parameters()), None)


def _new_parameter(
    module: nn.Module, name: str, value: Tensor, where: str
) -> nn.Parameter:
    """Make a parameter that can replace a former one.

    Args:
        module (nn.Module): The owner of the parameter.
        name (str): Its name there; it may be None so far.
        value (Tensor): The new value, float64.
        where (str): Name of the module, for messages.

    Returns:
        nn.Parameter: Of the former type and device; nothing is written.
    """
    if name not in module._parameters:
        raise MergeError(
            f'{where}: its {name} is computed from others (a '
            'parametrization?); make it a plain parameter before merging'
        )
    former = module._parameters[name]
    like = next(module.parameters()) if former is None else former
    _check_local(like, where)
    new = value.to(like.device, like.dtype)
    _check_finite(new, f'{where}.{name}')
    return nn.Parameter(new, requires_grad=like.requires_grad)


def _check_evaluating(module: nn.Module, where: str) -> None:
    """Refuse a module of which any part is in training mode."""
    if any(part.training for part in module.modules()):
        raise MergeError(
            f'{where} or a part of it is in training mode, where dropout and '
            'batch statistics cannot merge; call model.eval() first'
        )


def _check_local(tensor: Tensor, where: str) -> None:
    """Refuse a tensor that is not wholly in this process's memory."""
    sharded = hasattr(tensor, 'placements') or hasattr(tensor, 'ds_id')
    if tensor.is_meta or sharded:
        raise MergeError(
            f'{where}: its weights are sharded or on the meta device; gather '
            'or load them before merging'
        )


def _check_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN, and overflow in the type of the model."""
    if not tensor.isfinite().all():
        raise MergeError(
            f'{where}: merging gives values that are not finite in '
            f'{str(tensor.dtype).removeprefix("torch.")}; look for NaN in '
            'the weights that are merged, or merge in float32'
        )
