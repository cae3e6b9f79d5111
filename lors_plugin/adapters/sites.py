"""Where an adapter can sit: layers whose weights can swallow an affine map.

A site is a module that gets the adapter as a child and adapts its input. It
must be able to take ``x @ matrix + offset`` into its own weights exactly;
anything else is refused here, with the reason, before a model is touched.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lors_plugin.utils import has_own_forward


class SiteError(ValueError):
    """An adapter cannot be placed before this module, and why."""


class Site(NamedTuple):
    """Channels of a site's input.

    Attributes:
        channels (int): Number of channels ``d``.
        channel_dim (int): Their dimension: -1 for tokens, 1 for maps.
    """

    channels: int
    channel_dim: int


def site_of(module: nn.Module) -> Site:
    """Say what an adapter before ``module`` must look like.

    Args:
        module (nn.Module): ``nn.Linear``, ``nn.Conv2d`` or the attention of
            BEiT.

    Returns:
        Site: Channels and layout of its input.

    Raises:
        SiteError: If the module could not swallow the adapter exactly.
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        _check_affine(module)
    if isinstance(module, nn.Linear):
        return Site(module.in_features, -1)
    if isinstance(module, nn.Conv2d):
        return _conv_site(module)
    if hasattr(module, 'logit_scale') and hasattr(module, 'qkv'):
        raise SiteError(
            f'{type(module).__name__} normalises its keys, so the bias '
            'that merging gives them would count; adapt its FFN only'
        )
    if isinstance(getattr(module, 'q_bias', None), nn.Parameter):
        if not _is_beit(module):
            raise SiteError(
                f'{type(module).__name__} reads the weights of its layers '
                'and adds biases of its own; of BEiTAttention it is known '
                'that its keys need none, others may rotate or normalise '
                'them. Adapt its FFN only'
            )
        _check_affine(module.qkv)
        return Site(module.qkv.in_features, -1)
    raise SiteError(
        f'{type(module).__name__} is neither a linear layer, a convolution '
        'nor the attention of BEiT; name the linear layer that reads the '
        'tokens'
    )


def _check_affine(layer: nn.Module) -> None:
    """Refuse what is called a linear layer and is not, as weights go."""
    if 'weight' not in layer._parameters:
        raise SiteError(
            'its weight is computed from others (a parametrization?), which '
            'could not take the adapter; adapt another layer'
        )
    if has_own_forward(layer) and not _pads_by_size(layer):
        raise SiteError(
            f'{type(layer).__name__} has a forward of its own, which may '
            'normalise its input or its weight, so merging cannot be known '
            f'to be exact; adapt a plain {type(layer).__mro__[1].__name__}'
        )


def _pads_by_size(layer: nn.Module) -> bool:
    """MMCV's convolution for EfficientNet: plain but for zero padding."""
    return type(layer).__name__ == 'Conv2dAdaptivePadding'


def _pads_zeros(conv: nn.Conv2d) -> bool:
    if conv.padding_mode != 'zeros':
        return False
    if _pads_by_size(conv) or conv.padding == 'same':
        return max(conv.kernel_size) > 1
    return conv.padding != 'valid' and any(conv.padding)


def _conv_site(conv: nn.Conv2d) -> Site:
    if conv.groups != 1:
        raise SiteError(
            f'a convolution with groups={conv.groups} cannot swallow a dense '
            'adapter without becoming dense; adapt the pointwise layer behind '
            'it instead (in ConvNeXt pointwise_conv1)'
        )
    if _pads_zeros(conv):
        raise SiteError(
            f'a {conv.kernel_size} convolution with zero padding reads '
            'zeros that no adapter has seen, so merging cannot be exact; '
            'choose a pointwise layer or one without padding'
        )
    return Site(conv.in_channels, 1)


def _is_beit(module: nn.Module) -> bool:
    """Biases beside a qkv layer whose weights are read as such."""
    names = [cls.__name__ for cls in type(module).__mro__]
    return 'BEiTAttention' in names and isinstance(module.qkv, nn.Linear)


@torch.no_grad()
def absorb(
    module: nn.Module, matrix: Tensor, offset: Tensor
) -> list[tuple[nn.Module, str, Tensor]]:
    """Weights with which ``module(x)`` equals ``module(x @ matrix + offset)``.

    Args:
        module (nn.Module): A site.
        matrix (Tensor): Shape (d, d), float64.
        offset (Tensor): Shape (d, ), float64.

    Returns:
        list[tuple]: Module, name of its parameter, and the value in float64.
        Nothing is written.
    """
    if isinstance(module, nn.Conv2d):
        weight = module.weight.double()
        new = torch.einsum('oihw,ji->ojhw', weight, matrix)
        shift = torch.einsum('oihw,i->o', weight, offset)
        return [
            (module, 'weight', new),
            (module, 'bias', _shifted(module.bias, shift)),
        ]
    if isinstance(module, nn.Linear):
        weight = module.weight.double()
        return [
            (module, 'weight', weight @ matrix.T),
            (module, 'bias', _shifted(module.bias, weight @ offset)),
        ]
    weight = module.qkv.weight.double()
    shift_q, _, shift_v = (weight @ offset).chunk(3)
    # The same number added to every key of a query leaves softmax as it is,
    # so the keys need no bias.
    return [
        (module.qkv, 'weight', weight @ matrix.T),
        (module, 'q_bias', _shifted(module.q_bias, shift_q)),
        (module, 'v_bias', _shifted(module.v_bias, shift_v)),
    ]


def _shifted(bias, shift: Tensor) -> Tensor:
    return shift if bias is None else bias.double() + shift
