"""Checkpoints that no kill, full disk or notice to stop can lose."""

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Optional

import torch
from mmengine.dist import (
    all_reduce,
    barrier,
    get_world_size,
    is_main_process,
)
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as HostCheckpointHook
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import (
    BaseLoop,
    EpochBasedTrainLoop,
    Runner,
    find_latest_checkpoint,
)

from lors_plugin.checkpoints.files import (
    remove_interrupted_writes,
    replace_file,
)
from lors_plugin.engine.random_state import (
    gather_random_states,
    set_random_state,
)
from lors_plugin.engine.resume import prepare_resume
from lors_plugin.engine.stop_notice import StopNotice, shield_workers
from lors_plugin.registry import HOOKS

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 'interrupted.pth'
POSITION = 'position'  # key in checkpoints
BACKEND = 'lors_plugin.atomic'


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; older ones are as they were."""


class ResumeError(ValueError):
    """A training cannot go on where its checkpoint was saved."""


class AtomicLocalBackend(LocalBackend):
    """MMEngine's local files, written so that they are whole or absent."""

    def put(self, obj: bytes, filepath: Any) -> None:
        """Write bytes beside ``filepath``, flush and rename."""
        try:
            with replace_file(filepath) as beside:
                beside.write_bytes(obj)
        except OSError as error:
            raise CheckpointWriteError(
                f'the checkpoint {filepath} cannot be written ({error}). '
                'Those before it are as they were: make room and go on with '
                '--resume'
            ) from error


register_backend(BACKEND, AtomicLocalBackend, force=True)


