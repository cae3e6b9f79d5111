"""Put experts into a model of Hugging Face, train, save and load it."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from .switch_linear import SwitchLinear

PROJECTIONS = ('gate', 'up', 'down')
INITS = ('copy', 'fresh')
IGNORED_LABEL = -100
FRESH_STD = 0.02  # of a model that does not say
# The entry of the model's config that save_pretrained writes.
CONFIG_KEY = 'switch_experts'


def add_experts(
    model: nn.Module,
    projection: str = 'up',
    num_experts: int = 4,
    capacity_factor: Optional[float] = 1.25,
    eval_capacity_factor: Optional[float] = None,
    aux_loss_coef: float = 0.01,
    jitter: float = 0.0,
    init: str = 'copy',
    layers: Optional[Sequence[int]] = None,
) -> list[str]:
    """Replace a projection of every FFN by a :class:`SwitchLinear`.

    Paper: `ParameterNet <https://arxiv.org/abs/2306.14525>`_.
    For LLaMA and all models whose FFNs have a ``gate_proj``, ``up_proj`` and
    ``down_proj``. In training, the ``loss`` that the model returns then holds
    the load-balancing losses of all layers, so ``Trainer`` and loops stay as
    they are; in evaluation it is the plain one. Padding, by
    ``attention_mask``, takes no expert's place. Everything is checked before
    the model is touched.

    Args:
        model (nn.Module): For example a ``LlamaForCausalLM``, on any device,
            the meta device too.
        projection (str): 'gate', 'up' or 'down'. Defaults to 'up', the best
            in the paper.
        num_experts (int): Experts of a layer. Defaults to 4.
        capacity_factor, eval_capacity_factor, jitter: See
            :class:`SwitchLinear`.
        aux_loss_coef (float): Weight of the load-balancing losses, which are
            summed over layers. Defaults to 0.01, as in Switch Transformer.
        init (str): 'copy': each expert starts as the projection that is
            there, times the number of experts because the router's
            probabilities start near one share of it; the model starts close
            to what it was. 'fresh': as a new projection of the model.
            Defaults to 'copy'.
        layers (Sequence[int], optional): Numbers of the blocks, negative
            ones from the end; all if not given.

    Returns:
        list[str]: Names of the layers that have experts now.

    Raises:
        ValueError: If the model has no such projection, has experts already,
            or an option is wrong.
    """
    for name, value, choices in (
        ('projection', projection, PROJECTIONS),
        ('init', init, INITS),
    ):
        if value not in choices:
            raise ValueError(f'{name}={value!r} must be one of {choices}')
    options = dict(
        projection=projection,
        num_experts=num_experts,
        capacity_factor=capacity_factor,
        eval_capacity_factor=eval_capacity_factor,
        aux_loss_coef=aux_loss_coef,
        jitter=jitter,
        layers=None if layers is None else list(layers),
    )
    names = _place(model, options, init)
    if hasattr(model, 'config'):
        setattr(model.config, CONFIG_KEY, options)
    return names


def expert_layers(model: nn.Module) -> dict[str, SwitchLinear]:
    """Layers with experts by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SwitchLinear)
    }


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Load-balancing losses of the last forward pass, summed over layers.

    Without the coefficient. Only for models whose output has no ``loss``,
    or to log it: :func:`add_experts` adds it to the ``loss``.
    """
    losses = [
        layer.aux_loss
        for layer in expert_layers(model).values()
        if layer.aux_loss is not None
    ]
    if not losses:
        raise ValueError(
            'no layer with experts has run; add_experts first, then call the '
            'model'
        )
    return sum(loss.to(losses[0].device) for loss in losses)


def expert_load(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return how the last forward pass used the experts, by layer.

    Returns:
        dict[str, dict]: 'load', the share of the tokens that chose each
        expert (a list), and 'dropped', the share that found no place.
    """
    return {
        name: dict(load=layer.load.tolist(), dropped=float(layer.dropped))
        for name, layer in expert_layers(model).items()
        if layer.load is not None
    }


