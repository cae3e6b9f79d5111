"""Looking into a model while it runs."""

from .sampling_recorder import SamplingRecorder, StageRecord

__all__ = ['SamplingRecorder', 'StageRecord']
