"""Many tasks on one backbone: adapters that are switched, or mixed."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lors_plugin.checkpoints import load_checkpoint_file
from lors_plugin.utils import at_least_float32, check_at_least, part_of

from .adapter import Adapter
from .checkpoint import (
    check_base,
    check_layers,
    check_trained,
    read_adapter_file,
)
from .inject import adapters_of
from .methods import build_adapter, entries_of
from .peft import PeftAdapter, PeftError, Update, lora_of, low_rank

# What computes each image by itself, so that its rows can be replaced.
_PER_IMAGE = (
    nn.Linear,
    nn.Conv2d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)
# Largest share by which rounding changes what a layer reads.
_ROUNDING = 2e-2


@dataclass
class Task:
    """A task: its adapters, and what else of the model it replaces.

    Attributes:
        adapters (dict[str, Adapter]): By layer.
        entries (dict[str, Tensor]): Other trained entries of the state dict.
        modules (dict[str, nn.Module]): Modules that take the place of those
            of the model, with their weights.
        updates (dict[str, dict]): Low-rank updates by adapted layer and the
            layers they change; none for layers that only merge as a whole.
    """

    adapters: dict[str, Adapter]
    entries: dict[str, Tensor]
    modules: dict[str, nn.Module]
    updates: dict[str, dict[nn.Module, Update]] = field(default_factory=dict)


class AdapterBank:
    """Adapters of many tasks for one model in memory.

    A task costs its adapter file in memory, half a megabyte for a ViT-S.
    :meth:`switch` merges one into the weights, so that the model is as fast
    as without adapters; the weights of the base are kept and come back bit
    for bit. Called with a task per image, the bank runs a mixed batch
    unmerged. Threads may share a bank: one of them has the model at a time.

    Args:
        model (nn.Module): With the weights of the base and without adapters,
            on its device; put into evaluation mode. Its weights must not be
            changed by others.
        max_merged (int): Number of tasks whose merged weights are kept, the
            active one among them; a switch to one of them costs nothing.
            Each takes the memory of the adapted layers, 0.2 GB of a ViT-B.
            Defaults to 4.

    Examples:
        >>> bank = AdapterBank(model)
        >>> bank.add('birds', 'work_dirs/birds/best.pth')
        >>> bank.add('cars', 'peft_folder')
        >>> with bank.using('birds') as model:
        ...     scores = model(images)
        >>> scores = bank(images, ['birds', 'cars', None])
    """

    def __init__(self, model: nn.Module, max_merged: int = 4) -> None:
        if adapters_of(part_of(model, '')):
            raise ValueError(
                'the model has adapters already; take them off '
                '(lors_plugin.adapters.remove_adapters) first'
            )
        self.model = model.eval()
        self.max_merged = check_at_least('max_merged', max_merged, 1)
        self._tasks: dict[str, Task] = {}
        self._active: Optional[str] = None
        self._lock = threading.RLock()
        # What was replaced by the active task: dict, key and former value.
        self._former: list[tuple[dict, str, Any]] = []
        self._merged: OrderedDict[str, list] = OrderedDict()
        # Dimension of the images in what a layer reads; None if no call so
        # far has reached it.
        self._dims: dict[str, Optional[int]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the tasks, as they were added."""
        return list(self._tasks)

    @property
    def active(self) -> Optional[str]:
        """The task of the last switch; None for the base."""
        return self._active

    @torch.no_grad()
    def add(
        self,
        name: str,
        source: Union[str, Path, dict, PeftAdapter],
        modules: Optional[dict[str, nn.Module]] = None,
        part: str = '',
    ) -> None:
        """Add a task, and merge it while there is room for merged weights.

        Args:
            name (str): Of the task.
            source (str | Path | dict | PeftAdapter): An adapter file of any
                method or its content, or a folder of PEFT or its content.
            modules (dict[str, nn.Module], optional): Modules of the task's
                own by the names of those whose place they take, such as a
                head with another number of classes. Their weights come from
                the source.
            part (str): The part of the model that PEFT had.

        Raises:
            ValueError: If there is such a task, or the source belongs to
                another base. The bank is as it was then.
        """
        if not isinstance(name, str) or name in self._tasks:
            raise ValueError(f'{name!r} is no new name of a task')
        with self._at_base():
            self._tasks[name] = self._read(source, dict(modules or {}), part)
            try:
                if len(self._merged) < self.max_merged:
                    self._apply(name)
            except BaseException:
                del self._tasks[name]
                raise

    def remove(self, name: str) -> None:
        """Remove a task; if it is active, the base comes back."""
        self._check_names([name])
        with self._lock:
            if self._active == name:
                self._apply(None)
            self._merged.pop(name, None)
            del self._tasks[name]

    def switch(self, name: Optional[str]) -> None:
        """Merge a task into the model, in place.

        Args:
            name (str, optional): Of the task; None for the base.
        """
        self._check_names([name])
        with self._lock:
            self._apply(name)

    @contextlib.contextmanager
    def using(
        self, name: Optional[str], adapters: bool = True
    ) -> Iterator[nn.Module]:
        """Switch to a task for a block; no other thread has the model.

        Args:
            name (str, optional): Of the task; None for the base.
            adapters (bool): False takes the task's other weights only, its
                head, for features of a mixed batch. Defaults to True.

        Yields:
            nn.Module: The model. It stays switched afterwards, as the next
            block is likely to want the same.
        """
        self._check_names([name])
        with self._lock:
            if adapters:
                self._apply(name)
                yield self.model
                return
            with self._at_base():
                self._put(self._others(name))
                try:
                    yield self.model
                finally:
                    self._restore()

    def __call__(
        self,
        inputs: Tensor,
        tasks: Sequence[Optional[str]],
        call: Optional[Callable] = None,
    ) -> Any:
        """Run a batch whose images belong to different tasks, unmerged.

        The first batch is preceded by two runs of random images, from which
        the bank learns where in its input each layer has the images.

        Args:
            inputs (Tensor): Shape (B, ...).
            tasks (Sequence[str, optional]): Name of the task of each image,
                None for the base.
            call (Callable, optional): What takes the inputs, a method of the
                model for example. Defaults to the model.

        Returns:
            Any: What ``call`` returns; each image is computed as its task
            alone would.

        Raises:
            ValueError: If a layer mixes images or has another number of rows
                than images, or if heads of tasks differ in shape.
        """
        self._check_names(tasks)
        if len(inputs) != len(tasks):
            raise ValueError(f'{len(inputs)} images have {len(tasks)} tasks')
        call = call or self.model
        rows: dict[str, list[int]] = {}
        for index, name in enumerate(tasks):
            if name is not None:
                rows.setdefault(name, []).append(index)
        with self._at_base():
            self._learn(call, inputs, list(rows))
            try:
                return self._mixed(call, inputs, rows)
            except _UnknownLayer:
                # No call before reached it.
                self._learn(call, inputs, list(rows), again=True)
                return self._mixed(call, inputs, rows)

    def _mixed(
        self, call: Callable, inputs: Tensor, rows: dict[str, list[int]]
    ) -> Any:
        with contextlib.ExitStack() as stack:
            for name, own in rows.items():
                for handle in self._route(name, own, len(inputs)):
                    stack.callback(handle.remove)
            return call(inputs)

    def _check_names(self, names: Sequence[Optional[str]]) -> None:
        odd = [n for n in names if n is not None and n not in self._tasks]
        if odd:
            raise ValueError(f'there is no task {odd[0]!r} in {self.names}')

    @contextlib.contextmanager
    def _at_base(self) -> Iterator[None]:
        """Have the base for a block, then the active task again."""
        with self._lock:
            before = self._active
            self._apply(None)
            try:
                yield
            finally:
                self._apply(before)

    def _read(
        self, source: Any, modules: dict[str, nn.Module], part: str
    ) -> Task:
        """Read a task and check that it fits the base, which is active."""
        model = self.model
        for name in modules:
            part_of(model, name)
        if isinstance(source, (str, Path)) and not Path(source).is_dir():
            source = load_checkpoint_file(source)
        if isinstance(source, dict):
            file = read_adapter_file(source)
            base = self._with_modules(modules)
            check_trained(base, file)
            check_base(base, file.meta)
            check_layers(model, file.adapters)
            adapters, entries = {}, dict(file.state)
            for name, options in file.meta['adapters'].items():
                adapters[name] = build_adapter(options)
                prefix = f'{name}.{adapters[name].child}.'
                own = [key for key in entries if key.startswith(prefix)]
                adapters[name].load_state_dict(
                    {key.removeprefix(prefix): entries.pop(key) for key in own}
                )
        else:
            prefix = f'{part}.' if part else ''
            adapters, entries = lora_of(part_of(model, part), source)
            adapters = {prefix + k: value for k, value in adapters.items()}
            entries = {prefix + k: value for k, value in entries.items()}
        for name, adapter in adapters.items():
            weight = next(model.get_submodule(name).parameters())
            adapter.to(weight.device, weight.dtype).eval()
            adapter.requires_grad_(False)
        for name, module in modules.items():
            own = [key for key in entries if key.startswith(f'{name}.')]
            # What the file lacks of it is in the base that was checked.
            module.load_state_dict(
                {k.removeprefix(f'{name}.'): entries.pop(k) for k in own},
                strict=False,
            )
            like = next(model.parameters())
            module.to(like.device, like.dtype).eval().requires_grad_(False)
        there = entries_of(model)
        entries = {
            key: value.to(there[key].device, there[key].dtype, copy=True)
            for key, value in entries.items()
        }
        task = Task(adapters, entries, modules)
        self._put(self._others(task))
        try:
            for name, adapter in adapters.items():
                # Others merge as a whole, which takes longer.
                with contextlib.suppress(PeftError):
                    layer = model.get_submodule(name)
                    task.updates[name] = low_rank(layer, adapter)
        finally:
            self._restore()
        return task

    def _with_modules(self, modules: dict[str, nn.Module]) -> dict:
        """Return the state dict of the model with other modules in it."""
        state = dict(entries_of(self.model))
        for name, module in modules.items():
            state = {
                key: value
                for key, value in state.items()
                if not key.startswith(f'{name}.')
            }
            for key, value in module.state_dict().items():
                state[f'{name}.{key}'] = value
        return state

    @torch.no_grad()
    def _apply(self, name: Optional[str]) -> None:
        """Make the model that of a task."""
        if name == self._active:
            return
        self._restore()
        self._active = None
        if name is None:
            return
        self._put(self._others(name))
        try:
            if name not in self._merged:
                self._merged[name] = self._merge(self._tasks[name])
            self._put(self._merged[name])
        except Exception:
            self._restore()
            raise
        self._active = name
        self._merged.move_to_end(name)
        while len(self._merged) > self.max_merged:
            self._merged.popitem(last=False)

    def _put(self, changes: list[tuple[dict, str, Any]]) -> None:
        for holder, key, value in changes:
            self._former.append((holder, key, holder[key]))
            holder[key] = value

    def _restore(self) -> None:
        while self._former:
            holder, key, value = self._former.pop()
            holder[key] = value

    def _others(self, task: Union[None, str, Task]) -> list:
        """List the changes of a task beside its adapters."""
        if isinstance(task, str):
            task = self._tasks[task]
        if task is None:
            return []
        changes = []
        for key, value in task.entries.items():
            module, own = self._owner(key)
            if own in module._parameters:
                value = nn.Parameter(value, requires_grad=False)
                changes.append((module._parameters, own, value))
            else:
                changes.append((module._buffers, own, value))
        for name, module in task.modules.items():
            parent, own = self._owner(name)
            changes.append((parent._modules, own, module))
        return changes

    def _owner(self, key: str) -> tuple[nn.Module, str]:
        name, _, own = key.rpartition('.')
        return self.model.get_submodule(name), own

    def _merge(self, task: Task) -> list[tuple[dict, str, nn.Parameter]]:
        """Compute the merged weights of a task, whose others are active."""
        changes = []
        for name, adapter in task.adapters.items():
            if name in task.updates:
                new = _updated(task.updates[name])
            else:
                new = adapter.merged_weights(self.model.get_submodule(name))
            for module, key, value in new:
                like = module._parameters[key]
                like = next(module.parameters()) if like is None else like
                value = value.to(like.device, like.dtype)
                # Many times as fast as a look at each element.
                if not value.sum(dtype=torch.float32).isfinite():
                    raise ValueError(
                        f'{name}: merging gives a {key} that is not finite '
                        f'in {like.dtype}'
                    )
                param = nn.Parameter(value, requires_grad=False)
                changes.append((module._parameters, key, param))
        return changes

    def _route(
        self, name: str, rows: list[int], number: int
    ) -> list[RemovableHandle]:
        """Register hooks that compute some images as a task does."""
        task, handles = self._tasks[name], []
        # These come first: a LoRA adds to what they return.
        for owner, entries in self._by_owner(task).items():
            module = self.model.get_submodule(owner)
            images = _Images(self._dims[owner], rows, number, owner)
            handles.append(
                module.register_forward_hook(_replaced(images, entries))
            )
        for layer, adapter in task.adapters.items():
            module = self.model.get_submodule(layer)
            images = _Images(self._dims[layer], rows, number, layer)
            handles += adapter.register(module, _routed(images, adapter))
        for owner in task.modules:
            module = self.model.get_submodule(owner)
            handles.append(
                module.register_forward_pre_hook(_refusal(name, owner))
            )
        return handles

    def _by_owner(self, task: Task) -> dict[str, dict[str, Tensor]]:
        """Group the trained entries of a task by their module."""
        owners: dict[str, dict[str, Tensor]] = {}
        for key, value in task.entries.items():
            owner, _, own = key.rpartition('.')
            owners.setdefault(owner, {})[own] = value
        for owner, entries in owners.items():
            module = self.model.get_submodule(owner)
            if not isinstance(module, _PER_IMAGE):
                raise ValueError(
                    f'{owner}.{next(iter(entries))} was trained, and a '
                    f'{type(module).__name__} cannot compute some images with '
                    'other weights; run a batch per task (using)'
                )
        return owners

    @torch.no_grad()
    def _learn(
        self,
        call: Callable,
        inputs: Tensor,
        names: list[str],
        again: bool = False,
    ) -> None:
        """Learn which dimension of what each layer reads has the images."""
        watched: dict[str, Optional[Adapter]] = {}
        for name in names:
            task = self._tasks[name]
            watched.update(dict.fromkeys(self._by_owner(task)))
            watched.update(task.adapters)
        for layer, dim in self._dims.items():
            if dim is not None or not again:
                watched.pop(layer, None)
        if not watched:
            return
        probe = inputs[:1].expand(2, *inputs.shape[1:])
        if inputs.is_floating_point():
            rng = torch.Generator().manual_seed(0)
            probe = torch.randn(probe.shape, generator=rng).to(inputs)
        elif len(inputs) > 1:
            probe = inputs[:2]
        seen: list[dict[str, list[Tensor]]] = []
        for batch in (probe[:1], probe):
            seen.append({layer: [] for layer in watched})
            with contextlib.ExitStack() as stack:
                for layer, adapter in watched.items():
                    module = self.model.get_submodule(layer)
                    for handle in _record(module, adapter, seen[-1][layer]):
                        stack.callback(handle.remove)
                call(batch)
        one, two = seen
        for layer in watched:
            self._dims[layer] = _dimension(layer, one[layer], two[layer])


