"""Dynamic convolution: the public functions and their checks."""

from collections.abc import Sequence
from typing import Optional, Union

from torch import Tensor

from ..backend import _requested
from . import grouped, op
from .reference import (
    compute_dtype,
    dynamic_conv2d_reference,
    dynamic_linear_reference,
)

__all__ = ['dynamic_conv2d', 'dynamic_linear']

BACKENDS = ('auto', 'torch', 'reference')
IntPair = Union[int, Sequence[int]]


def dynamic_conv2d(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor] = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    backend: str = 'auto',
) -> Tensor:
    """Convolve each image with its own mixture of ``M`` kernels.

    ParameterNet, section 3.2: ``Y_b = X_b * sum_m a_bm W_m``. Kernels are
    mixed in the type of the weights or of the attention, whichever is wider
    (under autocast float32), and cast to the type of the convolution.

    Args:
        x (Tensor): Shape (B, C_in, H, W), of any strides in memory.
        weight (Tensor): ``W``, shape (M, C_out, C_in / groups, kh, kw).
        attention (Tensor): ``a``, shape (B, M).
        bias (Tensor, optional): Mixed as the kernels are, shape (M, C_out).
            Defaults to None.
        stride, padding, dilation (int | Sequence[int]): One value or (y, x),
            as in ``torch.nn.functional.conv2d``.
        groups (int): Of the convolution. Defaults to 1.
        backend (str): 'auto', 'torch' or 'reference'. There are no kernels
            in Triton; the products are those of the device's libraries.
            Defaults to 'auto'.

    Returns:
        Tensor: Shape (B, C_out, H_out, W_out).

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check_conv(x, weight, attention, bias, groups)
    stride = _pair('stride', stride, 1)
    padding = _pair('padding', padding, 0)
    dilation = _pair('dilation', dilation, 1)
    geometry = stride, padding, dilation, groups
    if _choose(backend) == 'reference':
        return dynamic_conv2d_reference(x, weight, attention, bias, *geometry)
    return _run(x.to(compute_dtype(x)), weight, attention, bias, *geometry)


def dynamic_linear(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor] = None,
    backend: str = 'auto',
) -> Tensor:
    """Apply to each image's tokens its own mixture of ``M`` matrices.

    Args:
        x (Tensor): Shape (B, ..., C_in).
        weight (Tensor): Shape (M, C_out, C_in).
        attention (Tensor): Shape (B, M).
        bias (Tensor, optional): Shape (M, C_out). Defaults to None.
        backend (str): As in :func:`dynamic_conv2d`. Defaults to 'auto'.

    Returns:
        Tensor: Shape (B, ..., C_out).

    Raises:
        ValueError: If shapes do not fit together.
    """
    _check_linear(x, weight, attention, bias)
    if _choose(backend) == 'reference':
        return dynamic_linear_reference(x, weight, attention, bias)
    # Tokens are a channels-last map of one column.
    tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    out = _run(
        tokens.to(compute_dtype(x)).mT.unsqueeze(3),
        weight[..., None, None],
        attention,
        bias,
    )
    return out.squeeze(3).mT.reshape(*x.shape[:-1], weight.shape[1])


def _run(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Run the PyTorch implementation, as an operator where one is needed."""
    given = x, weight, attention, bias
    geometry = list(stride), list(padding), list(dilation), groups
    run = grouped.conv2d if op.runs_directly(*given) else op.conv2d
    return run(*given, *geometry)


def _choose(requested: str) -> str:
    """'torch' or 'reference'; who asks for Triton everywhere gets 'torch'."""
    if requested not in BACKENDS:
        raise ValueError(
            f'backend={requested!r} is none that dynamic convolution has; '
            f'choose one of {BACKENDS}'
        )
    name, _ = _requested(requested)
    return 'reference' if name == 'reference' else 'torch'


# See lors_plugin.ops.backend.
_choose._dynamo_marked_constant = True


def _pair(name: str, value: IntPair, minimum: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < minimum:
        raise ValueError(
            f'{name}={value} must be one or two whole numbers of at least '
            f'{minimum}'
        )
    return pair


def _check_conv(x, weight, attention, bias, groups):
    if x.dim() != 4 or weight.dim() != 5:
        raise ValueError(
            'x must have shape (B, C_in, H, W) and weight (M, C_out, '
            f'C_in / groups, kh, kw), got {tuple(x.shape)} and '
            f'{tuple(weight.shape)}'
        )
    if groups < 1 or x.shape[1] != groups * weight.shape[2]:
        raise ValueError(
            f'x of {x.shape[1]} channels does not fit {groups} groups of '
            f'kernels for {weight.shape[2]} channels each'
        )
    if weight.shape[1] % groups:
        raise ValueError(
            f'{weight.shape[1]} output channels are not divisible by '
            f'groups={groups}'
        )
    _check_mixture(x, weight, attention, bias)


def _check_linear(x, weight, attention, bias):
    if x.dim() < 2 or weight.dim() != 3 or x.shape[-1] != weight.shape[2]:
        raise ValueError(
            'x must have shape (B, ..., C_in) and weight (M, C_out, C_in), '
            f'got {tuple(x.shape)} and {tuple(weight.shape)}'
        )
    _check_mixture(x, weight, attention, bias)


def _check_mixture(x, weight, attention, bias):
    if attention.shape != (len(x), len(weight)):
        raise ValueError(
            f'attention must have shape (B, M) = ({len(x)}, {len(weight)}), '
            f'got {tuple(attention.shape)}'
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f'bias must have shape (M, C_out) = {tuple(weight.shape[:2])}, '
            f'got {tuple(bias.shape)}'
        )
