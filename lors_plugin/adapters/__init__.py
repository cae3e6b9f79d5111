"""Adapters that merge into the layers that they adapt."""

from .adapter import Adapter, RepAdapter
from .checkpoint import (
    AdapterFileError,
    adapter_checkpoint,
    fingerprint,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
    remove_adapters,
)
from .inject import (
    AdapterReport,
    adapters_of,
    build_adapted_model,
    inject_adapters,
)
from .lora import LoRA
from .sites import SiteError

__all__ = [
    'Adapter',
    'AdapterFileError',
    'AdapterReport',
    'LoRA',
    'RepAdapter',
    'SiteError',
    'adapter_checkpoint',
    'adapters_of',
    'build_adapted_model',
    'fingerprint',
    'inject_adapters',
    'is_adapter_checkpoint',
    'load_adapter_checkpoint',
    'remove_adapters',
]
