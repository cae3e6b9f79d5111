"""ParameterNet: GhostNet with dynamic convolutions."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Optional, Union

from mmengine.model import BaseModule, ModuleList, Sequential
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from lors_plugin.registry import MODELS
from lors_plugin.utils import (
    check_at_least,
    check_choice,
    check_positive,
)

from .cpu_inference import (
    can_convert,
    convert,
    is_converted,
    run_in_chunks,
)
from .dynamic_conv import DynamicConv2d
from .ghost import (
    ConvFactory,
    ConvNorm,
    GhostBottleneck,
    make_divisible,
    plain_conv,
)
from .rep_conv import RepConv2d
from .routing import ROUTINGS

# Kernel, expanded channels, channels, squeeze ratio, stride.
Row = tuple[int, float, float, float, int]
STEM = 16
GHOSTNET: tuple[tuple[Row, ...], ...] = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((3, 120, 40, 0.25, 1),) * 2,
    ((3, 240, 80, 0, 2),),
    (
        *((3, 200, 80, 0, 1),) * 3,
        (3, 480, 112, 0.25, 1),
        *((3, 672, 112, 0.25, 1),) * 2,
    ),
    ((5, 672, 160, 0.25, 2),),
    ((3, 960, 160, 0.25, 1),) * 5,
)
# GhostNet itself, arXiv 1911.11907, table 1.
GHOSTNET_1: tuple[tuple[Row, ...], ...] = (
    *GHOSTNET[:4],
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    (
        (3, 200, 80, 0, 1),
        *((3, 184, 80, 0, 1),) * 2,
        (3, 480, 112, 0.25, 1),
        (3, 672, 112, 0.25, 1),
    ),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)) * 2,
)
ARCHS = {
    # The released one.
    '600m': dict(width=1.9, rows=GHOSTNET),
    # Not released: the same rows, as wide as 300 M multiply-adds allow.
    '300m': dict(width=1.34, rows=GHOSTNET),
    # Take num_experts=1 and act_cfg=dict(type='ReLU') for the released one.
    'ghostnet-1.0': dict(width=1.0, rows=GHOSTNET_1),
}
CONVS = ('dynamic', 'rep')


@MODELS.register_module()
class ParameterNet(BaseModule):
    """GhostNet whose convolutions mix ``M`` kernels for each image.

    Paper: `ParameterNet: Parameters Are All You Need for Large-scale Visual
    Pretraining of Mobile Networks <https://arxiv.org/abs/2306.14525>`_.
    Dynamic are the stem, all convolutions of Ghost modules and shortcuts and
    the last 1x1; depth-wise ones with a stride and squeeze-and-excitation
    are not. Stages are the groups of rows, and behind them the last 1x1.
    Those behind the last output are not built. A classifier has global
    pooling and ``mmpretrain.StackedLinearClsHead`` with 1280 hidden channels
    on top.

    Args:
        arch (str | dict): '300m', '600m', 'ghostnet-1.0', or a dict of

            - **rows** (Sequence[Sequence[Sequence]]): For each stage its
              blocks, each (kernel size, expanded channels, channels, squeeze
              ratio, stride), before they are scaled by the width.
            - **width** (float): Factor of all channels, which then become
              multiples of 4.

            Defaults to '600m'.
        width (float, optional): Instead of the one of ``arch``.
        conv (str): 'dynamic', or 'rep' for plain convolutions with parallel
            branches while training. Defaults to 'dynamic'.
        num_experts (int): ``M``; 1 is GhostNet. Defaults to 4.
        routing (str): 'sigmoid_linear' as released or 'softmax_mlp' as in the
            paper, see :class:`ExpertRouter`. Defaults to 'sigmoid_linear'.
        temperature (float): Of the routing. Defaults to 1.
        num_branches (int): Branches beside each plain convolution where
            ``conv='rep'``. Defaults to 3.
        in_channels (int): Of the images. Defaults to 3.
        stem_stride (int): 1 for small images. Defaults to 2.
        out_indices (Sequence[int]): Stages whose result is returned; -1 is
            the last 1x1. Defaults to (-1,).
        frozen_stages (int): Stem and stages up to this one get no gradient
            and keep their statistics; -1 for none. Defaults to -1.
        norm_cfg (dict): Defaults to dict(type='BN').
        act_cfg (dict): Defaults to dict(type='HSwish').
        norm_eval (bool): Whether BatchNorms keep their statistics in
            training. Defaults to False.
        with_cp (bool): Compute blocks again in the backward pass instead of
            keeping activations. Defaults to False.
        deploy (bool): Build the form for inference on CPUs that
            ``reparameterize`` converts to, which cannot train; a config that
            ``tools/reparam.py`` writes has it. Defaults to False.
        init_cfg (dict, optional): As in MMEngine. Without it every
            convolution, or mixture of kernels, starts as ``nn.Conv2d`` does.

    Attributes:
        out_channels (tuple[int]): Of each output.
        out_strides (tuple[int]): Of each output.

    Example:
        >>> model = ParameterNet('300m', out_indices=(2, 4, 6, 8))
        >>> model.out_channels, model.out_strides
        ((32, 52, 152, 216), (4, 8, 16, 32))
    """

    def __init__(
        self,
        arch: Union[str, dict] = '600m',
        width: Optional[float] = None,
        conv: str = 'dynamic',
        num_experts: int = 4,
        routing: str = 'sigmoid_linear',
        temperature: float = 1.0,
        num_branches: int = 3,
        in_channels: int = 3,
        stem_stride: int = 2,
        out_indices: Sequence[int] = (-1,),
        frozen_stages: int = -1,
        norm_cfg: dict = dict(type='BN'),
        act_cfg: dict = dict(type='HSwish'),
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(init_cfg)
        rows, width = _settings(arch, width)
        self.out_indices = _check_indices(out_indices, len(rows) + 1)
        known = range(-1, len(rows) + 1)
        if not isinstance(frozen_stages, int) or frozen_stages not in known:
            raise ValueError(
                f'frozen_stages={frozen_stages} must be from -1 to '
                f'{len(rows)}, the last 1x1'
            )
        check_at_least('in_channels', in_channels, 1)
        check_at_least('stem_stride', stem_stride, 1)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        make_conv = _conv_factory(
            conv, num_experts, routing, temperature, num_branches, norm_cfg
        )

        channels = make_divisible(STEM * width)
        stem = make_conv(in_channels, channels, 3, stem_stride, 1)
        self.stem = ConvNorm(stem, channels, norm_cfg, act_cfg)
        self.stages = ModuleList()
        sizes, stride = [], stem_stride
        for row in rows[: max(self.out_indices) + 1]:
            blocks = []
            for kernel, expanded, out, ratio, step in row:
                mid = make_divisible(expanded * width)
                out = make_divisible(out * width)
                blocks.append(
                    GhostBottleneck(
                        channels, mid, out, kernel, step, ratio,
                        make_conv, norm_cfg, act_cfg,
                    )
                )  # fmt: skip
                channels, stride = out, stride * step
            self.stages.append(Sequential(*blocks))
            sizes.append((channels, stride))
        if max(self.out_indices) == len(rows):
            last = make_conv(channels, mid, 1, 1, 1)
            last = ConvNorm(last, mid, norm_cfg, act_cfg)
            self.stages.append(Sequential(last))
            sizes.append((mid, stride))
        self.out_channels, self.out_strides = zip(
            *(sizes[i] for i in self.out_indices)
        )
        if deploy:
            self._deploy()
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of the stages in ``out_indices``.

        Args:
            x (Tensor): Images, shape (B, in_channels, H, W).

        Returns:
            tuple[Tensor]: Shapes (B, out_channels[i], H / out_strides[i],
            W / out_strides[i]), rounded up.
        """
        if is_converted(self.stem):
            return run_in_chunks(self._compute, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        outs = {}
        for i, stage in enumerate(self.stages):
            for block in stage:
                if self.with_cp and x.requires_grad:
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            outs[i] = x
        return tuple(outs[i] for i in self.out_indices)

    def train(self, mode: bool = True) -> 'ParameterNet':
        """Switch the mode, but not of what is frozen."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _deploy(self) -> None:
        """Convert all blocks that can be, as ``reparameterize`` does."""
        self.eval()
        for parent in (self, *self.stages):
            for name, block in list(parent.named_children()):
                if can_convert(block):
                    setattr(parent, name, convert(block))

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for part in (self.stem, *self.stages[: self.frozen_stages + 1]):
            part.eval()
            part.requires_grad_(False)


def _settings(
    arch: Union[str, dict], width: Optional[float]
) -> tuple[Sequence, float]:
    """Rows and width of an arch, checked."""
    if not isinstance(arch, dict):
        if arch not in list(ARCHS):
            raise ValueError(
                f'arch={arch!r} is none of {list(ARCHS)}; give one of them '
                'or a dict with rows and width'
            )
        arch = ARCHS[arch]
    rows = arch.get('rows')
    lists = (rows, *rows) if isinstance(rows, Sequence) else (rows,)
    if not all(part and isinstance(part, Sequence) for part in lists):
        raise ValueError(
            f'arch={arch} must have rows: for each stage a list of blocks '
            '(kernel size, expanded channels, channels, squeeze ratio, '
            'stride)'
        )
    for row in rows:
        for block in row:
            _check_block(block)
    if width is None:
        width = arch.get('width', 1.0)
    return rows, check_positive('width', width)


def _check_block(block: Row) -> None:
    where = f'arch: rows with the block {block}'
    if not isinstance(block, Sequence) or len(block) != 5:
        raise ValueError(
            f'{where}, which must be (kernel size, expanded channels, '
            'channels, squeeze ratio, stride)'
        )
    kernel, expanded, channels, ratio, stride = block
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise ValueError(f'{where}: its kernel size {kernel} must be odd')
    for name, value in dict(expanded=expanded, out=channels).items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f'{where}: {name} channels must be above 0')
    if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise ValueError(f'{where}: its squeeze ratio must be from 0 to 1')
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f'{where}: its stride must be at least 1')


def _check_indices(indices: Sequence[int], number: int) -> tuple[int, ...]:
    allowed = range(-number, number)
    listed = isinstance(indices, (Sequence, range))
    if (
        not listed
        or not indices
        or not all(isinstance(i, int) and i in allowed for i in indices)
    ):
        raise ValueError(
            f'out_indices={indices} must be stages from 0 to {number - 1}, '
            'the last 1x1'
        )
    return tuple(i % number for i in indices)


def _conv_factory(
    conv: str,
    num_experts: int,
    routing: str,
    temperature: float,
    num_branches: int,
    norm_cfg: dict,
) -> ConvFactory:
    """Return the factory of the convolutions that may be dynamic."""
    check_at_least('num_experts', num_experts, 1)
    check_at_least('num_branches', num_branches, 0)
    check_choice('conv', conv, CONVS)
    check_choice('routing', routing, ROUTINGS)
    check_positive('temperature', temperature)
    if conv == 'rep':
        layer = partial(
            RepConv2d, num_branches=num_branches, norm_cfg=norm_cfg
        )
    elif num_experts == 1:
        return plain_conv
    else:
        layer = partial(
            DynamicConv2d,
            num_experts=num_experts,
            routing=routing,
            temperature=temperature,
        )

    def make(in_channels, out_channels, kernel_size, stride, groups):
        return layer(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=False,
        )

    return make
