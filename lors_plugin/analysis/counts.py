"""Count parameters, multiply-adds and memory of a forward pass."""

import functools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lors_plugin.build import (
    build_model,
    image_channels,
    is_detector,
    padded_shape,
    test_shape,
)

from .flops import (
    elementwise_results,
    has_formula,
    may_multiply,
    multiply_adds,
)
from .parts import SEPARATOR, part_of
from .weightless import EmptyWeights, WeightlessModel, countable

# Multiply-adds that a module does with pointwise operators: the learned
# scale of the overlap per head and pair of boxes, added to the logits.
_MODULES = dict(
    BoxSelfAttention=lambda m, query, overlap, *_: (
        0 if m.overlap_scale is None else m.num_heads * overlap.numel()
    )
)


class UncountableError(ValueError):
    """A model cannot run, or not on tensors without values."""


@dataclass
class PartCounts:
    """Counts of a part of a model.

    Attributes:
        parameters (int): Elements of all ``nn.Parameter``.
        trained (int): Those that require a gradient.
        shared (int): Those that one forward pass uses more than once, in
            several layers or for several inputs.
        multiply_adds (int): Products that are added to something.
        elementwise (int): Results of norms, activations, additions.
    """

    parameters: int = 0
    trained: int = 0
    shared: int = 0
    multiply_adds: int = 0
    elementwise: int = 0

    @property
    def private(self) -> int:
        """int: Parameters that one forward pass uses once."""
        return self.parameters - self.shared

    def __add__(self, other: 'PartCounts') -> 'PartCounts':
        mine, theirs = asdict(self), asdict(other)
        return PartCounts(**{k: mine[k] + theirs[k] for k in mine})


@dataclass
class ModelCounts:
    """Counts of a model and one input.

    Attributes:
        parts (dict[str, PartCounts]): By the names of
            :func:`lors_plugin.analysis.part_of`.
        saved_bytes (int): Kept by autograd for the backward pass.
        peak_bytes (int): Most that tensors take at once in inference,
            without weights.
        uncounted (dict[str, int]): Operators of unknown cost and how often
            they ran.
    """

    parts: dict[str, PartCounts] = field(default_factory=dict)
    saved_bytes: int = 0
    peak_bytes: int = 0
    uncounted: dict[str, int] = field(default_factory=dict)

    def within(self, prefix: str) -> PartCounts:
        """Sum over a part and its subdivisions, 'decoder' for example."""
        inside = (prefix + SEPARATOR, prefix + ':')
        found = [
            counts
            for name, counts in self.parts.items()
            if name == prefix or name.startswith(inside)
        ]
        return sum(found, PartCounts())

    @property
    def total(self) -> PartCounts:
        """PartCounts: Sum over all parts."""
        return sum(self.parts.values(), PartCounts())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dict(asdict(self), total=asdict(self.total))


@dataclass
class ConfigCounts:
    """Counts of the model of a config.

    Attributes:
        counts (ModelCounts): For the whole batch.
        shape (tuple[int]): Height and width of the images.
        padded_shape (tuple[int]): The same after padding.
    """

    counts: ModelCounts
    shape: tuple[int, int]
    padded_shape: tuple[int, int]


def count_config(
    cfg: dict,
    shape: Optional[tuple[int, int]] = None,
    batch: int = 1,
    real: bool = False,
) -> ConfigCounts:
    """Count the model of a config.

    Args:
        cfg (Config | dict): The whole config.
        shape (tuple[int], optional): Height and width of the images; by
            default :func:`test_shape`.
        batch (int): Number of images. Defaults to 1.
        real (bool): Run on the CPU with weights and values, as models need
            whose control flow depends on values. Defaults to False.

    Returns:
        ConfigCounts: The counts.

    Raises:
        UncountableError: If the model cannot run that way.
    """
    shape = tuple(shape) if shape else test_shape(cfg)
    context = ExitStack()
    try:
        if real:
            model = build_model(cfg)
        else:
            context = _build_weightless(cfg)
            model = context.module
        with context:
            counts = count_model(model, make_forward(model, shape, batch))
    except (RuntimeError, NotImplementedError) as error:
        # FakeTensor raises these too where control flow depends on values.
        how = 'cannot run' if real else 'cannot run without numbers'
        kind, reason = cfg['model']['type'], str(error).split('\n')[0]
        raise UncountableError(f'{kind} {how}: {reason}') from error
    return ConfigCounts(counts, shape, padded_shape(model, shape))


