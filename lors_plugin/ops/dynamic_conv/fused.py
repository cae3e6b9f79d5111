"""Dynamic convolution in plain PyTorch: fast, on any device.

Pointwise convolutions are batched matrix products, which need none of the
copies into blocked layouts that a grouped convolution makes. All others are
one convolution with ``B`` times the groups. Mixed kernels are never kept for
backward, where mixing them again costs less than memory that is fetched anew.

On a CPU the kernels are mixed for so few images at once that the C library
gives out memory that it has, instead of asking the system for fresh pages
each time: that costs more than the arithmetic. Small layers and small batches
are one piece.

Shapes: ``B`` images, ``M`` experts, ``L`` places or tokens of an image.
"""

from collections.abc import Iterator
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import mix_experts

# glibc asks the system for results of 32 MB and more each time.
PIECE_BYTES = 16 * 2**20
Geometry = tuple[list, list, list, int]
GradMask = tuple[bool, bool, bool, bool]


def conv2d(
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """See :func:`lors_plugin.ops.dynamic_conv2d`; ``x`` has the final type.

    The result is laid out as ``x`` is, contiguous or channels last.
    """
    geometry = stride, padding, dilation, groups
    last = channels_are_last(x)
    if len(x) == 1:
        out = _grouped(x, weight, attention, bias, geometry, last)
        return out.contiguous(memory_format=memory_format(last))
    if not len(x):
        return F.conv2d(x, weight[0].to(x.dtype), None, *geometry)
    if is_pointwise(weight, geometry):
        tokens = _tokens(x, last)
        out = _product(tokens, weight.flatten(2), attention, bias, last)
        return _maps(out, x, last)
    outs = [
        _grouped(x[i], weight, attention[i], bias, geometry, last)
        for i in pieces(x, weight)
    ]
    return _joined(outs, x, last)


def conv2d_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    geometry: Geometry,
    needed: GradMask,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of :func:`conv2d`.

    Args:
        grad_out (Tensor): Of the result.
        x, weight, attention, bias (Tensor): As in :func:`conv2d`.
        geometry (tuple): Stride, padding, dilation and groups.
        needed (tuple[bool]): Which of the four gradients are needed.

    Returns:
        tuple[Tensor | None]: Gradients of x, weight, attention and bias.
    """
    last = channels_are_last(x)
    if is_pointwise(weight, geometry) and len(x):
        given = _tokens(grad_out, last), _tokens(x, last), weight.flatten(2)
        grads = _product_backward(*given, attention, bias, last, needed)
        grad_x, grad_weight, *rest = grads
        if grad_x is not None:
            grad_x = _maps(grad_x, x, last)
        if grad_weight is not None:
            grad_weight = grad_weight.view(weight.shape)
        return grad_x, grad_weight, *rest
    sums = Sums(weight, attention, bias, needed)
    grad_xs = []
    for i in pieces(x, weight):
        kernels = mix_experts(weight, attention[i]).to(x.dtype)
        number = len(kernels)
        grad_piece, grad_kernels, _ = torch.ops.aten.convolution_backward(
            _side_by_side(grad_out[i], last),
            _side_by_side(x[i], last),
            kernels.flatten(0, 1),
            None,
            *geometry[:3],
            False,
            [0, 0],
            number * geometry[3],
            [needed[0], sums.of_kernels, False],
        )
        if needed[0]:
            grad_xs.append(_apart(grad_piece, number))
        sums.add(i, grad_kernels, grad_out, (2, 3))
    grad_x = None
    if needed[0]:
        grad_x = _joined(grad_xs, x, last)
    return grad_x, *sums.results()


def linear(
    x: Tensor, weight: Tensor, attention: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """See :func:`lors_plugin.ops.dynamic_linear`; ``x`` is (B, L, C_in)."""
    return _product(x, weight, attention, bias, True)


def linear_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    attention: Tensor,
    bias: Optional[Tensor],
    needed: GradMask,
) -> tuple[Optional[Tensor], ...]:
    """Gradients of :func:`linear`, as :func:`conv2d_backward` gives them."""
    return _product_backward(
        grad_out, x, weight, attention, bias, True, needed
    )


def is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is a matrix product of all places."""
    stride, padding, _, groups = geometry
    return groups == max(stride) == 1 and is_one_place(weight, padding)


def is_one_place(weight: Tensor, padding: list[int]) -> bool:
    """Whether each place of the result comes from one of the input."""
    return weight.shape[3] == weight.shape[4] == 1 and max(padding) == 0


def output_size(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """Height and width of the result."""
    stride, padding, dilation, _ = geometry
    return [
        (x.shape[2 + i] + 2 * padding[i] - d * (weight.shape[3 + i] - 1) - 1)
        // stride[i]
        + 1
        for i, d in enumerate(dilation)
    ]


def pieces(x: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the batch ``x`` whose mixed kernels are small enough."""
    batch = step = len(x)
    if x.device.type == 'cpu':
        kernel = max(weight[0].numel() * weight.element_size(), 1)
        step = min(PIECE_BYTES // kernel, batch)
    step = max(step, 1)
    for start in range(0, batch, step):
        yield slice(start, start + step)


def channels_are_last(x: Tensor) -> bool:
    """Whether maps (B, C, H, W) have their channels side by side."""
    return not x.is_contiguous() and x.is_contiguous(
        memory_format=torch.channels_last
    )


def memory_format(last: bool) -> torch.memory_format:
    """The name that PyTorch has for it."""
    return torch.channels_last if last else torch.contiguous_format


def _grouped(x, weight, attention, bias, geometry, last):
    """One convolution for several images."""
    *rest, groups = geometry
    kernels = mix_experts(weight, attention).to(x.dtype).flatten(0, 1)
    if bias is not None:
        bias = mix_experts(bias, attention).to(x.dtype).flatten()
    number = len(x)
    if number == 1:
        return F.conv2d(x, kernels, bias, *geometry)
    x = _side_by_side(x, last)
    return _apart(F.conv2d(x, kernels, bias, *rest, number * groups), number)


def _side_by_side(x: Tensor, last: bool) -> Tensor:
    """Images as channels of one, (B, C, H, W) to (1, B C, H, W).

    It stays in its layout: channels last are those of all images then.
    """
    if len(x) == 1:
        return x
    if last:
        return x.permute(2, 3, 0, 1).flatten(2)[None].permute(0, 3, 1, 2)
    return x.reshape(1, -1, *x.shape[2:])


def _apart(x: Tensor, number: int) -> Tensor:
    """Back again, as a view."""
    return x.squeeze(0).unflatten(0, (number, -1))


def _joined(parts: list[Tensor], like: Tensor, last: bool) -> Tensor:
    """All pieces as one, laid out as wanted; of no piece no image."""
    if not parts:
        return like.new_empty(like.shape)
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.contiguous(memory_format=memory_format(last))


def _tokens(x: Tensor, last: bool) -> Tensor:
    """Maps as matrices: (B, C, L), or (B, L, C) if channels are last."""
    if last:
        return x.permute(0, 2, 3, 1).flatten(1, 2)
    return x.flatten(2)


def _maps(tokens: Tensor, like: Tensor, last: bool) -> Tensor:
    """Back again, with the height and width of ``like``."""
    size = like.shape[2:]
    if last:
        return tokens.unflatten(1, size).permute(0, 3, 1, 2)
    return tokens.unflatten(2, size)


def _product(x, weight, attention, bias, last):
    """``W_b x_b``, or ``x_b W_b^T`` if channels are last."""
    batch, length = len(x), x.shape[1 if last else 2]
    rows = weight.shape[1]
    shape = (batch, length, rows) if last else (batch, rows, length)
    out = None
    for i in pieces(x, weight):
        matrices = mix_experts(weight, attention[i]).to(x.dtype)
        given = x[i], matrices.mT
        if not last:
            given = matrices, x[i]
        if i.stop >= batch and out is None:  # the only piece
            out = torch.bmm(*given)
            break
        if out is None:
            out = x.new_empty(shape)
        torch.bmm(*given, out=out[i])
    if out is None:
        out = x.new_empty(shape)
    if bias is not None:
        offsets = mix_experts(bias, attention).to(x.dtype)
        out += offsets.unsqueeze(1 if last else 2)
    return out


def _product_backward(grad_out, x, weight, attention, bias, last, needed):
    sums = Sums(weight, attention, bias, needed)
    grad_x = x.new_empty(x.shape) if needed[0] else None
    for i in pieces(x, weight):
        grad, given = grad_out[i], x[i]
        if needed[0]:
            matrices = mix_experts(weight, attention[i]).to(x.dtype)
            pair = (grad, matrices) if last else (matrices.mT, grad)
            torch.bmm(*pair, out=grad_x[i])
            del matrices
        grad_matrices = None
        if sums.of_kernels:
            pair = (grad.mT, given) if last else (grad, given.mT)
            grad_matrices = torch.bmm(*pair)
        sums.add(i, grad_matrices, grad_out, (1,) if last else (2,))
    return grad_x, *sums.results()


class Sums:
    """Gradients that all images add to.

    Args:
        weight (Tensor): Shape (M, C_out, ...).
        attention (Tensor): Shape (B, M).
        bias (Tensor, optional): Shape (M, C_out).
        needed (tuple[bool]): Of x, weight, attention and bias.
    """

    def __init__(self, weight, attention, bias, needed):
        self.weight, self.attention, self.bias = weight, attention, bias
        _, with_weight, with_attention, with_bias = needed
        self.of_kernels = with_weight or with_attention
        self.of_offsets = bias is not None and (with_attention or with_bias)
        self.needed = needed[1:]
        # Those of the experts are made by the first piece.
        self.grads = [None, None, None]
        if with_attention:
            self.grads[1] = torch.zeros_like(attention)

    def add(self, i, grad_kernels, grad_out, places):
        """Add a piece.

        Args:
            i (slice): Its images.
            grad_kernels (Tensor): Of their kernels.
            grad_out (Tensor): Of all results.
            places (tuple[int]): Dimensions to sum for the offsets.
        """
        if self.of_kernels:
            self._add(i, grad_kernels, self.weight, 0)
        if self.of_offsets:
            grad = grad_out[i].sum(places, dtype=self.bias.dtype)
            self._add(i, grad, self.bias, 2)

    def _add(self, i, grad, experts, index):
        grad = grad.reshape(-1, experts[0].numel()).to(experts.dtype)
        attention = self.attention[i].to(experts.dtype)
        if self.needed[index]:
            total = self.grads[index]
            if total is None:
                total = attention.mT @ grad
                self.grads[index] = total.view(experts.shape)
            else:
                total.view(len(experts), -1).addmm_(attention.mT, grad)
        if self.grads[1] is not None:
            self.grads[1][i] += grad @ experts.flatten(1).mT

    def results(self):
        """Gradients of weight, attention and bias; without images zero."""
        given = self.weight, self.attention, self.bias
        return tuple(
            torch.zeros_like(t) if need and grad is None else grad
            for t, need, grad in zip(given, self.needed, self.grads)
        )
