"""Adapters that merge into the layers that they adapt."""

from .adapter import Adapter, RepAdapter
from .bank import AdapterBank
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
from .peft import (
    PeftAdapter,
    PeftError,
    load_peft,
    read_peft,
    to_peft,
    write_peft,
)
from .sites import SiteError

__all__ = [
    'Adapter',
    'AdapterBank',
    'AdapterFileError',
    'AdapterReport',
    'LoRA',
    'PeftAdapter',
    'PeftError',
    'RepAdapter',
    'SiteError',
    'adapter_checkpoint',
    'adapters_of',
    'build_adapted_model',
    'fingerprint',
    'inject_adapters',
    'is_adapter_checkpoint',
    'load_adapter_checkpoint',
    'load_peft',
    'read_peft',
    'remove_adapters',
    'to_peft',
    'write_peft',
]
