"""Find the checkpoint that a training resumes from, and go on from it."""

import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

from mmengine.hooks import Hook, ParamSchedulerHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict, _ParamScheduler
from mmengine.runner import EpochBasedTrainLoop, Runner

from lors_plugin.checkpoints import load_checkpoint_file

# What changes in a scheduler while it runs; the rest is its schedule.
_RUNNING = ('base_values', 'last_step', 'verbose')


def checkpoint_to_resume(
    work_dir: Union[str, Path], trust: bool = False
) -> Optional[str]:
    """Find the newest whole checkpoint of a training.

    That is the one that ``last_checkpoint`` names. If that file is missing,
    or what it names is missing or damaged, it is the file of the work
    directory that was written last, which is logged.

    Args:
        work_dir (str | Path): The work directory.
        trust (bool): Allow files to run code of their own while they are
            read. Defaults to False.

    Returns:
        str, optional: The file, or None where there is nothing to resume.

    Raises:
        ValueError: If there are checkpoints, but none that is whole, or if
            the one that ``last_checkpoint`` names needs ``trust``.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / 'last_checkpoint'
    named, why = None, f'{pointer} is missing'
    if pointer.is_file():
        named = pointer.read_text(errors='replace').strip()
        if '://' in named or (named and Path(named).is_dir()):
            # Remote files and directories (DeepSpeed) are left to the host.
            return named
        problem = _problem(named, trust)
        if problem is None:
            return named
        why = f'{pointer}: {problem}'
        if _is_intact(named):
            raise ValueError(why)
    damaged = []
    for path in _newest_first(work_dir):
        if _problem(path, trust) is None:
            print_log(
                f'--resume: {why}; going on from {path}, the newest whole '
                'checkpoint there',
                logger='current',
            )
            return str(path)
        if not _is_intact(path):
            damaged.append(path.name)
    if named is None and not damaged:
        return None
    others = f' (damaged: {", ".join(damaged)})' if damaged else ''
    raise ValueError(
        f'{why}, and {work_dir} has no whole checkpoint to go on from'
        f'{others}. Give one with --resume CHECKPOINT, or leave --resume out '
        'to train from the beginning'
    )


def _newest_first(work_dir: Path) -> list[Path]:
    """All checkpoint files, those without optimizer state at the end."""
    files = [path for path in work_dir.glob('*.pth') if path.is_file()]
    return sorted(
        files,
        key=lambda path: (
            # What `save_best` writes lacks the state of the optimizer.
            not path.name.startswith('best_'),
            path.stat().st_mtime_ns,
        ),
        reverse=True,
    )


def _problem(path: Union[str, Path], trust: bool) -> Optional[str]:
    """Say why a training cannot resume from a file, None if it can."""
    if not path:
        return 'it is empty'
    try:
        content = load_checkpoint_file(path, trust)
    except ValueError as error:
        return str(error)
    meta = content.get('meta')
    counters = [
        isinstance(meta, dict) and type(meta.get(name)) is int
        for name in ('epoch', 'iter')
    ]
    if not all(counters) or 'message_hub' not in content:
        return f'{path} holds weights, but no state of a training'
    return None


def _is_intact(path: Union[str, Path]) -> bool:
    """Return whether the checksums of an archive match."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


class ResumeHook(Hook):
    """Call :func:`prepare_resume` for runners without our CheckpointHook."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Prepare a checkpoint that is resumed."""
        if runner._resume:
            prepare_resume(runner, checkpoint)


