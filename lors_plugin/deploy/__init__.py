"""Run exported models where PyTorch is not installed.

Nothing here but :func:`optimize` imports PyTorch, MMEngine or a host package;
NumPy, ONNX Runtime or OpenVINO, and OpenCV or Pillow are enough. Exporting is
:mod:`lors_plugin.export`.
"""

import warnings
from typing import Any

# What this package held before it became ``lors_plugin.export``.
_MOVED = (
    'ClassifierForExport',
    'DetectorForExport',
    'ExportError',
    'check_file',
    'export_file',
    'for_export',
    'new_session',
    'takes_one_size',
    'write_file',
)


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch; find a former name, and warn."""
    if name == 'optimize':
        from .eager import optimize

        return optimize
    if name not in _MOVED:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from lors_plugin import export

    warnings.warn(
        f'lors_plugin.deploy.{name} is now lors_plugin.export.{name}',
        FutureWarning,
        stacklevel=2,
    )
    return getattr(export, name)