def _build_weightless(cfg: dict) -> WeightlessModel:
    try:
        with EmptyWeights():
            model = build_model(cfg)
        return WeightlessModel(model)
    except (RuntimeError, NotImplementedError):
        # Its constructor reads values of its weights.
        return WeightlessModel(build_model(cfg))


def make_forward(
    model: nn.Module, shape: tuple[int, int], batch: int = 1
) -> Callable[[], Any]:
    """Return a function that runs the model in ``mode='tensor'``.

    Args:
        model (nn.Module): A detector or a classifier.
        shape (tuple[int]): Height and width of the images.
        batch (int): Number of images. Defaults to 1.

    Returns:
        Callable: Without arguments; it makes its own input.
    """
    padded = padded_shape(model, shape)
    channels, detector = image_channels(model), is_detector(model)

    def forward():
        images = torch.zeros(batch, channels, *padded)
        samples = None
        if detector:
            samples = [_detection_sample(shape, padded) for _ in range(batch)]
        return model(images, samples, mode='tensor')

    return forward


def _detection_sample(shape, padded):
    """Make a sample with one box, which some heads need in training."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    height, width = shape
    return DetDataSample(
        gt_instances=InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, width, height]]),
            labels=torch.zeros(1, dtype=torch.long),
        ),
        metainfo=dict(
            img_id=0,
            img_shape=shape,
            ori_shape=shape,
            pad_shape=padded,
            batch_input_shape=padded,
            scale_factor=(1.0, 1.0),
        ),
    )


def count_model(
    model: nn.Module, forward: Callable[[], Any], with_memory: bool = True
) -> ModelCounts:
    """Count a forward pass, in inference and in training.

    Args:
        model (nn.Module): Mode and running statistics are restored.
        forward (Callable): Runs the model once.
        with_memory (bool): Run it a second time as in training, for the
            bytes that the backward pass needs. Defaults to True.

    Returns:
        ModelCounts: The counts.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    saved = SavedForBackward(model)
    try:
        # Frozen layers may stop requiring gradients in `train()` only.
        model.train()
        if with_memory:
            with torch.enable_grad(), countable(model), saved:
                forward()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        model.eval()
        counter = OperatorCounter(model)
        with torch.no_grad(), counter:
            forward()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
    parts: dict[str, PartCounts] = {}

    def add(name: str, **numbers: int) -> None:
        key = part_of(name)
        parts[key] = parts.get(key, PartCounts()) + PartCounts(**numbers)

    for name, parameter in model.named_parameters():
        size = parameter.numel()
        add(
            name,
            parameters=size,
            trained=size if name in trained else 0,
            shared=size if len(counter.uses[name]) > 1 else 0,
        )
    for name, number in counter.multiply_adds.items():
        add(name, multiply_adds=number)
    for name, number in counter.elementwise.items():
        add(name, elementwise=number)
    return ModelCounts(
        parts, saved.total, counter.memory.peak, dict(counter.uncounted)
    )


