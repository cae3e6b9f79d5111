"""RepAdapter: adapters that vanish into the layers behind them."""

from .file_checks import AdapterFileError, is_adapter_checkpoint
from .files import (
    adapter_checkpoint,
    load_adapter_checkpoint,
    remove_adapters,
)
from .fingerprint import fingerprint
from .inject import AdapterReport, adapters_of, inject_adapters
from .rep_adapter import RepAdapter
from .sites import SiteError

__all__ = [
    'AdapterFileError',
    'AdapterReport',
    'RepAdapter',
    'SiteError',
    'adapter_checkpoint',
    'adapters_of',
    'fingerprint',
    'inject_adapters',
    'is_adapter_checkpoint',
    'load_adapter_checkpoint',
    'remove_adapters',
]
