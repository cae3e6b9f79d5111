"""Gradient clipping for models that FSDP shards."""

from contextlib import contextmanager

from mmengine.optim import OptimWrapper
from torch import nn

from lors_plugin.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class ShardedOptimWrapper(OptimWrapper):
    """An ``OptimWrapper`` that clips by the norm over all ranks of FSDP.

    Each rank holds a part of every gradient. MMEngine's wrapper clips that
    part by its own norm, so that every rank scales its gradients differently.
    Models that are not sharded are clipped as MMEngine does.

    Args:
        **kwargs: Of :class:`mmengine.optim.OptimWrapper`.
    """

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Remember the model, whose step follows."""
        self._model = model
        with super().optim_context(model):
            yield

    def _clip_grad(self) -> None:
        # FSDP's own; clipping by value needs no other rank.
        clip = getattr(self._model, 'clip_grad_norm_', None)
        if clip is None or self.grad_name != 'grad_norm':
            super()._clip_grad()
            return
        norm = clip(**self.clip_grad_kwargs)
        self.message_hub.update_scalar(f'train/{self.grad_name}', float(norm))
