"""Optimizer wrappers."""

from .autocast_optim_wrapper import AutocastOptimWrapper
from .sharded_optim_wrapper import ShardedOptimWrapper

__all__ = ['AutocastOptimWrapper', 'ShardedOptimWrapper']
