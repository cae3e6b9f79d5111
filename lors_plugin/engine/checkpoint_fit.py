"""Does a checkpoint belong to this model?

MMEngine loads what fits and logs the rest, so a model that was loaded with
the weights of another architecture runs, and its results look like a bug.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Optional
from unittest import mock

from mmengine.hooks import Hook
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from lors_plugin.adapters import is_adapter_checkpoint
from lors_plugin.adapters.checkpoint import (
    check_base,
    check_trained,
    read_adapter_file,
)
from lors_plugin.adapters.inject import CHILD
from lors_plugin.checkpoints import (
    ConversionError,
    guess_source,
    load_checkpoint_file,
)
from lors_plugin.compat import register_safe_globals
from lors_plugin.lors.plain_weights import read_plain_weights
from lors_plugin.utils import unwrapped


@dataclasses.dataclass
class CheckpointFit:
    """How the entries of a file and of a model meet.

    Args:
        missing (list[str]): Entries of the model that the file lacks.
        unexpected (list[str]): Entries of the file unknown to the model.
        mismatched (list[str]): Entries of another shape, with both shapes.
        total (int): Number of entries of the model.
        unmatched_share (float): Share of the model's numbers, by count,
            that would not be loaded.
    """

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    total: int
    unmatched_share: float

    @property
    def complete(self) -> bool:
        """Whether every entry of the model would be loaded."""
        return not self.missing and not self.mismatched

    def describe(self, limit: int = 4) -> str:
        """Return the counts and the first few names, a line a kind."""
        lines = [
            f'of {self.total} entries of the model {len(self.missing)} are '
            f'missing in the file and {len(self.mismatched)} have another '
            f'shape there; {len(self.unexpected)} of the file are unknown '
            'to the model'
        ]
        for title, names in (
            ('missing', self.missing),
            ('another shape', self.mismatched),
            ('unknown', self.unexpected),
        ):
            if names:
                dots = ', ...' if len(names) > limit else ''
                lines.append(f'  {title}: {", ".join(names[:limit])}{dots}')
        return '\n'.join(lines)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Forbid every ``torch.load`` to run code of a file."""
    with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD='1'):
        os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
        yield


def _read_checkpoint(path: str, trust: bool) -> dict:
    """Read a file or, by MMEngine, what an address names.

    MMEngine reads an unsafe file all the same, with a warning.
    """
    if '://' not in path:
        return load_checkpoint_file(path, trust)
    register_safe_globals()
    with contextlib.nullcontext() if trust else _weights_only():
        return CheckpointLoader.load_checkpoint(
            path, map_location='cpu', logger='silent'
        )


def read_content(path: str, trust: bool = False) -> Any:
    """Read all that a checkpoint file holds.

    Args:
        path (str): A file or an address that MMEngine loads from.
        trust (bool): Allow the file to run code of its own while it is
            read. Defaults to False.

    Raises:
        ValueError: If the file cannot be read or not without ``trust``.
    """
    try:
        return _read_checkpoint(path, trust)
    except FileNotFoundError:
        raise
    except Exception as error:
        if not trust and UnpicklingError in map(
            type, (error, error.__cause__)
        ):
            raise ValueError(
                f'{path} holds more than weights and plain values, or is '
                'damaged; nothing was loaded. If you trust where it comes '
                'from, add --trust: the file may then run code of its own\n'
                f'({error})'
            ) from error
        raise ValueError(
            f'{path} cannot be read as a checkpoint '
            f'({type(error).__name__}: {error}); was its download or its '
            'training interrupted?'
        ) from error


