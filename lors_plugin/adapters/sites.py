"""Check where an adapter can sit, and merge it into the weights there.

A site is a module that gets the adapter as a child and adapts its input. It
must be called, not only read, by the module around it, and must be able to
take ``x @ matrix + offset`` into its own weights exactly. Anything else is
refused here, with the reason, before a model is touched.
"""

import ast
import functools
import inspect
import textwrap
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from lors_plugin.utils import has_own_forward


class SiteError(ValueError):
    """An adapter cannot be placed before this module."""


class Site(NamedTuple):
    """Channels of a site's input.

    Attributes:
        channels (int): Number of channels ``d``.
        channel_dim (int): Their dimension: -1 for tokens, 1 for maps.
    """

    channels: int
    channel_dim: int


def site_at(model: nn.Module, name: str) -> Site:
    """Describe the adapter that a layer of a model can have.

    Args:
        model (nn.Module): Any part of a model.
        name (str): Of the layer in it.

    Returns:
        Site: Channels and layout of its input.

    Raises:
        SiteError: If the layer cannot have one, see :func:`site_of`, or the
            module around it reads its weights instead of calling it.
    """
    parent_name, _, own = name.rpartition('.')
    parent = model.get_submodule(parent_name)
    if own in read_only_layers(type(parent)):
        raise SiteError(
            f'{type(parent).__name__} reads the weights of {own} and never '
            'calls it, so an adapter there would never run; adapt another '
            'layer, such as the first of the FFN'
        )
    return site_of(model.get_submodule(name))


@functools.cache
def read_only_layers(kind: type) -> frozenset[str]:
    """Find the layers of a module whose weights are read without a call.

    As ``nn.MultiheadAttention`` does with ``out_proj``, and the attention of
    torchvision's Swin with ``qkv``. By the source of the class, if there is
    one: layers that appear as ``self.name.weight`` or ``self.name.bias`` and
    never as ``self.name`` otherwise. Code that initialises does not count.

    Args:
        kind (type): Class of the module.

    Returns:
        frozenset[str]: Names of the layers in the module.
    """
    read, used = set(), set()
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError, SyntaxError):
            return frozenset()
        for function in tree.body[0].body:
            name = getattr(function, 'name', '')
            if not any(word in name for word in ('init', 'reset', 'load')):
                _collect_uses(function, read, used)
    return frozenset(read - used)


def _collect_uses(node: ast.AST, read: set[str], used: set[str]) -> None:
    """Sort uses of ``self.name`` into reads of its weights and others."""
    name = _name_of_self(getattr(node, 'value', None))
    if isinstance(node, ast.Attribute) and name is not None:
        (read if node.attr in ('weight', 'bias') else used).add(name)
        return
    own = _name_of_self(node)
    if own is not None:
        used.add(own)
        return
    for child in ast.iter_child_nodes(node):
        _collect_uses(child, read, used)


def _name_of_self(node: Optional[ast.AST]) -> Optional[str]:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == 'self' else None
    return None


def site_of(module: nn.Module) -> Site:
    """Describe the adapter that a module can have.

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
    if not layer.weight.is_floating_point():
        raise SiteError(
            f'its weights are {layer.weight.dtype}, which cannot take the '
            'adapter; adapt the model before it is quantized'
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
