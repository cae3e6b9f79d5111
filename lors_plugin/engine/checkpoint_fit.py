"""Does a checkpoint belong to this model?

MMEngine loads what fits and logs the rest, so a model that was loaded with
the weights of another architecture runs, and its results look like a bug.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from lors_plugin.adapters import is_adapter_checkpoint
from lors_plugin.adapters.checkpoint import (
    check_base,
    check_trained,
    read_adapter_file,
)
from lors_plugin.adapters.methods import is_adapter_key
from lors_plugin.checkpoints import (
    ConversionError,
    guess_source,
    load_checkpoint_file,
    weights_of,
)
from lors_plugin.checkpoints.files import check_is_file
from lors_plugin.lors.plain_weights import read_plain_weights
from lors_plugin.utils import few, unwrapped


@dataclasses.dataclass
class CheckpointFit:
    """The match between the entries of a file and those of a model.

    Args:
        missing (list[str]): Entries of the model that the file lacks.
        unexpected (list[str]): Entries of the file unknown to the model.
        mismatched (list[str]): Entries of another shape, with both shapes,
            or integers for a floating-point weight.
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
        """bool: Whether every entry of the model would be loaded."""
        return not self.missing and not self.mismatched

    def describe(self, limit: int = 4) -> str:
        """Return the counts and the first few names, a line a kind."""
        lines = [
            f'of {self.total} entries of the model {len(self.missing)} are '
            f'missing in the file and {len(self.mismatched)} have another '
            f'shape or type there; {len(self.unexpected)} of the file are '
            'unknown to the model'
        ]
        for title, names in (
            ('missing', self.missing),
            ('another shape or type', self.mismatched),
            ('unknown', self.unexpected),
        ):
            if names:
                lines.append(f'  {title}: {few(names, limit)}')
        return '\n'.join(lines)


def compare(
    model: dict[str, Tensor], file: dict[str, Tensor]
) -> CheckpointFit:
    """Compare two state dicts by name, shape and kind of values.

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
        elif value.is_floating_point() > file[name].is_floating_point():
            # Quantized weights, for example: they need their scales.
            types = f'file {file[name].dtype}, model {value.dtype}'
            mismatched.append(f'{name} ({types})')
            lost += size
    unexpected = [name for name in file if name not in model]
    return CheckpointFit(
        missing, unexpected, mismatched, len(model), lost / max(total, 1)
    )


def is_original(file: dict[str, Tensor]) -> bool:
    """Return whether an original program wrote a state dict.

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
        FileNotFoundError: If it is a local path and no file.
    """
    if '://' in path:
        return
    try:
        check_is_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{field}: {error}') from error


def check_checkpoint(
    model: nn.Module,
    path: str,
    max_unmatched: float = 0.0,
    trust: bool = False,
    hooks: Optional[Sequence[Hook]] = None,
    resume: bool = False,
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
        resume (bool): Whether training goes on from it, which needs its
            counters too. Defaults to False.

    Returns:
        CheckpointFit: The comparison, for the log.

    Raises:
        ValueError: If it does not.
    """
    content = load_checkpoint_file(path, trust)
    if resume:
        check_resumable(content, path)
    model = unwrapped(model)
    for hook in hooks or ():
        # Some change the model, but only once the run starts.
        if hasattr(hook, 'preview'):
            model = hook.preview(model)
    entries = model.state_dict()
    if is_adapter_checkpoint(content):
        return _check_adapter_file(entries, content, path, hooks)
    file = weights_of(content, path=path)
    _check_no_adapters_lost(entries, file, path, hooks)
    return check_weights(model, file, path, max_unmatched)


def check_weights(
    model: nn.Module,
    file: dict[str, Tensor],
    path: str,
    max_unmatched: float = 0.0,
) -> CheckpointFit:
    """Check that weights belong to a model.

    Args:
        model (:obj:`nn.Module`): The model, not wrapped, with its adapters
            and shared stacks.
        file (dict[str, Tensor]): The weights.
        path (str): Where they come from, for the message.
        max_unmatched (float): See :func:`check_checkpoint`. Defaults to 0.

    Returns:
        CheckpointFit: The comparison.

    Raises:
        ValueError: If they do not.
    """
    file = dict(file)
    # A model with shared stacks takes plain weights too.
    read_plain_weights(model, file)
    fit = compare(model.state_dict(), file)
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


def check_resumable(content: dict, path: str) -> None:
    """Check that a checkpoint holds what training needs to go on.

    MMEngine takes all of it as it is.

    Args:
        content (dict): The checkpoint.
        path (str): The file, for the message.

    Raises:
        ValueError: If something is missing or of another type.
    """
    meta, hub = content.get('meta'), content.get('message_hub')
    if meta is None or hub is None:
        raise ValueError(
            f'{path} holds weights without the state of a training (no '
            'meta or message_hub), so nothing can be resumed. To start from '
            'its weights, use load_from without --resume'
        )
    log = hub.get('log_scalars') if isinstance(hub, dict) else None
    wrong = [
        *_of_other_types('', content, _STATE),
        *_of_other_types('meta.', meta, _META),
        *_of_other_types('message_hub.', hub, _HUB),
        *(
            f'message_hub.log_scalars.{name}'
            for name, value in (log if isinstance(log, dict) else {}).items()
            if isinstance(value, HistoryBuffer) and not _is_history(value)
        ),
    ]
    if wrong:
        raise ValueError(
            f'{path} is no checkpoint that training can go on from: '
            f'{"; ".join(wrong[:4])}. Use one that train.py wrote'
        )


# Types of what MMEngine writes: whether it must be there, and its types.
_STATE = dict(
    meta=(True, dict),
    message_hub=(True, dict),
    optimizer=(False, dict),
    param_schedulers=(False, (list, dict)),
    ema_state_dict=(False, dict),
)
_META = dict(
    epoch=(True, int),
    iter=(True, int),
    seed=(False, int),
    dataset_meta=(False, dict),
)
_HUB = dict(
    log_scalars=(True, dict),
    runtime_info=(True, dict),
    resumed_keys=(True, dict),
)


def _of_other_types(
    prefix: str, values: Any, types: dict[str, tuple]
) -> list[str]:
    """Describe the entries whose types are not the expected ones."""
    if not isinstance(values, dict):
        return []
    wrong = []
    for name, (needed, kinds) in types.items():
        value = values.get(name)
        if value is None and not needed:
            continue
        good = isinstance(value, kinds) and not isinstance(value, bool)
        if not good or (kinds is int and value < 0):
            shown = 'missing' if name not in values else repr(value)[:40]
            wrong.append(f'{prefix}{name} is {shown}')
    return wrong


def _is_history(buffer: HistoryBuffer) -> bool:
    """Return whether a log history has the arrays it is made of."""
    try:
        values, counts = buffer.data
    except (AttributeError, TypeError, ValueError):
        return False
    return all(
        isinstance(array, np.ndarray)
        and array.ndim == 1
        and array.dtype.kind in 'fiu'
        for array in (values, counts)
    ) and len(values) == len(counts)


def _check_no_adapters_lost(
    entries: dict[str, Tensor],
    file: dict[str, Tensor],
    path: str,
    hooks: Optional[Sequence[Hook]],
) -> None:
    """Refuse whole weights whose adapters would be left out."""
    names = [type(hook).__name__ for hook in hooks or ()]
    lost = [k for k in file if is_adapter_key(k) and k not in entries]
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