class _UnknownLayer(RuntimeError):
    """A layer is called of which it is not known where its images are."""


class _Images(NamedTuple):
    """Some images of a batch in what a layer reads.

    Attributes:
        dim (int, optional): Their dimension.
        rows (list[int]): Their indices.
        number (int): Images in the batch.
        name (str): Of the layer, for messages.
    """

    dim: Optional[int]
    rows: list[int]
    number: int
    name: str

    def index(self, x: Tensor) -> Tensor:
        """Compute their indices in a tensor."""
        if self.dim is None:
            raise _UnknownLayer(self.name)
        each, rest = divmod(x.shape[self.dim], self.number)
        if rest:
            raise ValueError(
                f'{self.name} reads {x.shape[self.dim]} rows for '
                f'{self.number} images, so they cannot be told apart; run a '
                'batch per task (using)'
            )
        first = torch.tensor(self.rows, device=x.device)[:, None] * each
        return (first + torch.arange(each, device=x.device)).flatten()


def _routed(images: _Images, adapter: Adapter) -> Callable:
    """Make what computes some images by an adapter, as its ``forward``."""

    def forward(*args: Any) -> Tensor:
        *layer, x = args
        index = images.index(x)
        new = adapter(*layer, x.index_select(images.dim, index))
        if not layer:
            return x.index_copy(images.dim, index, new)
        shape = list(new.shape)
        shape[images.dim] = new.shape[images.dim] // len(images.rows)
        shape[images.dim] *= images.number
        return new.new_zeros(shape).index_copy(images.dim, index, new)

    return forward


