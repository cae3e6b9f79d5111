"""Mixed-precision training on any device that autocast knows."""

from contextlib import contextmanager
from typing import Union

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from torch import Tensor

from lors_plugin.registry import OPTIM_WRAPPERS

DTYPES = dict(float16=torch.float16, bfloat16=torch.bfloat16)


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """MMEngine's ``AmpOptimWrapper``, for CPUs too.

    float16 needs loss scaling and gets it; bfloat16 needs none and gets
    none, so a step costs no synchronisation.

    Args:
        dtype (str): 'float16' or 'bfloat16'. Defaults to 'float16'.
        loss_scale (float | str): 'dynamic' or a fixed scale; float16 only.
        **kwargs: See :class:`mmengine.optim.OptimWrapper`.
    """

    def __init__(
        self,
        dtype: str = 'float16',
        loss_scale: Union[float, str] = 'dynamic',
        **kwargs,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f'optim_wrapper.dtype={dtype!r} must be one of {tuple(DTYPES)}'
            )
        super().__init__(**kwargs)
        self.device_type = torch.device(get_device()).type
        self.dtype = DTYPES[dtype]
        if self.device_type == 'cuda' and dtype == 'bfloat16':
            _check_bfloat16(torch.cuda.get_device_capability())
        dynamic = loss_scale == 'dynamic'
        self._fixed_scale = None if dynamic else float(loss_scale)
        # torch before 2.3 had scalers for CUDA only; we need 2.4.
        self.loss_scaler = torch.amp.GradScaler(
            self.device_type,
            enabled=self.dtype == torch.float16,
            **({} if dynamic else dict(init_scale=float(loss_scale))),
        )

    @contextmanager
    def optim_context(self, model: torch.nn.Module):
        """Autocast, inside what MMEngine does for accumulated steps."""
        with (
            super().optim_context(model),
            torch.autocast(self.device_type, self.dtype),
        ):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        """Scale the loss, then back-propagate."""
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs) -> None:
        """Unscale, clip, step; skip the step where gradients overflowed."""
        if self.clip_grad_kwargs:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update(self._fixed_scale)

    def state_dict(self) -> dict:
        """The optimizer's state and the scaler's."""
        return dict(
            super().state_dict(), loss_scaler=self.loss_scaler.state_dict()
        )

    def load_state_dict(self, state_dict: dict) -> None:
        """Take back what :meth:`state_dict` gave."""
        state_dict = dict(state_dict)
        scaler = state_dict.pop('loss_scaler', None)
        if scaler:
            self.loss_scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


def _check_bfloat16(capability: tuple[int, int]) -> None:
    """Autocast would refuse or emulate it below compute capability 8.0."""
    if capability < (8, 0):
        raise ValueError(
            'this GPU has no bfloat16 (compute capability '
            f'{capability[0]}.{capability[1]}, 8.0 is needed); set '
            "optim_wrapper.dtype='float16', or train with --amp float16"
        )
