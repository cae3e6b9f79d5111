"""3D sampling as an operator that autograd and the compiler know."""

import importlib
from types import ModuleType

import torch
from torch.library import custom_op

from ..backend import is_plain
from .level_gradients import TableGradient, table_gradient

_MODULES = {'torch': 'table', 'triton': 'triton_kernels'}


def _implementation(backend: str) -> ModuleType:
    # Triton is imported by the first call that needs it.
    return importlib.import_module(f'.{_MODULES[backend]}', __package__)


@custom_op(
    'lors_plugin::sampling_3d',
    mutates_args=(),
    schema='(Tensor table, Tensor points, SymInt[] sizes, int[] strides, '
    'str backend) -> Tensor',
)
def sampling_forward(table, points, sizes, strides, backend):
    """See :func:`lors_plugin.ops.sampling_3d.table.forward`."""
    return _implementation(backend).forward(table, points, sizes, strides)


@sampling_forward.register_fake
def _(table, points, sizes, strides, backend):
    batch, queries, groups, number, _ = points.shape
    width = table.shape[1] // groups
    if backend == 'triton':
        return table.new_empty(batch, queries, groups, number, width)
    out = table.new_empty(groups, batch, queries, number, width)
    return out.permute(1, 2, 0, 3, 4)


@custom_op(
    'lors_plugin::sampling_3d_backward',
    mutates_args=(),
    schema='(Tensor grad_out, Tensor table, Tensor points, SymInt[] sizes, '
    'int[] strides, bool[] needs, str backend) -> (Tensor, Tensor)',
)
def sampling_backward(grad_out, table, points, sizes, strides, needs, backend):
    """Compute the gradients of table and points, empty where not needed.

    See :func:`.level_gradients.table_gradient` and
    :func:`.table.points_gradient`.
    """
    grad_table, grad_points = table.new_empty(0), points.new_empty(0)
    if needs[0]:
        terms = [(grad_out, points)]
        grad_table = table_gradient(terms, table.shape, sizes, strides)
    if needs[1]:
        run = _implementation(backend).points_gradient
        grad_points = run(grad_out, table, points, sizes, strides)
    return grad_table, grad_points


@sampling_backward.register_fake
def _(grad_out, table, points, sizes, strides, needs, backend):
    return tuple(
        t.new_empty(t.shape if need else 0)
        for t, need in zip((table, points), needs)
    )


def _setup_context(ctx, inputs, output):
    table, points, ctx.sizes, ctx.strides, ctx.backend = inputs
    ctx.save_for_backward(table, points)


def _backward(ctx, grad_out):
    table, points = ctx.saved_tensors
    needs, levels = list(ctx.needs_input_grad[:2]), (ctx.sizes, ctx.strides)
    grads = [None, None]
    if (
        needs[0]
        and not torch.is_grad_enabled()  # no gradient of the gradient
        and is_plain((grad_out, table, points))
    ):
        terms = [(grad_out.detach(), points.detach())]
        grads[0] = TableGradient(terms, table.shape, *levels)
        needs[0] = False
    if any(needs):
        found = sampling_backward(
            grad_out, table, points, *levels, needs, ctx.backend
        )
        grads = [f if need else g for f, g, need in zip(found, grads, needs)]
    return *grads, None, None, None


sampling_forward.register_autograd(_backward, setup_context=_setup_context)