class OperatorCounter:
    """Count the operators that run inside the context.

    The work of an operator is booked under the parameter that it takes or
    else under the module whose ``forward`` calls it; see also
    :func:`lors_plugin.analysis.weightless.countable`.

    Args:
        model (nn.Module): The model that runs inside the context.

    Attributes:
        multiply_adds (Counter): By the name of a parameter or module.
        elementwise (Counter): Results of norms, activations, additions and
            the like, by the name of a module.
        uses (dict[str, set]): Calls of modules that used a parameter.
        uncounted (Counter): Operators of neither kind.
        memory (LiveMemory): Of all tensors made inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.multiply_adds: Counter = Counter()
        self.elementwise: Counter = Counter()
        self.uses: dict[str, set] = defaultdict(set)
        self.uncounted: Counter = Counter()
        self.memory = LiveMemory(model)
        self._weights = _storages_of(model)
        self._running: list[tuple[str, int]] = [('', 0)]
        self._calls = 0
        self._context = ExitStack()

    def __enter__(self) -> 'OperatorCounter':
        self._context.enter_context(countable(self.model))
        for name, module in self.model.named_modules():
            enter = functools.partial(self._enter_module, name)
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(self._leave_module),
            ):
                self._context.callback(handle.remove)
        self._context.enter_context(_Watch(self._count))
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.close()

    def _enter_module(self, name, module, args):
        self._calls += 1
        self._running.append((name, self._calls))

    def _leave_module(self, module, args, out):
        name, _ = self._running.pop()
        formula = _MODULES.get(type(module).__name__)
        if formula is not None:
            self.multiply_adds[name] += formula(module, *args)

    def _count(self, func, args, kwargs, out) -> None:
        """Count one call of an operator."""
        module, call = self._running[-1]
        self.memory.track(out)
        if _is_view(func):
            return
        names = [self._name(tensor) for tensor in tree_leaves((args, kwargs))]
        names = [name for name in names if name]
        for name in names:
            self.uses[name].add(call)
        results = elementwise_results(func, args, out)
        if results:
            self.elementwise[module] += results
        if has_formula(func):
            # A bias comes before the weight in `addmm`, after it elsewhere.
            weights = (n for n in names if 'bias' not in n)
            ours = func.namespace == 'lors_plugin'
            owner = module if ours else next(weights, module)
            for kind, count in multiply_adds(func, args, kwargs, out).items():
                where = f'{module}.{kind}'.lstrip('.') if kind else owner
                if count:
                    self.multiply_adds[where] += count
        elif not results and may_multiply(func):
            self.uncounted[func._schema.name] += 1

    def _name(self, tensor) -> Optional[str]:
        if not isinstance(tensor, Tensor):
            return None
        return self._weights.get(tensor.untyped_storage()._cdata)


class _Watch(TorchDispatchMode):
    """Call a function for each operator that runs."""

    def __init__(self, tell: Callable) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == 'prim':  # asks for the device of a tensor
            return func(*args, **kwargs)
        if _is_composite(func) and not has_formula(func):
            # Composite ones stay whole where no gradients are recorded.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self.tell(func, args, kwargs, out)
        return out


@functools.cache
def _is_composite(func) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), 'CompositeImplicitAutograd'
    )


@functools.cache
def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


class SavedForBackward(saved_tensors_hooks):
    """Sum the bytes that autograd keeps for the backward pass.

    Each storage counts once, however many operators keep it; the model's own
    parameters and buffers do not count.

    Args:
        model (nn.Module): The model that runs inside the context.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = _storages_of(model)
        self._kept: dict[int, Tensor] = {}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._weights:
            self._kept[key] = tensor.detach()
        return tensor

    @property
    def total(self) -> int:
        """int: Bytes so far."""
        return sum(t.untyped_storage().nbytes() for t in self._kept.values())


class LiveMemory:
    """Track the bytes of live tensors, and their peak.

    Args:
        model (nn.Module): Its parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = set(_storages_of(model))
        self.now = 0
        self.peak = 0

    def track(self, tensors: Any) -> None:
        """Count new tensors, in any nesting, until they are freed."""
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.now += size
                weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages_of(model: nn.Module) -> dict[int, str]:
    """Names of parameters and buffers by their storage."""
    named = [*model.named_buffers(), *model.named_parameters()]
    return {t.untyped_storage()._cdata: name for name, t in named}
