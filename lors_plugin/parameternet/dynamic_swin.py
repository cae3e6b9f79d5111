"""Swin Transformer with dynamic linear layers."""

import math
from typing import Any

from torch import Tensor, nn

from lors_plugin.registry import MODELS

from .dynamic_linear import DynamicLinear
from .dynamic_model import dynamic_linear_like


class ImageLinear(DynamicLinear):
    """A dynamic layer on the tokens of windows, routed image by image.

    Attributes:
        num_windows (int): Of each image; :func:`_count_windows` sets it.
    """

    num_windows = 1

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B windows, tokens, C_in) to (B windows, tokens, C_out)."""
        shape = -1, self.num_windows * x.shape[1], x.shape[-1]
        return super().forward(x.reshape(shape)).view(*x.shape[:-1], -1)


def _count_windows(module: nn.Module, args: tuple) -> None:
    """Before attention: windows of one image are routed together.

    A function of the module, no closure, so that a copy of the model looks
    at itself.
    """
    number = math.prod(
        math.ceil(int(side) / module.window_size) for side in args[1]
    )
    for layer in (module.w_msa.qkv, module.w_msa.proj):
        layer.num_windows = number


@MODELS.register_module(name='DynamicSwinTransformer')
def dynamic_swin_transformer(
    num_experts: int = 4,
    routing: str = 'softmax_mlp',
    temperature: float = 1.0,
    **swin: Any,
) -> nn.Module:
    """Build MMPretrain's Swin Transformer with dynamic linear layers.

    ParameterNet, `arXiv 2306.14525 <https://arxiv.org/abs/2306.14525>`_:
    Swin-300M is Swin-T at a token width of 24. Dynamic are the linear layers
    of all blocks (query, key and value; projection; both of the FFN) and of
    patch merging. Attention is routed by the mean over all windows of an
    image, zeros that fill up a window included.

    Args:
        num_experts (int): ``M``; 1 is a plain Swin. Defaults to 4.
        routing (str): See :class:`ExpertRouter`. Defaults to 'softmax_mlp'.
        temperature (float): Of the routing. Defaults to 1.
        **swin: What ``mmpretrain.SwinTransformer`` takes.

    Returns:
        nn.Module: A ``SwinTransformer``. Its layers start with the
        statistics that Swin's own have, a normal distribution of deviation
        0.02: leave ``DynamicLinear`` out of an ``init_cfg``.
    """
    # Imported where it is needed: detectors need no MMPretrain.
    from mmpretrain.models import SwinTransformer
    from mmpretrain.models.utils import ShiftWindowMSA, WindowMSA

    model = SwinTransformer(**swin)
    if num_experts == 1:
        return model
    options = dict(
        num_experts=num_experts, routing=routing, temperature=temperature
    )
    # All are found before the first is replaced: routers have linear layers.
    linears = [
        (parent, name)
        for parent in model.stages.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    for parent, name in linears:
        in_windows = isinstance(parent, WindowMSA)
        kind = ImageLinear if in_windows else DynamicLinear
        old = getattr(parent, name)
        setattr(parent, name, dynamic_linear_like(old, kind, **options))
    for module in model.stages.modules():
        if isinstance(module, ShiftWindowMSA):
            module.register_forward_pre_hook(_count_windows)
    return model
