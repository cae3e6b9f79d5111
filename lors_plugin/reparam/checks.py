"""What is looked at before the first weight of a model is written."""

from torch import Tensor, nn


class MergeError(ValueError):
    """The model cannot be merged; nothing was changed."""


def check_evaluating(module: nn.Module, where: str) -> None:
    """Refuse a module of which any part is in training mode."""
    if any(part.training for part in module.modules()):
        raise MergeError(
            f'{where} or a part of it is in training mode, where dropout and '
            'batch statistics cannot merge; call model.eval() first'
        )


def check_at_hand(tensor: Tensor, where: str) -> None:
    """Refuse a tensor that is not here as a whole."""
    sharded = hasattr(tensor, 'placements') or hasattr(tensor, 'ds_id')
    if tensor.is_meta or sharded:
        raise MergeError(
            f'{where}: its weights are sharded or on the meta device; gather '
            'or load them before merging'
        )


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse NaN, and what overflows in the type of the model."""
    if not tensor.isfinite().all():
        raise MergeError(
            f'{where}: merging gives numbers that are not finite in '
            f'{str(tensor.dtype).removeprefix("torch.")}; look for NaN in '
            'the weights that are merged, or merge in float32'
        )


def like_former(
    module: nn.Module, name: str, value: Tensor, where: str
) -> nn.Parameter:
    """A parameter in the place of a former one, of its type and device.

    Args:
        module (nn.Module): Who has the parameter.
        name (str): Its name there; it may be None so far.
        value (Tensor): The new value, in float64.
        where (str): Name of the module, for messages.

    Returns:
        nn.Parameter: New; nothing is written.
    """
    if name not in module._parameters:
        raise MergeError(
            f'{where}: its {name} is computed from others (a '
            'parametrization?); make it a plain parameter before merging'
        )
    former = module._parameters[name]
    like = next(module.parameters()) if former is None else former
    check_at_hand(like, where)
    new = value.to(like.device, like.dtype)
    check_finite(new, f'{where}.{name}')
    return nn.Parameter(new, requires_grad=like.requires_grad)
