"""Models as ONNX files: rewritten for export, written, and compared.

``onnx`` and ``onnxruntime`` are optional and imported where they are used.
"""

from .models import ClassifierForExport, DetectorForExport, for_export
from .onnx_file import (
    ExportError,
    check_file,
    compare,
    export_file,
    new_session,
    write_file,
)
from .windows import smallest_shape

__all__ = [
    'ClassifierForExport',
    'DetectorForExport',
    'ExportError',
    'check_file',
    'compare',
    'export_file',
    'for_export',
    'new_session',
    'smallest_shape',
    'write_file',
]
