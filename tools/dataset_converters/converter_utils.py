"""Helpers shared by the data set converters."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger('dataset_converters')


class ConverterError(RuntimeError):
    """A mistake in the input that the user can repair."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and rename it when all went well.

    An interrupted run therefore never leaves half a file behind.

    Args:
        path (str or Path): Final path. Missing folders are created.

    Yields:
        Path: Temporary path with the same suffix to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f'.{path.stem}.', suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: dict, path: str | Path) -> None:
    """Write ``content`` as json, completely or not at all.

    Args:
        content (dict): What to write.
        path (str or Path): Where to write it.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding='utf-8')


def read_coco(path: str | Path) -> dict:
    """Read a COCO annotation file and check that it is one.

    Args:
        path (str or Path): Path of the json file.

    Returns:
        dict: The file with the keys ``images``, ``annotations`` and
        ``categories``.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise ConverterError(f'{path} does not exist') from error
    except ValueError as error:
        raise ConverterError(f'{path} is not json: {error}') from error
    keys = ('images', 'annotations', 'categories')
    if not isinstance(content, dict) or any(k not in content for k in keys):
        raise ConverterError(f'{path} is not a COCO file: it needs {keys}')
    return content


def run_tool(work: Callable[[], None]) -> int:
    """Run a tool and turn its errors into a message and an exit code.

    Args:
        work (Callable): The tool, without arguments.

    Returns:
        int: 0 when it went well, 1 after an error.
    """
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        work()
    except (ConverterError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0
