"""Looking into a model while it runs, and drawing its predictions."""

from .picture_names import picture_names
from .sampling_recorder import SamplingRecorder, StageRecord

__all__ = ['SamplingRecorder', 'StageRecord', 'picture_names']