def load_with_experts(path: str, **kwargs) -> nn.Module:
    """Load what ``save_pretrained`` of a model with experts wrote.

    Args:
        path (str): The folder.
        kwargs: For ``from_pretrained``, such as ``dtype``.

    Returns:
        nn.Module: A model of the class that was saved, with experts.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'load_with_experts needs transformers: pip install '
            '"transformers>=4.57"'
        ) from error
    config = kwargs.pop('config', None)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path)
    options = getattr(config, CONFIG_KEY, None)
    if options is None:
        raise ValueError(
            f'{path}: its config.json has no {CONFIG_KEY}, so it was not '
            'saved from a model with experts; load it as usual and call '
            'add_experts'
        )
    plain = getattr(transformers, config.architectures[0])

    class WithExperts(plain):
        """The plain class, which places experts before weights come."""

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            _place(self, options, 'fresh')

    # Hugging Face derives things, such as the kind of the loss, from it.
    WithExperts.__name__ = plain.__name__
    model = WithExperts.from_pretrained(path, config=config, **kwargs)
    # What it saves is again what the plain class would save.
    model.__class__ = plain
    return model


def _place(model: nn.Module, options: dict, init: str) -> list[str]:
    """Replace the layers and hook the model."""
    if expert_layers(model):
        raise ValueError(f'{type(model).__name__} has experts already')
    names = _names(model, options['projection'], options['layers'])
    std = getattr(
        getattr(model, 'config', None), 'initializer_range', FRESH_STD
    )
    experts = {
        name: _experts_of(model.get_submodule(name), options, init, std)
        for name in names
    }
    for name, layer in experts.items():
        parent, _, own = name.rpartition('.')
        setattr(model.get_submodule(parent), own, layer)
    # Who calls the decoder without its head comes by here too.
    decoder = getattr(model, 'base_model', model)
    decoder.register_forward_pre_hook(_before_forward, with_kwargs=True)
    model.register_forward_hook(_after_forward, with_kwargs=True)
    model.switch_aux_loss_coef = options['aux_loss_coef']
    return names


def _names(
    model: nn.Module, projection: str, layers: Optional[Sequence[int]]
) -> list[str]:
    own = f'{projection}_proj'
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.split('.')[-1] == own
    ]
    if not names:
        raise ValueError(
            f'{type(model).__name__} has no linear layer named {own}; models '
            'like LLaMA have one in each block'
        )
    if layers is None:
        return names
    try:
        return list(dict.fromkeys(names[number] for number in layers))
    except IndexError:
        raise ValueError(
            f'layers={list(layers)}: the model has {len(names)} blocks, '
            f'0 to {len(names) - 1}'
        ) from None


@torch.no_grad()
def _experts_of(
    linear: nn.Linear, options: dict, init: str, std: float
) -> SwitchLinear:
    count = options['num_experts']
    layer = SwitchLinear(
        linear.in_features,
        linear.out_features,
        count,
        linear.bias is not None,
        options['capacity_factor'],
        options['eval_capacity_factor'],
        options['jitter'],
        linear.weight.device,
        linear.weight.dtype,
    )
    if init == 'copy':
        layer.weight.copy_(linear.weight * count)
        if linear.bias is not None:
            layer.bias.copy_(linear.bias * count)
    else:
        nn.init.normal_(layer.weight, std=std)
        if linear.bias is not None:
            nn.init.zeros_(layer.bias)
    layer.weight.requires_grad_(linear.weight.requires_grad)
    return layer.train(linear.training)


def _before_forward(model: nn.Module, args: tuple, kwargs: dict) -> None:
    """Tell the layers which tokens are padding."""
    mask = _argument(model, 'attention_mask', args, kwargs)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    for layer in expert_layers(model).values():
        layer.forget()
        layer.token_mask = None if mask is None else mask.bool()


def _after_forward(
    model: nn.Module, args: tuple, kwargs: dict, output: Any
) -> Any:
    """Add the load-balancing losses to the loss, in training."""
    labels = _argument(model, 'labels', args, kwargs)
    # With return_dict=False the loss comes first.
    in_tuple = isinstance(output, tuple) and labels is not None
    loss = output[0] if in_tuple else getattr(output, 'loss', None)
    if loss is None or not model.training:
        if model.training and kwargs.get('num_items_in_batch') is not None:
            warnings.warn(
                'the balance loss of the experts is left out: Trainer '
                'computes the loss itself (label_smoothing_factor or '
                'compute_loss_func). Add aux_loss_coef * auxiliary_loss('
                'model) in a compute_loss_func of your own',
                stacklevel=2,
            )
        return output
    extra = auxiliary_loss(model)
    layers = expert_layers(model).values()
    learns = any(layer.router.weight.requires_grad for layer in layers)
    if torch.is_grad_enabled() and learns and not extra.requires_grad:
        raise RuntimeError(
            'the load-balancing loss has no gradient, as with reentrant '
            'checkpointing; use gradient_checkpointing_enable('
            'dict(use_reentrant=False))'
        )
    share = _share(labels, kwargs.get('num_items_in_batch'))
    loss = loss + model.switch_aux_loss_coef * extra.to(loss.device) * share
    if in_tuple:
        return loss, *output[1:]
    output.loss = loss
    return output


def _argument(model: nn.Module, name: str, args: tuple, kwargs: dict) -> Any:
    """Find an argument of ``forward`` by name or position, or None."""
    if name in kwargs:
        return kwargs[name]
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args)).get(name)


def _share(labels: Optional[Tensor], total: Any) -> Any:
    """This call's share of an accumulated batch.

    ``Trainer`` divides the sum of the losses of all micro-batches by
    ``num_items_in_batch``, so what is a mean has to be weighted here. It
    counts the labels of every task in the same way, also those of a causal
    model that are only predicted from, so that the shares add up to 1.
    """
    if total is None or labels is None:
        return 1
    return (labels != IGNORED_LABEL).sum() / total
