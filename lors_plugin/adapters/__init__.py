"""RepAdapter: adapters that vanish into the layers behind them."""

from .inject import AdapterReport, adapters_of, inject_adapters
from .rep_adapter import RepAdapter
from .sites import SiteError

__all__ = [
    'AdapterReport',
    'RepAdapter',
    'SiteError',
    'adapters_of',
    'inject_adapters',
]
