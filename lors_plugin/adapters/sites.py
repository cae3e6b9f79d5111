"""Sites of adapters, and weights that absorb them.

A site is a module that gets an adapter as a child and whose inputs the
adapter changes. It must be able to take ``x @ matrix + offset`` into its own
weights exactly, and the module around it must call it. Anything else is
refused here, with the reason and the nearest place that can, before a model
is touched. Each kind of site is a class: what fits it, which calls are
adapted, and what the new weights are.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from lors_plugin.structure import read_only_layers
from lors_plugin.utils import has_own_forward

# Inputs of an attention, one letter each, and what PyTorch calls them.
INPUTS = dict(q='query', k='key', v='value')
# Names of three layers that read what an attention gets.
PROJECTIONS = (
    ('query', 'key', 'value'),
    ('q_proj', 'k_proj', 'v_proj'),
    ('q_lin', 'k_lin', 'v_lin'),
    ('to_q', 'to_k', 'to_v'),
    ('q', 'k', 'v'),
    ('qcontent_proj', 'kcontent_proj', 'v_proj'),
)
# Attentions of plain dot products, whose keys have no bias: the same number
# added to all keys of a query leaves softmax as it is.
_KEYS_NEED_NO_BIAS = (
    'BeitSelfAttention',
    'Data2VecVisionSelfAttention',
    'WhisperAttention',
)

NewWeight = tuple[nn.Module, str, Tensor]


class SiteError(ValueError):
    """An adapter cannot be placed at this module."""


class Reader(NamedTuple):
    """A module that is called with adapted inputs.

    Attributes:
        module (nn.Module): The module.
        names (tuple[str]): Arguments of its call to adapt, a subset of
            'query', 'key' and 'value'; () for the first tensor.
    """

    module: nn.Module
    names: tuple


class Site(abc.ABC):
    """A module that can absorb an adapter of its inputs.

    Args:
        layer (nn.Module): The module.
        inputs (str): Which inputs of an attention are adapted: letters of
            'qkv', in this order. '' for what is usual: all of them, or the
            only input.

    Attributes:
        inputs (str): The same, resolved; '' where there is one input.
        channels (int): Number of channels of the inputs.
        channel_dim (int): Their dimension: -1 for tokens, 1 for maps.

    Raises:
        SiteError: If the module cannot absorb an adapter exactly.
    """

    channels: int
    channel_dim = -1

    def __init__(self, layer: nn.Module, inputs: str = '') -> None:
        if inputs:
            raise SiteError(
                f'{type(layer).__name__} has one input, so {inputs!r} cannot '
                'be chosen from it; name the layer alone'
            )
        self.layer, self.inputs = layer, ''

    @classmethod
    @abc.abstractmethod
    def fits(cls, layer: nn.Module) -> bool:
        """Return whether a module is of this kind."""

    def readers(self) -> list[Reader]:
        """List the modules whose calls get adapted inputs."""
        return [Reader(self.layer, ())]

    @abc.abstractmethod
    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        """Compute weights with which no adapter is needed.

        Args:
            matrix (Tensor): Shape (d, d), float64.
            offset (Tensor): Shape (d, ), float64.

        Returns:
            list[tuple]: Module, name of its parameter, and the value in
            float64, with which ``module(x)`` equals the former
            ``module(x @ matrix + offset)``. Nothing is written.
        """


class LinearSite(Site):
    """A linear layer."""

    def __init__(self, layer: nn.Linear, inputs: str = '') -> None:
        super().__init__(layer, inputs)
        check_affine(layer)
        self.channels = layer.in_features

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        layer, weight = self.layer, self.layer.weight.double()
        return [
            (layer, 'weight', weight @ matrix.T),
            (layer, 'bias', _shifted(layer.bias, weight @ offset)),
        ]


class ConvSite(Site):
    """A convolution of maps that reads no zeros at the border."""

    channel_dim = 1

    def __init__(self, layer: nn.Conv2d, inputs: str = '') -> None:
        super().__init__(layer, inputs)
        check_affine(layer)
        if layer.groups != 1:
            raise SiteError(
                f'a convolution with groups={layer.groups} cannot absorb a '
                'dense adapter without becoming dense; adapt the pointwise '
                'layer behind it instead (in ConvNeXt pointwise_conv1)'
            )
        if pads_zeros(layer):
            raise SiteError(
                f'a {layer.kernel_size} convolution with zero padding reads '
                'zeros that no adapter has seen, so merging cannot be exact; '
                'choose a pointwise layer, one without padding, or '
                "method='lora', which padding does not matter to"
            )
        self.channels = layer.in_channels

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Conv2d)

    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        layer, weight = self.layer, self.layer.weight.double()
        new = torch.einsum('oihw,ji->ojhw', weight, matrix)
        shift = torch.einsum('oihw,i->o', weight, offset)
        return [
            (layer, 'weight', new),
            (layer, 'bias', _shifted(layer.bias, shift)),
        ]


class SplitBiasSite(Site):
    """BEiT's attention: biases beside a qkv layer whose weights are read."""

    def __init__(self, layer: nn.Module, inputs: str = '') -> None:
        super().__init__(layer, inputs)
        name = type(layer).__name__
        if hasattr(layer, 'logit_scale'):
            raise SiteError(
                f'{name} normalises its keys, so the bias that merging gives '
                'them would count; adapt its FFN only'
            )
        if not _is_beit(layer):
            raise SiteError(
                f'{name} reads the weights of its layers and adds biases of '
                'its own; of BEiTAttention it is known that its keys need '
                'none, others may rotate or normalise them. Adapt its FFN '
                'only'
            )
        check_affine(layer.qkv)
        self.channels = layer.qkv.in_features

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        scaled = hasattr(layer, 'logit_scale') and hasattr(layer, 'qkv')
        return scaled or isinstance(
            getattr(layer, 'q_bias', None), nn.Parameter
        )

    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        layer, weight = self.layer, self.layer.qkv.weight.double()
        # The same number added to every key of a query leaves softmax as it
        # is, so the keys need no bias.
        shift_q, _, shift_v = (weight @ offset).chunk(3)
        return [
            (layer.qkv, 'weight', weight @ matrix.T),
            (layer, 'q_bias', _shifted(layer.q_bias, shift_q)),
            (layer, 'v_bias', _shifted(layer.v_bias, shift_v)),
        ]


