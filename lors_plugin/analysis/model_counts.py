"""Counts of a whole model, part by part."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .counter import OperatorCounter
from .memory import SavedForBackward
from .parts import SEPARATOR, part_of
from .stand_ins import counted_modules


@dataclass
class PartCounts:
    """Counts of a part of a model.

    Attributes:
        parameters (int): Numbers in all ``nn.Parameter``.
        trained (int): Those of them that ask for a gradient.
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
            :func:`lors_plugin.analysis.parts.part_of`.
        saved_bytes (int): What autograd keeps for the backward pass.
        peak_bytes (int): The most that tensors take at once in inference,
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
        return sum(
            (
                counts
                for name, counts in self.parts.items()
                if name == prefix
                or name.startswith((prefix + SEPARATOR, prefix + ':'))
            ),
            PartCounts(),
        )

    @property
    def total(self) -> PartCounts:
        """PartCounts: Sum over all parts."""
        return sum(self.parts.values(), PartCounts())

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return dict(asdict(self), total=asdict(self.total))


def count_model(
    model: nn.Module, forward: Callable[[], Any], with_memory: bool = True
) -> ModelCounts:
    """Count a forward pass, in inference and in training.

    Args:
        model (nn.Module): Left as it was, in mode and running statistics.
        forward (Callable): Runs the model once.
        with_memory (bool): Whether to run it a second time as in training,
            for the bytes that the backward pass needs. Defaults to True.

    Returns:
        ModelCounts: The counts.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    counts = ModelCounts()
    try:
        if with_memory:
            model.train()
            saved = SavedForBackward(model)
            with torch.enable_grad(), counted_modules(model), saved:
                forward()
            counts.saved_bytes = saved.total
        model.train()
        trained = {
            name for name, p in model.named_parameters() if p.requires_grad
        }
        model.eval()
        counter = OperatorCounter(model)
        with torch.no_grad(), counter:
            forward()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
    counts.peak_bytes = counter.memory.peak
    counts.uncounted = dict(counter.uncounted)
    parts = counts.parts
    for name, parameter in model.named_parameters():
        part = parts.setdefault(part_of(name), PartCounts())
        number = parameter.numel()
        part.parameters += number
        part.trained += number if name in trained else 0
        part.shared += number if len(counter.uses[name]) > 1 else 0
    for kind in ('multiply_adds', 'elementwise'):
        for name, number in getattr(counter, kind).items():
            if not number:
                continue
            part = parts.setdefault(part_of(name), PartCounts())
            setattr(part, kind, getattr(part, kind) + number)
    return counts