def prepare_resume(runner: Runner, checkpoint: dict) -> None:
    """Warn of what a checkpoint lacks, and let schedules end with a run.

    MMEngine counts iterations on from where the checkpoint was saved, and
    takes the schedules of parameters from there. That is right as long as
    an epoch has as many iterations as it had then. Where it has not, where
    the config has other schedules by now, or where the state of the
    optimizer was not saved, the schedules of the config are advanced to the
    epoch of the checkpoint, as if the training had always had them.

    Args:
        runner (Runner): With its loop, optimizer and schedulers built, and
            the state of the checkpoint not yet loaded into them.
        checkpoint (dict): Of :meth:`Runner.resume`; changed in place.
    """
    reasons = []
    meta, new_iter = checkpoint['meta'], checkpoint['meta']['iter']
    per_epoch = 0
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        per_epoch = len(runner.train_dataloader)
        before = _iterations_per_epoch(checkpoint) or per_epoch
        if before != per_epoch:
            new_iter = meta['epoch'] * per_epoch
            reasons.append(
                f'an epoch has {per_epoch} iterations now and had {before} '
                'then (another batch size, number of processes or data)'
            )
    saved = checkpoint.get('param_schedulers')
    schedulers = list(_flat(runner.param_schedulers))
    if schedulers and _schedules_differ(schedulers, list(_flat(saved))):
        reasons.append('the schedules of the config differ from those then')
    if 'optimizer' not in checkpoint:
        reasons.append(
            'the checkpoint holds no state of the optimizer, as with '
            'save_optimizer=False and in best_*.pth: the training goes on, '
            'but not as if it had not stopped'
        )
    if new_iter >= runner.max_iters:
        runner.logger.warning(
            f'Resuming after epoch {meta["epoch"]}, iteration {new_iter}: '
            f'nothing is left to train ({runner.max_epochs} epochs, '
            f'{runner.max_iters} iterations in the config)'
        )
    if not reasons:
        return
    checkpoint['meta'] = dict(meta, iter=new_iter)
    checkpoint.pop('param_schedulers', None)
    _advance(runner, meta['epoch'], per_epoch, new_iter)
    changed = _move_values(runner, checkpoint, schedulers)
    text = f'Resuming after epoch {meta["epoch"]}: {"; ".join(reasons)}'
    if schedulers:
        text += (
            '. Schedules of the learning rate go on as the config says for '
            f'this epoch and end with the training{changed}'
        )
    runner.logger.warning(text)


def _flat(schedulers: Any) -> Iterator[Any]:
    """Yield the schedulers, or their states, of all optimizers."""
    if isinstance(schedulers, dict):
        for part in schedulers.values():
            yield from part
    else:
        yield from schedulers or ()


def _iterations_per_epoch(checkpoint: dict) -> Optional[int]:
    """Return what an epoch had when a checkpoint was saved, if known."""
    epoch, iteration = (checkpoint['meta'][k] for k in ('epoch', 'iter'))
    info = checkpoint['message_hub'].get('runtime_info') or {}
    total, epochs = info.get('max_iters'), info.get('max_epochs')
    if type(total) is int and type(epochs) is int and epochs > 0:
        number = total // epochs
        if epoch * number <= iteration <= (epoch + 1) * number:
            return number
    return iteration // epoch if epoch else None


def _schedules_differ(
    schedulers: list[_ParamScheduler], saved: list[dict]
) -> bool:
    if len(schedulers) != len(saved):
        return True
    for scheduler, state in zip(schedulers, saved):
        if getattr(scheduler, 'need_val_args', False):
            continue  # what it does depends on metrics
        for name, value in scheduler.state_dict().items():
            running = name in _RUNNING or name.startswith('_')
            if not running and state.get(name, value) != value:
                return True
    return False


def _advance(
    runner: Runner, epochs: int, per_epoch: int, iterations: int
) -> None:
    """Let new schedulers step as often as they would have by now."""
    hook = ParamSchedulerHook()
    with warnings.catch_warnings():
        # Of steps without those of the optimizer.
        warnings.simplefilter('ignore', UserWarning)
        for iteration in range(iterations):
            hook.after_train_iter(runner, iteration)
            done = iteration + 1
            if per_epoch and done % per_epoch == 0:
                if done // per_epoch > epochs:
                    break
                hook.after_train_epoch(runner)


def _move_values(
    runner: Runner, checkpoint: dict, schedulers: list[_ParamScheduler]
) -> str:
    """Write the scheduled values into the state that is loaded next.

    Returns:
        str: The change of the first learning rate, for the log.
    """
    wrapper, state = runner.optim_wrapper, checkpoint.get('optimizer')
    if state is None:
        return ''
    pairs = (
        [(part, state.get(name, {})) for name, part in wrapper.items()]
        if isinstance(wrapper, OptimWrapperDict)
        else [(wrapper, state)]
    )
    names = {scheduler.param_name for scheduler in schedulers}
    if 'momentum' in names:
        names.add('betas')  # where optimizers like Adam have it
    change = ''
    for part, saved in pairs:
        groups = zip(part.param_groups, saved.get('param_groups', ()))
        for group, old in groups:
            if not change and 'lr' in names and 'lr' in old:
                change = f' (now {group["lr"]:.3g}, was {old["lr"]:.3g})'
            for name in (*names, *(f'initial_{name}' for name in names)):
                if name in group:
                    old[name] = group[name]
    return change