class AttentionSite(Site):
    """Base of attentions with an own projection per input."""

    def __init__(self, layer: nn.Module, inputs: str = '') -> None:
        if not inputs:
            inputs = 'qkv'
        elif inputs not in ('q', 'k', 'v', 'qk', 'qv', 'kv', 'qkv'):
            raise SiteError(
                f'inputs={inputs!r} of an attention must be letters of '
                "'qkv', in this order"
            )
        self.layer, self.inputs = layer, inputs
        widths = {x: self.width(x) for x in inputs}
        if len(set(widths.values())) > 1:
            raise SiteError(
                f'the inputs of {type(layer).__name__} have different '
                f'numbers of channels ({widths}), which one adapter cannot '
                'take; choose among them by a pair (pattern, inputs) such as '
                f'(..., {inputs[0]!r})'
            )
        self.channels = widths[inputs[0]]

    @abc.abstractmethod
    def width(self, which: str) -> int:
        """Return the channels of an input, by its letter."""


class MultiheadSite(AttentionSite):
    """PyTorch's attention, whose projections are read, not called.

    The inputs may differ: each goes through the adapter, and the rows of its
    projection absorb it. Positions that were added to an input are adapted
    with it.
    """

    layer: nn.MultiheadAttention

    def __init__(self, layer: nn.Module, inputs: str = '') -> None:
        if layer._qkv_same_embed_dim:
            check_affine(layer, ('in_proj_weight',))
        else:
            check_affine(layer, [f'{x}_proj_weight' for x in INPUTS])
        super().__init__(layer, inputs)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.MultiheadAttention)

    def width(self, which: str) -> int:
        widths = dict(
            q=self.layer.embed_dim, k=self.layer.kdim, v=self.layer.vdim
        )
        return widths[which]

    def readers(self) -> list[Reader]:
        return [Reader(self.layer, tuple(INPUTS[x] for x in self.inputs))]

    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        layer, joint = self.layer, self.layer._qkv_same_embed_dim
        if joint:
            weights = dict(zip('qkv', layer.in_proj_weight.double().chunk(3)))
        else:
            weights = {
                x: getattr(layer, f'{x}_proj_weight').double() for x in 'qkv'
            }
        shift = [
            weight @ offset
            if x in self.inputs
            else weight.new_zeros(len(weight))
            for x, weight in weights.items()
        ]
        for x in self.inputs:
            weights[x] = weights[x] @ matrix.T
        bias = _shifted(layer.in_proj_bias, torch.cat(shift))
        new = [(layer, 'in_proj_bias', bias)]
        if joint:
            joined = torch.cat(list(weights.values()))
            return [(layer, 'in_proj_weight', joined), *new]
        return [
            (layer, f'{x}_proj_weight', weights[x]) for x in self.inputs
        ] + new


class ProjectionsSite(AttentionSite):
    """An attention that calls three linear layers; they share the adapter.

    What each layer reads is adapted, so their inputs may differ, and what
    the attention does besides with its own inputs stays as it is.
    """

    def __init__(self, layer: nn.Module, inputs: str = '') -> None:
        self.names = dict(zip('qkv', _projections(layer)))
        read = read_only_layers(type(layer)) & set(self.names.values())
        if read:
            raise SiteError(
                f'{type(layer).__name__} reads the weights of {sorted(read)} '
                'and never calls them, so an adapter there would never run; '
                'adapt its FFN only'
            )
        for name in self.names.values():
            check_affine(layer.get_submodule(name))
        super().__init__(layer, inputs)

    @classmethod
    def fits(cls, layer: nn.Module) -> bool:
        return _projections(layer) is not None

    def width(self, which: str) -> int:
        return self._projection(which).in_features

    def readers(self) -> list[Reader]:
        return [Reader(self._projection(x), ()) for x in self.inputs]

    def absorb(self, matrix: Tensor, offset: Tensor) -> list[NewWeight]:
        new = []
        for x in self.inputs:
            weight, bias = LinearSite(self._projection(x)).absorb(
                matrix, offset
            )
            new.append(weight)
            if not (x == 'k' and _keys_need_no_bias(self.layer)):
                new.append(bias)
        return new

    def _projection(self, which: str) -> nn.Linear:
        return self.layer.get_submodule(self.names[which])


