"""Hooks for MMEngine's runner."""

from lors_plugin.parameternet.expert_usage import ExpertUsageHook

from .epoch_seed_hook import EpochSeedHook
from .freeze_hook import FreezeHook
from .lors_hook import LORSHook
from .rep_adapter_hook import RepAdapterHook

__all__ = [
    'EpochSeedHook',
    'ExpertUsageHook',
    'FreezeHook',
    'LORSHook',
    'RepAdapterHook',
]
