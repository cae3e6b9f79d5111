"""Low-rank residual structures and their relatives for OpenMMLab.

Importing this package is cheap: no torch, no Triton, no GPU. A config that
says ``type='lors_plugin.X'`` imports what it needs by itself.
"""

from .compat import filter_warnings, install_mmcv_ext_fallback
from .version import __version__

install_mmcv_ext_fallback()
filter_warnings()

__all__ = ['__version__']