@HOOKS.register_module()
class CheckpointHook(HostCheckpointHook):
    """Save checkpoints so that a run is never lost.

    MMEngine's hook deletes old files first and writes in place. This one

    - writes beside, flushes to disk and renames; only then it moves
      ``last_checkpoint`` in the same way and deletes old files,
    - deletes files of this run in its own directory and nothing else,
      whatever a checkpoint that is resumed says about other files; neither
      directories nor links,
    - finishes the step when SIGTERM or SIGUSR1 arrives, saves
      ``interrupted.pth`` and exits with :data:`EXIT_REQUEUE`, on all ranks.
      During validation it does not wait for the end.

    A training that resumes from the middle of an epoch loads the batches
    that it has been trained on and leaves them out, then continues with the
    random numbers of that step; with :class:`EpochSeedHook`, it comes out as
    if it had not stopped. An interrupted validation is done again. Loops
    over iterations advance their data as MMEngine does.

    Args:
        **kwargs: Of :class:`mmengine.hooks.CheckpointHook`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._notice = StopNotice()
        self._stopping = False
        self._own_directory = False
        self._batches_done = 0
        self._random: Optional[list] = None
        self._position: Optional[dict] = None  # to save
        self._resumed: Optional[dict] = None  # to continue at
        self._val_steps = 0

    def before_run(self, runner: Runner) -> None:
        """Let signals do what they did before, however a training ends."""
        # Hooks are not told of an exception.
        loop = runner._train_loop
        if isinstance(loop, BaseLoop):  # not so where only a test runs
            loop.run = partial(_run_and_restore, loop.run, self._notice)

    def before_train(self, runner: Runner) -> None:
        """Find out what belongs to this run, and listen for signals."""
        info = runner.message_hub.runtime_info
        # The host would delete what these name.
        kept = info.pop('keep_ckpt_ids', [])
        best = {k: info.pop(k) for k in list(info) if k.startswith('best_ck')}
        super().before_train(runner)
        backend = getattr(self.file_backend, 'client', self.file_backend)
        self._local = isinstance(backend, LocalBackend)
        if self._local:
            self.file_client_args = None
            self.backend_args = dict(backend=BACKEND)
            if is_main_process():
                remove_interrupted_writes(self.out_dir)
        self.keep_ckpt_ids = []
        source = self._resumed_here(runner)
        self._own_directory = source is not None
        if source is not None:
            self._take_over(runner, source, kept, best)
            self._delete_outdated(runner)
        self._check_position(runner)
        self._listen(runner)
        if self._resumed is not None and self._resumed['validate']:
            runner.val_loop.run()

    def before_train_epoch(self, runner: Runner) -> None:
        """Stop between epochs, or leave out what has been trained on."""
        self._batches_done = 0
        if self._stopping:
            self._stop(runner)
        if self._resumed is None or not _has_epochs(runner):
            return
        done = self._resumed['batch']
        if done == 0:
            self._resumed = None
            return
        runner.logger.info(
            f'The first {done} batches of this epoch were trained on before '
            'the interruption; they are loaded and left out'
        )
        _leave_out(runner.train_loop, done, self._restore_random)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Stop between steps."""
        if self._stopping:
            self._stop(runner)
        self._restore_random()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Save where the interval says so; find out whether to stop."""
        self._batches_done = batch_idx + 1 if _has_epochs(runner) else 0
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        # Accumulated gradients are in no checkpoint.
        if _step_is_complete(runner) and self._notice.agreed():
            self._stopping = True
            self._random = gather_random_states()

    def after_train_epoch(self, runner: Runner) -> None:
        """Save where the interval says so."""
        vars(runner.train_loop).pop('run_iter', None)
        self._batches_done = 0
        super().after_train_epoch(runner)

    def before_val(self, runner: Runner) -> None:
        """Stop before a validation."""
        if self._stopping:
            self._stop(runner, validate=True)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        """Stop in the middle of a validation, which is then done again."""
        # The last batch may be missing on some ranks.
        if batch_idx < self._val_steps and self._notice.agreed():
            self._random = gather_random_states()
            for hook in runner.hooks:
                # The model has the averaged weights.
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)
            self._stop(runner, validate=True)

    def after_train(self, runner: Runner) -> None:
        """Validate to the end from here on."""
        self._val_steps = 0
        super().after_train(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember where a checkpoint that is resumed was saved."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get(POSITION)
        prepare_resume(runner, checkpoint)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the place in the epoch."""
        if self._position is not None:
            checkpoint[POSITION] = self._position

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        """Save, move ``last_checkpoint``, then delete the oldest."""
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        if self.max_keep_ckpts > 0:
            ids = [i for i in self.keep_ckpt_ids if i != step] + [step]
            self.keep_ckpt_ids = ids
            # With those that are deleted next: a run that is killed before
            # does that when it resumes.
            runner.message_hub.update_info('keep_ckpt_ids', list(ids))
        self._save(
            runner,
            name,
            meta,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            by_epoch=self.by_epoch,
            **self.args,
        )
        self._delete_outdated(runner)
        if self._own_directory:
            self._delete(runner, INTERRUPTED)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save the best one, then delete the one before."""
        if not self.save_best:
            return
        before = self._best_paths()
        # The host would delete them first.
        self._set_best_paths(dict.fromkeys(before))
        super()._save_best_checkpoint(runner, metrics)
        now = self._best_paths()
        self._set_best_paths({k: now[k] or before[k] for k in before})
        for key, path in before.items():
            if path and now[key] and path != now[key]:
                self._delete(runner, os.path.basename(path))

    def _best_paths(self) -> dict[Optional[str], Optional[str]]:
        """The best checkpoint of each metric; of a single one by None."""
        if len(self.key_indicators) == 1:
            return {None: self.best_ckpt_path}
        return dict(self.best_ckpt_path_dict)

    def _set_best_paths(
        self, paths: dict[Optional[str], Optional[str]]
    ) -> None:
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths[None]
        else:
            self.best_ckpt_path_dict.update(paths)

    def _save(
        self,
        runner: Runner,
        name: str,
        meta: dict,
        validate: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint and let ``last_checkpoint`` name it."""
        self._position = self._current_position(runner, validate)
        try:
            runner.save_checkpoint(
                self.out_dir,
                name,
                self.file_client_args,
                meta=meta,
                backend_args=self.backend_args,
                **kwargs,
            )
        finally:
            self._position = None
        if is_main_process():
            path = self.file_backend.join_path(self.out_dir, name)
            pointer = os.path.join(runner.work_dir, 'last_checkpoint')
            AtomicLocalBackend().put(path.encode(), pointer)

    def _stop(self, runner: Runner, validate: bool = False) -> NoReturn:
        """Save and end the process on all ranks."""
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        self._save(runner, INTERRUPTED, meta, validate)
        # Launchers end all ranks as soon as one has ended.
        barrier()
        runner.logger.info(
            f'{self._notice.received or "Another rank"} asked to stop: saved '
            f'{INTERRUPTED} in {self.out_dir} after {runner.iter} steps; '
            f'--resume goes on from there (exit code {EXIT_REQUEUE})'
        )
        raise SystemExit(EXIT_REQUEUE)

    def _current_position(
        self, runner: Runner, validate: bool
    ) -> Optional[dict]:
        """Describe the position within an epoch for a checkpoint."""
        done = self._batches_done
        if _has_epochs(runner) and done == 0 and not validate:
            return None
        return dict(
            batch=done,
            batches=len(runner.train_dataloader) if done else 0,
            ranks=get_world_size(),
            validate=validate,
            random=self._random or gather_random_states(),
        )

    def _check_position(self, runner: Runner) -> None:
        """Refuse to go on within an epoch that has other batches now."""
        position = self._resumed
        if position is None or not _has_epochs(runner):
            return
        before = (position['batches'], position['ranks'])
        now = (len(runner.train_dataloader), get_world_size())
        if position['batch'] and before != now:
            raise ResumeError(
                f'the checkpoint was saved after {position["batch"]} of '
                f'{before[0]} batches of an epoch on {before[1]} processes; '
                f'now an epoch has {now[0]} batches on {now[1]} processes. '
                'Use the batch size, the data and the number of processes of '
                'then, or resume from a checkpoint of a whole epoch'
            )

    def _restore_random(self) -> None:
        """Restore the random states of the checkpoint, once."""
        position, self._resumed = self._resumed, None
        if position is not None and position['ranks'] == get_world_size():
            set_random_state(position['random'])

    def _listen(self, runner: Runner) -> None:
        """Listen for signals, in the workers too."""
        self._stopping = False
        self._notice.listen()
        shield_workers(runner.train_dataloader)
        if runner.val_loop is not None:
            shield_workers(runner.val_dataloader)
            steps = torch.tensor(len(runner.val_dataloader))
            all_reduce(steps, 'min')
            self._val_steps = int(steps)

    def _resumed_here(self, runner: Runner) -> Optional[str]:
        """The name of the checkpoint that is resumed, if it is in our
        directory."""
        if not runner._resume:
            return None
        source = runner._load_from or find_latest_checkpoint(runner.work_dir)
        if source is None or '://' in source:
            return None
        path = Path(source)
        same = path.parent.resolve() == Path(self.out_dir).resolve()
        return path.name if same else None

    def _take_over(
        self, runner: Runner, source: str, kept: Any, best: dict
    ) -> None:
        """Take over the files of the run that is resumed, by their names.

        Args:
            runner (Runner): The runner.
            source (str): The name of the checkpoint that is resumed.
            kept (list[int]): Its ``keep_ckpt_ids``; as ``best``, it is what
                the checkpoint says, and that may be anything.
            best (dict[str, str]): Its ``best_ckpt`` and the like.
        """
        ids = kept if isinstance(kept, (list, tuple)) else []
        self.keep_ckpt_ids = sorted(
            (i for i in ids if type(i) is int),
            # The last one to be deleted is the one that is resumed.
            key=lambda i: self.filename_tmpl.format(i) == source,
        )
        template = re.escape(self.filename_tmpl.replace('/', '_'))
        ours = 'best_.+_' + re.sub(r'\\{.*?\\}', r'\\d+', template)
        for key in self._best_paths() if self.save_best else ():
            entry = 'best_ckpt' if key is None else f'best_ckpt_{key}'
            name = os.path.basename(str(best.get(entry)))
            if re.fullmatch(ours, name):
                path = self.file_backend.join_path(self.out_dir, name)
                runner.message_hub.update_info(entry, path)
                self._set_best_paths({key: path})

    def _delete_outdated(self, runner: Runner) -> None:
        """Delete the oldest checkpoints until ``max_keep_ckpts`` are left."""
        while 0 < self.max_keep_ckpts < len(self.keep_ckpt_ids):
            step = self.keep_ckpt_ids.pop(0)
            self._delete(runner, self.filename_tmpl.format(step))
        if self.max_keep_ckpts > 0:
            runner.message_hub.update_info(
                'keep_ckpt_ids', list(self.keep_ckpt_ids)
            )

    def _delete(self, runner: Runner, name: str) -> None:
        """Delete a file of this run in its directory, and nothing else."""
        if not is_main_process():
            return
        path = self.file_backend.join_path(self.out_dir, name)
        if not self._local:
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            return
        path = Path(path)
        folder = Path(self.out_dir).resolve()
        if path.is_symlink() or not path.resolve().is_relative_to(folder):
            runner.logger.warning(f'{path} leads elsewhere and is left there')
        elif path.is_dir():
            runner.logger.warning(f'{path} is a directory and is left there')
        else:
            path.unlink(missing_ok=True)


def _has_epochs(runner: Runner) -> bool:
    return isinstance(runner.train_loop, EpochBasedTrainLoop)


def _run_and_restore(run: Callable, notice: StopNotice) -> Any:
    try:
        return run()
    finally:
        notice.restore()


def _step_is_complete(runner: Runner) -> bool:
    """Return whether the optimizer has used all gradients."""
    wrapper = runner.optim_wrapper
    if isinstance(wrapper, OptimWrapperDict):
        return all(part.should_update() for part in wrapper.values())
    return wrapper.should_update()


def _leave_out(
    loop: EpochBasedTrainLoop, done: int, at_last: Callable[[], None]
) -> None:
    """Let a loop take batches without training on them.

    Args:
        loop (EpochBasedTrainLoop): At the start of an epoch.
        done (int): How many batches to leave out.
        at_last (callable): Called before the next batch is loaded.
    """
    run_iter = loop.run_iter

    def leave_out(idx: int, data_batch: Any) -> None:
        if idx < done:
            if idx + 1 == done:
                at_last()
        else:
            run_iter(idx, data_batch)

    # Instance attribute, which goes at the end of the epoch.
    loop.run_iter = leave_out