def read_state_dict(path: str, trust: bool = False) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file.

    Args:
        path (str): A file or an address that MMEngine loads from.
        trust (bool): Allow the file to run code of its own while it is
            read. Defaults to False.

    Returns:
        dict[str, Tensor]: The weights, without the prefix of a parallel
        wrapper.

    Raises:
        ValueError: If there is none, or the file cannot be read or not
            without ``trust``.
    """
    return weights_in(read_content(path, trust), path)


def weights_in(content: Any, path: str) -> dict[str, Tensor]:
    """Take the weights out of what a checkpoint file holds.

    With an EMA, MMEngine stores the averaged weights as ``state_dict``.

    Args:
        content (Any): What was read.
        path (str): The file, for the error message.

    Returns:
        dict[str, Tensor]: The weights, without the prefix of a parallel
        wrapper.

    Raises:
        ValueError: If there are none.
    """
    state = content
    if isinstance(content, dict) and 'state_dict' in content:
        state = content['state_dict']
    weights = {
        re.sub(r'^module\.', '', name): value
        for name, value in (state.items() if isinstance(state, dict) else ())
        if isinstance(value, Tensor)
    }
    if not weights:
        raise ValueError(f'{path} holds no weights (no `state_dict`)')
    return weights


def compare(
    model: dict[str, Tensor], file: dict[str, Tensor]
) -> CheckpointFit:
    """Compare two state dicts by name and shape.

    Args:
        model (dict[str, Tensor]): The model's.
        file (dict[str, Tensor]): The file's.

    Returns:
        CheckpointFit: What is missing, unexpected and mismatched.
    """
    missing, mismatched, lost, total = [], [], 0, 0
    for name, value in model.items():
        size = math.prod(value.shape)
        total += size
        if name not in file:
            if name.endswith('num_batches_tracked'):
                continue  # files of old versions lack this counter
            missing.append(name)
            lost += size
        elif file[name].shape != value.shape:
            shapes = f'file {tuple(file[name].shape)}'
            shapes += f', model {tuple(value.shape)}'
            mismatched.append(f'{name} ({shapes})')
            lost += size
    unexpected = [name for name in file if name not in model]
    return CheckpointFit(
        missing, unexpected, mismatched, len(model), lost / max(total, 1)
    )


def is_original(file: dict[str, Tensor]) -> bool:
    """Whether a state dict is one of the original programs.

    Args:
        file (dict[str, Tensor]): The file's.

    Returns:
        bool: True for one that ``tools/convert_checkpoint.py`` knows.
    """
    heads = {k: v for k, v in file.items() if k.startswith('roi_head.')}
    try:
        guess_source(heads)
    except ConversionError:
        return False
    return True


def check_checkpoint_path(path: str, field: str) -> None:
    """Check that a local checkpoint file exists.

    Args:
        path (str): A file or an address.
        field (str): What the message calls it.

    Raises:
        FileNotFoundError: If it is a local path without a file.
    """
    if '://' not in path and not Path(path).is_file():
        raise FileNotFoundError(
            f'{field}: the checkpoint file {path} does not exist (current '
            f'directory: {Path.cwd()})'
        )


def check_checkpoint(
    model: nn.Module,
    path: str,
    max_unmatched: float = 0.0,
    trust: bool = False,
    hooks: Optional[Sequence[Hook]] = None,
) -> CheckpointFit:
    """Check that a checkpoint belongs to a model.

    Of adapter files everything but the values of the base is checked, which
    a model has only later.

    Args:
        model (:obj:`nn.Module`): The model, wrapped or not.
        path (str): The checkpoint.
        max_unmatched (float): Share of the model that may be left as it is,
            0 for testing and resuming; fine-tuning for other classes leaves
            the classifiers. Defaults to 0.
        trust (bool): Allow the file to run code of its own while it is
            read. Defaults to False.
        hooks (Sequence[Hook], optional): The runner's; without the one that
            reads adapter files, these are refused.

    Returns:
        CheckpointFit: The comparison, for the log.

    Raises:
        ValueError: If it does not.
    """
    content = read_content(path, trust)
    model = unwrapped(model)
    for hook in hooks or ():
        # Some change the model, but only once the run starts.
        if hasattr(hook, 'preview'):
            model = hook.preview(model)
    entries = model.state_dict()
    if is_adapter_checkpoint(content):
        return _check_adapter_file(entries, content, path, hooks)
    file = weights_in(content, path)
    _check_no_adapters_lost(entries, file, path, hooks)
    # A model with shared stacks takes plain weights too.
    read_plain_weights(model, file)
    fit = compare(entries, file)
    original = is_original(file)
    enough = 0 < fit.unmatched_share <= max_unmatched and not original
    if fit.complete or enough:
        return fit
    remedy = (
        'Use the config that the checkpoint was trained with.'
        if max_unmatched == 0
        else 'Fine-tuning needs a checkpoint of the same architecture; to '
        'start from a backbone, use its init_cfg instead of load_from.'
    )
    if original:  # even if the backbone would be loaded
        remedy = (
            'It has the layout of the original program; convert it: python '
            f'tools/convert_checkpoint.py {path} converted.pth'
        )
    raise ValueError(
        f'{path} does not fit the model of this config: {fit.describe()}\n'
        f'{remedy}'
    )


def _check_no_adapters_lost(
    entries: dict[str, Tensor],
    file: dict[str, Tensor],
    path: str,
    hooks: Optional[Sequence[Hook]],
) -> None:
    """Refuse whole weights whose adapters would be left out."""
    names = [type(hook).__name__ for hook in hooks or ()]
    lost = [k for k in file if f'.{CHILD}.' in k and k not in entries]
    if lost and hooks is not None and 'RepAdapterHook' not in names:
        raise ValueError(
            f'{path} has adapters ({lost[0]}), which would be left out: '
            'custom_hooks of this config has no lors_plugin.RepAdapterHook. '
            'Use the config of the training, or merge them first '
            '(tools/reparam.py)'
        )


def _check_adapter_file(
    entries: dict[str, Tensor],
    content: dict,
    path: str,
    hooks: Optional[Sequence[Hook]],
) -> CheckpointFit:
    names = [type(hook).__name__ for hook in hooks or ()]
    if hooks is not None and 'RepAdapterHook' not in names:
        raise ValueError(
            f'{path} holds adapters without their base, but custom_hooks of '
            'this config has no lors_plugin.RepAdapterHook, which reads such '
            'files. Use the config of the training, or a checkpoint with '
            'merged adapters'
        )
    try:
        file = read_adapter_file(content)
        check_trained(entries, file)
        check_base(entries, file.meta, values=False)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return CheckpointFit([], [], [], len(entries), 0.0)
