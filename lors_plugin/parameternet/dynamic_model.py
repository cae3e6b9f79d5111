"""Make the layers of any model dynamic, by their names."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Optional

from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.model.weight_init import trunc_normal_
from torch import nn

from lors_plugin.registry import MODELS
from lors_plugin.structure import build_module, read_only_layers
from lors_plugin.utils import (
    check_pattern,
    check_targets,
    few,
    has_own_forward,
)

from .dynamic_conv import DynamicConv2d
from .dynamic_linear import DynamicLinear


def make_dynamic(
    model: nn.Module, targets: Sequence[str], **options: Any
) -> list[str]:
    r"""Replace convolutions and linear layers by dynamic ones, in place.

    ParameterNet, `arXiv 2306.14525 <https://arxiv.org/abs/2306.14525>`_. The
    new layers start anew, so that the mixture of the experts has the
    statistics of a plain layer that starts: a normal distribution by Kaiming
    (fan out) for convolutions, one of deviation 0.02 for linear layers, and
    zero for biases.

    Args:
        model (nn.Module): Any model. Linear layers take (B, ..., C) with the
            images in the first dimension: each entry of it is routed alone.
        targets (Sequence[str]): Patterns; a layer whose whole name matches
            one of them becomes dynamic.
        **options: ``num_experts``, ``routing``, ``temperature`` and
            ``backend`` of :class:`DynamicConv2d` and :class:`DynamicLinear`.

    Returns:
        list[str]: Names of the layers that were replaced.

    Raises:
        ValueError: If a pattern matches no layer, or one that cannot be
            dynamic. The model is then as before.

    Examples:
        >>> from mmpretrain.models import MobileNetV2
        >>> model = MobileNetV2()
        >>> names = make_dynamic(model, [r'layer\d\..*\.conv'], num_experts=4)
    """
    check_targets(targets, r'layers\..*\.conv')
    # All are made before the first is replaced: routers have linear layers.
    new = {}
    for target in targets:
        pattern = check_pattern('targets', target)
        names = [
            name
            for name, layer in model.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
            and pattern.fullmatch(name)
        ]
        if not names:
            layers = [
                name
                for name, layer in model.named_modules()
                if isinstance(layer, (nn.Conv2d, nn.Linear))
            ]
            raise ValueError(
                f'target {target!r} matches no convolution and no linear '
                f'layer; there are {few(layers)}'
            )
        for name in names:
            if name not in new:
                new[name] = _dynamic_layer(model, name, options)
    for name, layer in new.items():
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, layer)
    return list(new)


@MODELS.register_module(name='DynamicModel')
def build_dynamic_model(
    module: dict,
    targets: Sequence[str],
    data_preprocessor: Optional[dict] = None,
    **options: Any,
) -> nn.Module:
    r"""Build a module with dynamic layers.

    The result is the module itself, not a wrapper: its class is the one that
    its host expects, and keys have no further prefix.

    Args:
        module (dict): Config of any module, such as a backbone.
        targets (Sequence[str]): See :func:`make_dynamic`.
        data_preprocessor (dict, optional): Of a whole model; the runner
            gives it.
        **options: Of :func:`make_dynamic`.

    Returns:
        nn.Module: The module that ``module`` describes, changed.

    Raises:
        ValueError: If ``module`` names a file of plain weights.

    Examples:
        >>> backbone = dict(
        ...     type='lors_plugin.DynamicModel',
        ...     module=dict(type='EfficientNetV2', arch='b0'),
        ...     targets=[r'layers\.(?!.*\.se\.).*'],
        ...     num_experts=4,
        ... )
    """
    built = build_module(module, data_preprocessor)
    for name, part in built.named_modules():
        rules = getattr(part, 'init_cfg', None) or []
        rules = rules if isinstance(rules, (list, tuple)) else [rules]
        if any(rule.get('type') == 'Pretrained' for rule in rules):
            raise ValueError(
                f'module: init_cfg of {name or "the model"} names a file of '
                'weights, but plain layers do not fit dynamic ones; remove '
                'it, and load a checkpoint of the dynamic model by load_from'
            )
    make_dynamic(built, targets, **options)
    return built


def _dynamic_layer(model: nn.Module, name: str, options: dict) -> nn.Module:
    """Make the layer that takes the place of a plain one."""
    old = model.get_submodule(name)
    if not name:
        raise ValueError(
            f'a {type(old).__name__} cannot be made dynamic by itself; use '
            'DynamicConv2d or DynamicLinear'
        )
    parent, _, child = name.rpartition('.')
    parent = type(model.get_submodule(parent))
    adaptive = type(old) is Conv2dAdaptivePadding
    if child in read_only_layers(parent):
        raise ValueError(
            f'{name} cannot be dynamic: {parent.__name__} reads its weight '
            'and never calls it'
        )
    zeros = getattr(old, 'padding_mode', 'zeros') == 'zeros'
    if (has_own_forward(old) and not adaptive) or not zeros:
        raise ValueError(
            f'{name} cannot be dynamic: a {type(old).__name__} computes more '
            'than a convolution with zero padding or a linear layer'
        )
    if isinstance(old, nn.Linear):
        return dynamic_linear_like(old, **options)
    geometry = dict(stride=old.stride, dilation=old.dilation)
    new = DynamicConv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        padding=old.padding,
        groups=old.groups,
        bias=old.bias is not None,
        **geometry,
        **options,
    )
    new.reset_parameters(partial(nn.init.kaiming_normal_, mode='fan_out'))
    _finish(new, old)
    if not adaptive or max(old.kernel_size) == 1:
        return new
    pad = AdaptivePadding(old.kernel_size, padding='same', **geometry)
    return nn.Sequential(pad, new)


def dynamic_linear_like(
    old: nn.Linear, kind: type[DynamicLinear] = DynamicLinear, **options: Any
) -> DynamicLinear:
    """Make a dynamic layer of the shape of a plain one; it starts anew.

    Args:
        old (nn.Linear): The plain layer.
        kind (type): A kind of dynamic layer. Defaults to
            :class:`DynamicLinear`.
        **options: Of the dynamic layer.

    Returns:
        DynamicLinear: Its mixture starts with deviation 0.02 and no bias, as
        the layers of vision transformers do.
    """
    bias = old.bias is not None
    new = kind(old.in_features, old.out_features, bias, **options)
    new.reset_parameters(partial(trunc_normal_, std=0.02))
    _finish(new, old)
    return new


def _finish(new: nn.Module, old: nn.Module) -> None:
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    new.to(old.weight.device, old.weight.dtype).train(old.training)
    new.requires_grad_(old.weight.requires_grad)