def _replaced(images: _Images, entries: dict[str, Tensor]) -> Callable:
    """Make the forward hook that computes some images by other weights."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        index = images.index(args[0])
        own = (module._parameters, module._buffers)
        former = [dict(values) for values in own]
        for key, value in entries.items():
            own[key in module._buffers][key] = value
        try:
            # Not by a call, which would come back here.
            new = module.forward(args[0].index_select(images.dim, index))
        finally:
            for values, before in zip(own, former):
                values.update(before)
        return output.index_copy(images.dim, index, new)

    return hook


def _refusal(name: str, owner: str) -> Callable:
    def refuse(module: nn.Module, args: tuple) -> None:
        raise ValueError(
            f'task {name!r} has a {owner} of its own, whose output may have '
            'another shape; run what comes before it as a mixed batch '
            '(call=model.extract_feat), and it by using(task, '
            'adapters=False)'
        )

    return refuse


def _record(
    module: nn.Module, adapter: Optional[Adapter], seen: list[Tensor]
) -> list[RemovableHandle]:
    """Register hooks that note what a layer reads and change nothing."""

    def note(*args: Any) -> Tensor:
        *layer, x = args
        seen.append(x)
        return x.new_zeros(()) if layer else x

    if adapter is not None:
        return adapter.register(module, note)
    return [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ]


def _dimension(
    name: str, one: list[Tensor], two: list[Tensor]
) -> Optional[int]:
    """Find the dimension of the images in what a layer reads.

    Args:
        name (str): Of the layer, for messages.
        one (list[Tensor]): What it read of one image, call by call.
        two (list[Tensor]): What it read of this image and another one.

    Returns:
        int, optional: None if it was not called.

    Raises:
        ValueError: If the first half of none is the first image.
    """
    found = set()
    for x, both in zip(one, two):
        dims = [
            dim
            for dim in range(x.dim())
            if both.dim() == x.dim()
            and both.shape[dim] == 2 * x.shape[dim]
            and both.narrow(dim, 0, x.shape[dim]).shape == x.shape
            and _alike(x, both.narrow(dim, 0, x.shape[dim]))
        ]
        found.add(dims[0] if len(dims) == 1 else None)
    if len(one) != len(two) or len(found) > 1 or None in found:
        raise ValueError(
            f'what {name} reads is not one image after the other (shape '
            f'{tuple(one[0].shape) if one else ()} of one image), so tasks '
            'cannot be mixed there; run a batch per task (using)'
        )
    return found.pop() if found else None


def _alike(x: Tensor, other: Tensor) -> bool:
    gap = (x.float() - other.float()).abs().max()
    return bool(gap <= _ROUNDING * x.float().abs().max())


def _updated(updates: dict[nn.Module, Update]) -> list[tuple]:
    """Compute weights with their low-rank updates, in float32 at least."""
    new = []
    for layer, update in updates.items():
        weight = at_least_float32(layer.weight)
        A, B = update.A.to(weight), update.B.to(weight)
        value = torch.addmm(
            weight.flatten(1), B, A.flatten(1), alpha=update.scale
        )
        new.append((layer, 'weight', value.view_as(weight)))
        if update.bias is not None:
            shift = update.scale * update.bias
            if layer.bias is not None:
                shift = layer.bias.double() + shift
            new.append((layer, 'bias', shift))
    return new
