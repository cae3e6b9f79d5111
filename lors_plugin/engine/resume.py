"""Find the checkpoint from which an interrupted training resumes."""

import zipfile
from pathlib import Path
from typing import Optional, Union

from mmengine.logging import print_log

from lors_plugin.checkpoints import load_checkpoint_file


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
    except FileNotFoundError:
        return f'the checkpoint file {path} does not exist'
    except ValueError as error:
        return str(error)
    # torch does not compare checksums.
    if zipfile.is_zipfile(path) and not _is_intact(path):
        return f'{path} is damaged (wrong checksum)'
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
