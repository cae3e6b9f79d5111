"""Export models as ONNX files, and compare those with PyTorch.

``onnx`` and ``onnxruntime`` are optional and imported where they are used.
"""

from .check import ExportError
from .models import (
    ClassifierForExport,
    DetectorForExport,
    for_export,
    takes_one_size,
)
from .onnx_file import (
    check_file,
    export_file,
    new_session,
    write_file,
)

__all__ = [
    'ClassifierForExport',
    'DetectorForExport',
    'ExportError',
    'check_file',
    'export_file',
    'for_export',
    'new_session',
    'takes_one_size',
    'write_file',
]
