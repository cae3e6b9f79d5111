"""Predictions of trained models on images, folders and videos."""

from .errors import InferenceError
from .inputs import Frame, Source, find_sources, read_frames
from .prediction import Prediction
from .predictor import (
    ExportedPredictor,
    Predictor,
    TorchPredictor,
    adapters_off,
    load_predictor,
)
from .tiles import TiledPredictor

__all__ = [
    'Frame',
    'InferenceError',
    'ExportedPredictor',
    'Prediction',
    'Predictor',
    'Source',
    'TiledPredictor',
    'TorchPredictor',
    'adapters_off',
    'find_sources',
    'load_predictor',
    'read_frames',
]
