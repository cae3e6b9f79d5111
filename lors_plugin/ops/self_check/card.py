"""Describe a card and the software around it, for which a verdict holds."""

import dataclasses
import functools
import hashlib
import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Optional

import torch

OPS = Path(__file__).resolve().parents[1]
KERNELS = (
    'adaptive_mixing/triton/*.py',
    'sampling_3d/triton_kernels.py',
    'triton_utils.py',
)
DRIVER_FILE = Path('/proc/driver/nvidia/version')


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU and all versions that decide what its kernels do.

    Attributes:
        name (str): As the driver names it.
        capability (str): Compute capability, such as '8.0'.
        driver (str): Version of the driver.
        torch (str): Version of PyTorch, with that of CUDA.
        triton (str): Version of Triton.
        lors_plugin (str): Version of this package.
        kernels (str): Hash of the sources of the kernels, which may change
            within a version.
    """

    name: str
    capability: str
    driver: str
    torch: str
    triton: str
    lors_plugin: str
    kernels: str

    @property
    def key(self) -> str:
        """Name of the card and a hash of everything, for a file name."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')
        return f'{name[:40]}-{digest}'


def find_card(index: Optional[int] = None) -> Card:
    """Describe a GPU of this machine.

    Args:
        index (int, optional): Its number; None for the current one.
    """
    major, minor = torch.cuda.get_device_capability(index)
    return Card(
        name=torch.cuda.get_device_name(index),
        capability=f'{major}.{minor}',
        driver=driver_version(),
        torch=f'{torch.__version__}, CUDA {torch.version.cuda}',
        triton=_version_of('triton', 'pytorch-triton', 'triton-windows'),
        lors_plugin=_version_of('lors_plugin'),
        kernels=hash_kernels(),
    )


@functools.cache
def driver_version() -> str:
    """Return the version of the NVIDIA driver, 'unknown' without."""
    try:
        text = DRIVER_FILE.read_text(encoding='utf-8')
    except OSError:
        command = ['nvidia-smi', '--query-gpu=driver_version']
        try:
            text = subprocess.run(
                [*command, '--format=csv,noheader'],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return 'unknown'
    found = re.search(r'\b\d{3,}\.\d+(\.\d+)?\b', text)
    return found.group() if found else 'unknown'


@functools.cache
def hash_kernels() -> str:
    """Return a hash of the kernels' sources, 16 hex digits."""
    digest = hashlib.sha256()
    for pattern in KERNELS:
        for path in sorted(OPS.glob(pattern)):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version_of(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return 'unknown'
