"""Hooks for MMEngine's runner.

Those of a paper are in its room; they have their names here too, which
configs in the new style import.
"""

from lors_plugin.adapters.hook import RepAdapterHook
from lors_plugin.lors.hook import LORSHook
from lors_plugin.parameternet.expert_usage import ExpertUsageHook

from .checkpoint_hook import CheckpointHook
from .class_names_hook import ClassNamesHook
from .epoch_seed_hook import EpochSeedHook
from .finite_predictions_hook import FinitePredictionsHook
from .freeze_hook import FreezeHook
from .kernel_check_hook import KernelCheckHook

__all__ = [
    'CheckpointHook',
    'ClassNamesHook',
    'EpochSeedHook',
    'ExpertUsageHook',
    'FinitePredictionsHook',
    'FreezeHook',
    'KernelCheckHook',
    'LORSHook',
    'RepAdapterHook',
]
