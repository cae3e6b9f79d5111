"""Let the linear layers of a stack share their weight, in any model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
from mmengine.logging import print_log
from torch import nn

from lors_plugin.registry import MODELS
from lors_plugin.structure import build_module
from lors_plugin.utils import part_of, text_table

from .linear import LowRankResidualLinear
from .other_layers import (
    LowRankInProjection,
    LowRankMultiheadAttention,
    LowRankResidualConv2d,
)
from .plain_weights import factorize, read_plain_weights
from .targets import Stack, find_stacks, weight_of

INITS = ('kaiming', 'svd')


@dataclass
class SharedStack:
    """Counts of one stack.

    Attributes:
        names (list[str]): Of its layers in the model.
        before (int): Parameters of its weights before.
        after (int): Parameters of the shared weight and the low-rank parts.
        error (float, optional): Share of the norm of the weights that is
            lost, with ``init='svd'``.
    """

    names: list
    before: int
    after: int
    error: Optional[float] = None


@dataclass
class ShareReport:
    """Counts of all stacks that :func:`share_stack` changed.

    Attributes:
        stacks (list[SharedStack]): Each stack, in the order of the targets.
    """

    stacks: list

    @property
    def before(self) -> int:
        """int: Parameters of all these weights before; no biases."""
        return sum(stack.before for stack in self.stacks)

    @property
    def after(self) -> int:
        """int: Parameters of shared weights and low-rank parts."""
        return sum(stack.after for stack in self.stacks)

    def table(self) -> str:
        """Format the counts as text, one line per stack."""
        rows = [('stack', 'layers', 'before', 'after', 'lost')]
        for stack in self.stacks:
            rows.append(
                (
                    stack.names[0],
                    str(len(stack.names)),
                    f'{stack.before:,}',
                    f'{stack.after:,}',
                    '-' if stack.error is None else f'{stack.error:.1%}',
                )
            )
        rows.append(('all', '', f'{self.before:,}', f'{self.after:,}', ''))
        return text_table(rows, '<>')


def share_stack(
    model: nn.Module,
    targets: Sequence[Union[str, dict]],
    ranks: Union[int, Sequence[int]] = 32,
    groups: Union[int, Sequence[int]] = 1,
    init: str = 'kaiming',
    module: str = '',
    cycle: int = 1,
) -> ShareReport:
    r"""Let the layers of a stack share their weight (LORS^T).

    Each linear layer becomes a :class:`LowRankResidualLinear`: one weight for
    the whole stack, and a low-rank part and the bias of its own. So do
    convolutions, and the joint projection of queries, keys and values of
    PyTorch's attention, which a pattern finds as ``in_proj`` below its name.
    Everything else of the model stays. All is checked before the model is
    touched.

    Weights of a plain model can still be loaded: they are read as the mean
    of the layers and the best low-rank parts. ``reparameterize`` makes the
    plain model again.

    Args:
        model (nn.Module): Any model.
        targets (Sequence[str | dict]): A pattern (full match) for each kind
            of layer, such as ``r'layers\.(\d+)\.attn\.qkv'``. The last group
            is the number of the layer in its stack; earlier groups tell
            stacks apart. A dict has the ``pattern`` and ``ranks``,
            ``groups`` or ``cycle`` of its own.
        ranks (int | Sequence[int]): Rank of a parameter group, one value or
            one per layer. 0 leaves a layer without a private part. Defaults
            to 32.
        groups (int | Sequence[int]): Parameter groups ``K``, one value or
            one per layer. Defaults to 1.
        init (str): 'kaiming' draws weights as for a new model, all layers
            of a stack alike; 'svd' keeps what the layers have, as far as the
            ranks allow. Biases stay. Defaults to 'kaiming'.
        module (str): Name of the part of the model to which patterns refer.
            Defaults to the model itself.
        cycle (int): Layers ``i``, ``i + cycle``, ``i + 2 cycle`` ... share,
            so that as many weights are kept for the stack. Defaults to 1:
            all layers share one weight.

    Returns:
        ShareReport: Names and counts.

    Raises:
        ValueError: If a pattern finds nothing or layers cannot share.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)])
        >>> report = share_stack(model, [r'(\d+)'], ranks=4)
        >>> report.before, report.after
        (24576, 7168)
    """
    if init not in INITS:
        raise ValueError(f'init={init!r} must be one of {INITS}')
    host = part_of(model, module)
    stacks = find_stacks(
        host, targets, ranks=ranks, groups=groups, cycle=cycle
    )
    for stack in stacks:
        if init == 'svd' and weight_of(stack.layers[0]).is_meta:
            raise ValueError(
                f"{stack.names[0]} is on the meta device, but init='svd' "
                'needs its weights'
            )

    holders = {_holder(model, stack) for stack in stacks}
    shared = [_share(model, stack, init) for stack in stacks]
    for holder in holders:
        holder._register_load_state_dict_pre_hook(
            read_plain_weights, with_module=True
        )
    return ShareReport(shared)


@MODELS.register_module(name='LORSStack')
def build_lors_stack(
    module: dict,
    part: str = '',
    data_preprocessor: Optional[dict] = None,
    **options: Any,
) -> nn.Module:
    r"""Build a module and let its stacks of linear layers share weights.

    The result is the module itself, not a wrapper: its class is the one that
    its host expects, and keys have no further prefix.

    Args:
        module (dict): Config of any module, such as a backbone.
        part (str): Name of the part of it to which patterns refer. Defaults
            to the module itself.
        data_preprocessor (dict, optional): Of a whole model; the runner
            gives it.
        **options: Of :func:`share_stack`.

    Returns:
        nn.Module: The module that ``module`` describes, changed.

    Examples:
        >>> backbone = dict(
        ...     type='lors_plugin.LORSStack',
        ...     module=dict(type='VisionTransformer', arch='deit-tiny'),
        ...     targets=[r'layers\.(\d+)\.ffn\.layers\.(?:0\.0)'],
        ...     ranks=32,
        ... )
    """
    built = build_module(module, data_preprocessor)
    report = share_stack(built, module=part, **options)
    print_log(f'LORS\n{report.table()}', logger='current')
    return built


@torch.no_grad()
def _share(model: nn.Module, stack: Stack, init: str) -> SharedStack:
    weights = [weight_of(layer) for layer in stack.layers]
    new, shares = {}, []
    for layer, rank in zip(stack.layers, stack.ranks):
        owner = shares[0] if shares else None
        new[layer], low_rank = _shared_layer(layer, rank, owner)
        low_rank.requires_grad_(weight_of(layer).requires_grad)
        if layer.training != new[layer].training:
            new[layer].train(layer.training)
        shares.append(low_rank)
    owner = shares[0]
    # A layer that was frozen must not change with those that train.
    owner.shared_weight.requires_grad_(
        all(weight.requires_grad for weight in weights)
    )

    error = None
    if init == 'svd':
        factors = factorize(weights, stack.ranks)
        owner.shared_weight.copy_(factors.shared)
        for layer, down, up in zip(shares, factors.down, factors.up):
            if layer.rank:
                layer.down.copy_(down)
                layer.up.copy_(up)
        error = factors.error

    # Some hosts register a layer under several names.
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                parent._modules[name] = new[child]
    rows, cols = owner.shared_weight.shape
    return SharedStack(
        names=stack.names,
        before=rows * cols * len(stack.layers),
        after=rows * cols + (rows + cols) * sum(stack.ranks),
        error=error,
    )


def _shared_layer(
    layer: nn.Module, rank: int, owner: Optional[LowRankResidualLinear]
) -> tuple[nn.Module, LowRankResidualLinear]:
    """Make what takes the place of a layer, and its low-rank layer."""
    if isinstance(layer, nn.Conv2d):
        shared = LowRankResidualConv2d(layer, rank, owner)
        return shared, shared
    weight, kind = weight_of(layer), LowRankResidualLinear
    if isinstance(layer, nn.MultiheadAttention):
        kind = LowRankInProjection
    rows, columns = weight.shape
    shared = kind(
        columns,
        rows,
        rank,
        bias=False,
        owner=owner,
        device=weight.device,
        dtype=weight.dtype,
    )
    if isinstance(layer, nn.MultiheadAttention):
        return LowRankMultiheadAttention(layer, shared), shared
    shared.bias = layer.bias
    return shared, shared


def _holder(model: nn.Module, stack: Stack) -> nn.Module:
    """Find the innermost module that holds all layers, by all their names."""
    names = [
        name.split('.')[:-1]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in stack.layers
    ]
    return model.get_submodule('.'.join(os.path.commonprefix(names)))
