"""Hooks for MMEngine's runner."""

from .checkpoint_hook import CheckpointHook
from .epoch_seed_hook import EpochSeedHook
from .expert_usage_hook import ExpertUsageHook
from .freeze_hook import FreezeHook
from .lors_hook import LORSHook
from .rep_adapter_hook import RepAdapterHook

__all__ = [
    'CheckpointHook',
    'EpochSeedHook',
    'ExpertUsageHook',
    'FreezeHook',
    'LORSHook',
    'RepAdapterHook',
]
