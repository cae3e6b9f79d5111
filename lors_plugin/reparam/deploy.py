"""From a trained model to weights and a config that stand alone."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from torch import Tensor, nn

from lors_plugin.build import build_model

from .biases import fit_biases
from .checks import MergeError
from .config import comes_from_plugin, deployed_config
from .merge import reparameterize

_KEPT_OUT_OF_META = ('cfg', 'config', 'hook_msgs', 'lors_plugin_adapter')


@dataclass
class Deployed:
    """A merged model, ready to be written.

    Attributes:
        model (nn.Module): Built from ``cfg``, its weights loaded strictly.
        cfg (:obj:`Config`): The config of the merged model.
        state (dict[str, Tensor]): Weights, in the type that was asked for.
        merged (int): How many modules were merged.
        notes (list[str]): What was changed in the config besides.
    """

    model: nn.Module
    cfg: Config
    state: dict
    merged: int
    notes: list

    def content(self, meta: dict) -> dict:
        """What the file holds; of the training's meta what still holds."""
        kept = {k: v for k, v in meta.items() if k not in _KEPT_OUT_OF_META}
        return dict(
            meta=dict(kept, cfg=self.cfg.pretty_text), state_dict=self.state
        )


@torch.no_grad()
def deploy(
    model: nn.Module, cfg: Config, dtype: torch.dtype = torch.float32
) -> Deployed:
    """Merge a copy of a model and put it into the plain host.

    All is computed in float64 and rounded once.

    Args:
        model (nn.Module): As trained, in evaluation mode. It stays so.
        cfg (:obj:`Config`): Its config.
        dtype (torch.dtype): Of the weights. Defaults to torch.float32.

    Returns:
        Deployed: The merged model in float32 with weights of ``dtype``.

    Raises:
        MergeError: If nothing merges, or the host cannot hold the result.
    """
    copy = deepcopy(model).double()
    merged = reparameterize(copy)
    if not merged:
        raise MergeError(
            'nothing in this model merges: it has no adapters, no '
            'convolutions with branches and no shared linear layers'
        )
    state = dict(copy.state_dict())
    new_cfg, notes = deployed_config(cfg)
    host = fit_biases(new_cfg.model, lambda: build_model(new_cfg), state)
    state = {key: _rounded(key, value, dtype) for key, value in state.items()}
    try:
        host.load_state_dict(state, strict=True)
    except RuntimeError as error:
        needs = 'this package' if comes_from_plugin(new_cfg) else 'its host'
        raise MergeError(
            f'the merged weights do not fit the model that {needs} builds '
            f'from the config without adapters: {error}'
        ) from error
    return Deployed(host.eval(), new_cfg, state, merged, notes)


def _rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    value = value.to(dtype)
    if not value.isfinite().all():
        raise MergeError(
            f'{key}: its numbers are too large for '
            f'{str(dtype).removeprefix("torch.")}; merge in float32'
        )
    return value
