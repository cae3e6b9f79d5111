"""Reading goldens: inputs, weights and outputs of the original programs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Union

import numpy as np
import torch
from torch import Tensor

from lors_plugin.reparam.compare import difference

from .weights import rule_weight

Errors = dict[str, float]
# Called with a text before each step that takes long.
Progress = Callable[[str], None]

# Gradients this much smaller than the largest one are rounding noise.
NOISE_FLOOR = 1e-8
# What a right port must reach, relative to the largest value of an entry.
TOLERANCE = 1e-4
# Entries that tell a kind from the kinds below it.
KINDS: dict[str, set[str]] = {
    'rep_adapter': {'merged_weight', 'adapted'},
    'detector': {'total_loss'},
    'sampling': {'points', 'strides', 'n_points'},
    'lors_mixing': {'upstream', 's0.out'},
    'adamixer_mixing': {'upstream', 'out', 'grad_query'},
    'lors_vit': {'layer0_attn', 'layer0_ffn', 'config'},
    'parameternet': {'x', 'logits', 'config'},
}


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest reference value."""
    if value.shape != reference.shape:
        raise ValueError(
            f'shape {tuple(value.shape)} is compared with '
            f'{tuple(reference.shape)}'
        )
    return difference('', reference, value.detach()).relative


class Golden:
    """One ``.npz`` file of inputs, weights and outputs.

    Args:
        path (str | Path): The file; ``NAME.keys.json`` must lie beside it
            where its weights are by rule.

    Raises:
        ValueError: If it is no golden of a kind checked here.
    """

    def __init__(self, path: Union[str, Path]) -> None:
        self.path = Path(path)
        with np.load(path, allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.kind = self._recognise()
        self.notes = []
        self.noise: Errors = {}

    def _recognise(self) -> str:
        for kind, entries in KINDS.items():
            if entries <= self.arrays.keys():
                return kind
        raise ValueError(
            f'{self.path} is no golden of a kind known here '
            f'({", ".join(KINDS)}); it holds {sorted(self.arrays)[:8]}'
        )

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str) -> Tensor:
        """One entry as a tensor."""
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def json(self, *keys: str) -> dict:
        """The first of these entries that is there, parsed."""
        key = next(key for key in keys if key in self.arrays)
        return json.loads(str(self.arrays[key]))

    def original_weights(self) -> dict[str, Tensor]:
        """The original state dict, from the file or by rule."""
        carried = {
            k[2:]: self.tensor(k) for k in self.arrays if k.startswith('w.')
        }
        if carried:
            return carried
        keys = json.loads(self.path.with_suffix('.keys.json').read_text())
        seed = (
            int(self.arrays['seed'])
            if 'seed' in self
            else self.json('dims')['seed']
        )
        return {
            key: torch.from_numpy(
                np.asarray(
                    rule_weight(key, entry['shape'], seed, entry['kind'])
                    * np.float32(entry['scale'])
                )
            )
            for key, entry in keys.items()
            if entry['kind'] != 'keep'
        }
