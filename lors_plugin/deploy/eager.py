"""Faster inference where PyTorch itself stays."""

import copy
from collections import Counter
from typing import Optional

import torch
from torch import Tensor, nn

from lors_plugin.build import image_channels
from lors_plugin.parameternet.cpu_inference import is_converted
from lors_plugin.parameternet.folding import can_fold, fold_norm
from lors_plugin.reparam import reparameterize

OPTIMIZED = '_lors_plugin_optimized'
TOLERANCE = 1e-3


@torch.no_grad()
def optimize(
    model: nn.Module, dtype: Optional[torch.dtype] = None
) -> nn.Module:
    """Copy a model into a form for inference in PyTorch.

    Adapters and branches are merged, ParameterNet is converted (see
    :func:`lors_plugin.reparam.reparameterize`), batch norms are folded into
    the convolutions in front of them, and other convolutions get the memory
    format of their libraries (``torch.channels_last``). The features of a
    random image are compared with those of the model.

    Args:
        model (nn.Module): A detector or a classifier in evaluation mode. Not
            changed.
        dtype (torch.dtype, optional): ``torch.bfloat16`` runs the backbone
            in that type. Defaults to None for float32, the same outputs to
            rounding.

    Returns:
        nn.Module: For inference alone; it cannot be trained or exported.

    Raises:
        ValueError: If the model is in training mode, or the processor has no
            instructions for ``dtype``.
        RuntimeError: If the features differ.
    """
    if model.training:
        raise ValueError('the model is in training mode: call model.eval()')
    if dtype is not None:
        _check_dtype(dtype, model)
    fast = copy.deepcopy(model).requires_grad_(False)
    reparameterize(fast)
    device = next(fast.parameters()).device
    generator = torch.Generator().manual_seed(0)
    channels = image_channels(fast)
    image = torch.rand(1, channels, 224, 224, generator=generator).to(device)
    wanted = _features(fast, image)
    fold_norms(fast, image)
    if not any(map(is_converted, fast.modules())):
        fast.to(memory_format=torch.channels_last)
    for one, other in zip(_features(fast, image), wanted):
        error = (one - other).abs().max() / other.abs().max().clamp(min=1e-30)
        if not error <= TOLERANCE:
            raise RuntimeError(
                f'folded batch norms change features by {error:.1e}; '
                'reparameterize(model) alone does not fold those of '
                f'{type(model).__name__}'
            )
    if dtype is not None:
        _run_in(fast.backbone, dtype)
    setattr(fast, OPTIMIZED, True)
    return fast


def fold_norms(model: nn.Module, image: Tensor) -> int:
    """Fold batch norms into the convolutions in front of them, in place.

    A norm is folded if what it takes is, in a run of the model's features,
    what a convolution has just returned, and both run once.

    Args:
        model (nn.Module): In evaluation mode.
        image (Tensor): Normalized, shape (1, C, H, W).

    Returns:
        int: Number of folded norms.
    """
    calls, made, pairs, hooks = Counter(), {}, {}, []

    def after_conv(module, _, out):
        calls[module] += 1
        # The tensor is kept, so that no other gets its address.
        made[id(out)] = module, out

    def before_norm(module, args):
        calls[module] += 1
        conv, _ = made.pop(id(args[0]), (None, None))
        if conv is not None:
            pairs[module] = conv

    for module in model.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after_conv))
        elif can_fold(module):
            hooks.append(module.register_forward_pre_hook(before_norm))
    _features(model, image)
    for hook in hooks:
        hook.remove()
    pairs = {
        norm: conv
        for norm, conv in pairs.items()
        if calls[norm] == calls[conv] == 1
    }
    for norm, conv in pairs.items():
        weight, bias, shift = fold_norm(conv.weight, conv.bias, norm)
        shift = shift if bias is None else bias + shift
        conv.weight = nn.Parameter(weight.to(conv.weight), False)
        conv.bias = nn.Parameter(shift.to(conv.weight), False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in pairs:
                setattr(parent, name, nn.Identity())
    return len(pairs)


def _features(model: nn.Module, image: Tensor) -> list[Tensor]:
    """Return what the backbone and the neck make of an image."""
    found = model.extract_feat(image)
    found = [found] if isinstance(found, Tensor) else list(found)
    return [part for part in found if isinstance(part, Tensor)]


def _check_dtype(dtype: torch.dtype, model: nn.Module) -> None:
    if dtype is not torch.bfloat16 or not hasattr(model, 'backbone'):
        raise ValueError(
            f'dtype={dtype}: torch.bfloat16, for models with a backbone'
        )
    on_cpu = next(model.parameters()).device.type == 'cpu'
    if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError(
            'this processor has no instructions for bfloat16 (AVX-512 or '
            'AMX), where it would be slower than float32: leave dtype out'
        )


def _run_in(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Run a backbone in a type, with float32 around it."""
    backbone.to(dtype)

    def cast(_, args):
        return tuple(arg.to(dtype) for arg in args)

    def restore(_, args, outs):
        return tuple(out.float() for out in outs)

    backbone.register_forward_pre_hook(cast)
    backbone.register_forward_hook(restore)
