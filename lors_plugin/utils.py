"""Small helpers that several parts of the package need."""

import math
import os
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Union

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn


def per_layer(
    name: str,
    value: Union[int, Sequence[int]],
    num_layers: int,
    minimum: int = 1,
) -> list[int]:
    """Spread one value over all layers, or check a list of values.

    Args:
        name (str): The option, for the error message.
        value (int | Sequence[int]): One value, or one for each layer.
        num_layers (int): Number of layers.
        minimum (int): Smallest allowed value. Defaults to 1.

    Returns:
        list[int]: ``num_layers`` values.

    Raises:
        ValueError: If the list has another length or a value is too small.
    """
    check_at_least('num_layers', num_layers, 1)
    a_list = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if a_list else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(
            f'{name}={values} has {len(values)} values for {num_layers} '
            f'layers; give one value for all or exactly {num_layers}'
        )
    if any(not isinstance(v, int) or v < minimum for v in values):
        raise ValueError(
            f'{name}={value} must hold whole numbers of at least {minimum}'
        )
    return values


def check_at_least(name: str, value: int, minimum: int = 1) -> int:
    """Return a whole number, or raise an error that names the option."""
    if not isinstance(value, Integral) or value < minimum:
        raise ValueError(
            f'{name}={value!r} must be a whole number of at least {minimum}'
        )
    return value


def check_number(
    name: str,
    value: float,
    minimum: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return a number, or raise an error that names the option.

    Args:
        name (str): The option, for the error message.
        value (float): Its value.
        minimum (float): The smallest that is allowed. Defaults to -inf.
        below (float): What it must be less than. Defaults to inf, so that
            infinity is refused.

    Returns:
        float: ``value``.
    """
    number = isinstance(value, Real) and math.isfinite(value)
    if not number or not minimum <= value < below:
        bounds = f' of at least {minimum}' * (
            minimum > -math.inf
        ) + f' below {below}' * (below < math.inf)
        raise ValueError(f'{name}={value!r} must be a finite number{bounds}')
    return value


def check_positive(name: str, value: float) -> float:
    """Return a number above 0, or raise an error that names the option."""
    if check_number(name, value) <= 0:
        raise ValueError(f'{name}={value!r} must be positive')
    return value


def check_choice(name: str, value: Any, choices: Sequence) -> Any:
    """Return one of some values, or raise an error that names the option."""
    if value not in list(choices):
        raise ValueError(f'{name}={value!r} must be one of {tuple(choices)}')
    return value


def check_pattern(name: str, pattern: Any) -> re.Pattern:
    """Compile a pattern, or raise an error that names the option."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f'{name}: {pattern!r} is no regular expression ({error})'
        ) from None


def check_targets(targets: Any, example: str) -> None:
    """Raise an error unless targets are a list that is not empty."""
    listed = isinstance(targets, Sequence) and not isinstance(targets, str)
    if not listed or not targets:
        raise ValueError(
            f'targets={targets!r} must be a list of patterns, such as '
            f"['{example}']"
        )


def build_part(name: str, build: Callable[[dict], Any], cfg: dict) -> Any:
    """Build what an option describes; errors name the option.

    Args:
        name (str): The option, for the error message.
        build (Callable): Builds a config.
        cfg (dict): With ``type``.

    Returns:
        Any: What was built.
    """
    if not isinstance(cfg, dict) or 'type' not in cfg:
        raise ValueError(f'{name}={cfg!r} must be a dict with a type')
    try:
        return build(cfg)
    except (KeyError, TypeError, ValueError) as error:
        text = str(error.args[0]) if error.args else str(error)
        raise ValueError(f'{name}={cfg!r}: {text}') from error


def check_divisible(name: str, value: int, by_name: str, by: int) -> int:
    """``value // by``, or an error that names both options."""
    check_at_least(name, value, 1)
    check_at_least(by_name, by, 1)
    if value % by:
        raise ValueError(f'{name}={value} must be divisible by {by_name}={by}')
    return value // by


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether a subclass of a PyTorch layer overrides its forward.

    MMCV's wrappers do not: they care for empty inputs of old versions.
    """
    kind = next(cls for cls in type(layer).__mro__ if 'forward' in vars(cls))
    known = ('torch.nn.modules', 'mmcv.cnn.bricks.wrappers')
    return not kind.__module__.startswith(known)


def at_least_float32(x: Tensor) -> Tensor:
    """Cast half-precision tensors up; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside parallel, test-time and compiling wrappers."""
    while True:
        if is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def part_of(model: nn.Module, name: str) -> nn.Module:
    """Return a part of a model by its name, '' for the model itself.

    Raises:
        ValueError: If there is none of that name.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f'{model!r} is no model (torch.nn.Module)')
    try:
        return model.get_submodule(name)
    except AttributeError:
        parts = [child for child, _ in model.named_children()]
        raise ValueError(
            f'{type(model).__name__} has no part {name!r}; there are {parts}, '
            "and '' is the model itself"
        ) from None


def type_name(kind: Any) -> str:
    """Return the name of a ``type`` in a config without its scope.

    Args:
        kind (str | type): A name, with or without scope, or in the new style
            of configs a class.
    """
    return str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1]


def few(names: Sequence, limit: int = 3) -> str:
    """Join the first few names as text; 'none' if there are none."""
    text = ', '.join(map(str, names[:limit])) or 'none'
    return text + (', ...' if len(names) > limit else '')


def text_table(rows: Sequence[Sequence], align: str = '<') -> str:
    """Lay out rows as text in columns.

    Args:
        rows (Sequence[Sequence]): Cells of each line, the header's first.
        align (str): ``'<'`` (left) or ``'>'`` (right) per column; the last
            one holds for all further columns. Defaults to ``'<'``.

    Returns:
        str: One line per row, two spaces between columns.
    """
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = align.ljust(len(widths), align[-1])
    return '\n'.join(
        '  '.join(
            f'{cell:{side}{width}}'
            for cell, side, width in zip(row, align, widths)
        ).rstrip()
        for row in rows
    )


def is_first_rank() -> bool:
    """Return whether this process is alone or the first one of its job.

    Known from the launcher's environment, before a process group is there.
    """
    rank = os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0'))
    return rank == '0'