KINDS: tuple[type[Site], ...] = (
    LinearSite,
    ConvSite,
    SplitBiasSite,
    MultiheadSite,
    ProjectionsSite,
)


def is_site(layer: nn.Module) -> bool:
    """Return whether a module is of a kind that can have an adapter."""
    return any(kind.fits(layer) for kind in KINDS)


def site_of(layer: nn.Module, inputs: str = '') -> Site:
    """Describe where an adapter of a module's inputs sits.

    Args:
        layer (nn.Module): A linear layer, a convolution, or an attention.
        inputs (str): Of an attention, see :class:`Site`.

    Raises:
        SiteError: If the module could not absorb the adapter exactly.
    """
    for kind in KINDS:
        if kind.fits(layer):
            return kind(layer, inputs)
    inner = [
        name
        for name, child in layer.named_modules()
        if name and is_site(child)
    ]
    hint = f', such as {inner[0]} in it' if inner else ''
    raise SiteError(
        f'{type(layer).__name__} is neither a linear layer, a convolution '
        'nor an attention with projections that are known; name the layer '
        f'that reads the tokens{hint}'
    )


def check_called(model: nn.Module, name: str) -> None:
    """Check that the module around a layer calls it.

    Args:
        model (nn.Module): Any part of a model.
        name (str): Of the layer in it.

    Raises:
        SiteError: If it reads the layer's weights instead.
    """
    parent_name, _, own = name.rpartition('.')
    parent = model.get_submodule(parent_name)
    if own not in read_only_layers(type(parent)):
        return
    nearest = 'another layer, such as the first of the FFN'
    if is_site(parent):
        nearest = f'the attention itself ({parent_name or "the model"})'
    raise SiteError(
        f'{type(parent).__name__} reads the weights of {own} and never '
        f'calls it, so an adapter there would never run; adapt {nearest}'
    )


def check_affine(layer: nn.Module, names: Sequence[str] = ('weight',)) -> None:
    """Refuse what is called a linear layer and is not, as weights go.

    Args:
        layer (nn.Module): A layer of PyTorch, or of a class derived from it.
        names (Sequence[str]): Of its weights.

    Raises:
        SiteError: If the weights are not those of an affine map.
    """
    for name in names:
        if name not in layer._parameters:
            raise SiteError(
                'its weight is computed from others (a parametrization?), '
                'which could not take the adapter; adapt another layer'
            )
        weight = layer._parameters[name]
        if not weight.is_floating_point():
            raise SiteError(
                f'its weights are {weight.dtype}, which cannot take the '
                'adapter; adapt the model before it is quantized'
            )
    if has_own_forward(layer) and not pads_by_size(layer):
        raise SiteError(
            f'{type(layer).__name__} has a forward of its own, which may '
            'normalise its input or its weight, so merging cannot be known '
            f'to be exact; adapt a plain {type(layer).__mro__[1].__name__}'
        )


def pads_by_size(layer: nn.Module) -> bool:
    """Return whether it is MMCV's convolution for EfficientNet."""
    return type(layer).__name__ == 'Conv2dAdaptivePadding'


def pads_zeros(conv: nn.Conv2d) -> bool:
    """Return whether a convolution reads zeros at the border."""
    if conv.padding_mode != 'zeros':
        return False
    if pads_by_size(conv) or conv.padding == 'same':
        return max(conv.kernel_size) > 1
    return conv.padding != 'valid' and any(conv.padding)


def _is_beit(module: nn.Module) -> bool:
    """Return whether it is MMPretrain's or timm's, whose keys need no bias."""
    known = any(
        cls.__name__ == 'BEiTAttention' or cls.__module__ == 'timm.models.beit'
        for cls in type(module).__mro__
    )
    return known and isinstance(module.qkv, nn.Linear)


def _keys_need_no_bias(layer: nn.Module) -> bool:
    names = [cls.__name__ for cls in type(layer).__mro__]
    return any(name in _KEYS_NEED_NO_BIAS for name in names)


def _projections(layer: nn.Module) -> Optional[tuple[str, str, str]]:
    """Return the names of the three projections of an attention."""
    for names in PROJECTIONS:
        layers = [layer._modules.get(name) for name in names]
        if all(isinstance(child, nn.Linear) for child in layers):
            return names
    return None


def _shifted(bias: Optional[Tensor], shift: Tensor) -> Tensor:
    return shift if bias is None else bias.double() + shift
