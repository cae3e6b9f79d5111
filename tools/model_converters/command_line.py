"""The command line of all converters of checkpoints."""

import argparse
import logging
from collections.abc import Callable, Sequence

from lors_plugin.checkpoints import ConversionError
from lors_plugin.compat import drop_debug_messages

logger = logging.getLogger('model_converters')


def run(
    convert: Callable[[str, str], None],
    description: str,
    source: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Read the command line, convert, and say what went wrong.

    Args:
        convert (Callable): Takes the paths of both files.
        description (str): Of the tool.
        source (str): What is converted.
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        int: Exit code, 1 after an error.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('src', help=source)
    parser.add_argument('dst', help='checkpoint to write')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    drop_debug_messages()
    try:
        convert(args.src, args.dst)
    except (ConversionError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0
