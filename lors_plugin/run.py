"""Run a tool of this package or a host, or a script of your own.

    lors_plugin [--trust] TOOL [ARGUMENT ...]

``python -m lors_plugin.run`` is the same. TOOL is train, test, infer, demo,
merge, export or doctor (``lors_plugin train --help`` tells more), a file, a
module, or a tool that a package brings along:
``mmdet::analysis_tools/browse_dataset.py``. Configs are files, or
``lors_plugin::lors_adamixer/....py``. Before the tool starts,

- MMCV becomes importable without compiled operators,
- configs may inherit ours: ``_base_ = 'lors_plugin::lors_adamixer/....py'``,
- checkpoints and data files are read by our readers, which run no code that
  a file holds (``--trust`` allows it).

Exit code 2 means that there is no such tool.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from lors_plugin.compat import package_folder

USAGE = __doc__.strip().split('\n\n')[1].strip()
# Commands that need no checkout. A file of that name is not meant.
COMMANDS = dict(
    train='lors_plugin::train.py',
    test='lors_plugin::test.py',
    infer='lors_plugin::infer.py',
    demo='lors_plugin::demo.py',
    merge='lors_plugin::reparam.py',
    export='lors_plugin::export.py',
    doctor='lors_plugin.doctor',
)


def find_tool(name: str) -> tuple[str, bool]:
    """Find what to run.

    Args:
        name (str): A key of :data:`COMMANDS`, a file, a module or
            ``PACKAGE::TOOL``.

    Returns:
        tuple[str, bool]: A path or the name of a module, and whether it is
        a path.

    Raises:
        FileNotFoundError: If there is no such tool.
    """
    name = COMMANDS.get(name, name)
    if '::' in name:
        package, _, tool = name.partition('::')
        try:
            path = package_folder(package, 'tools') / tool
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{name}: {error}') from None
        if not path.is_file():
            raise FileNotFoundError(f'{name}: there is no {path}')
        return str(path), True
    if Path(name).is_file():
        return name, True
    try:
        known = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        known = False
    if not known:
        raise FileNotFoundError(
            f'{name} is neither a command ({", ".join(COMMANDS)}), nor a '
            f'file (current directory: {os.getcwd()}), nor a module'
        )
    return name, False


def prepare(trust: bool = False) -> None:
    """Do what tools of this package do before they start.

    Args:
        trust (bool): Allow files to run code of their own while they are
            read. Defaults to False.
    """
    from lors_plugin.compat import (
        drop_debug_messages,
        read_safely,
        register_configs,
    )

    register_configs()
    drop_debug_messages()
    read_safely(trust)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a tool; it sees the arguments behind its name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    trust = arguments[:1] == ['--trust']
    arguments = arguments[trust:]
    if not arguments or arguments[0] in ('-h', '--help'):
        sys.stdout.write(__doc__)
        return 0 if arguments else 2
    try:
        tool, is_file = find_tool(arguments[0])
    except FileNotFoundError as error:
        sys.stderr.write(f'error: {error}\n{USAGE}\n')
        return 2
    prepare(trust)
    sys.argv = [tool, *arguments[1:]]
    if is_file:
        # As `python TOOL` does, for modules beside it.
        sys.path.insert(0, str(Path(tool).resolve().parent))
        runpy.run_path(tool, run_name='__main__')
    else:
        runpy.run_module(tool, run_name='__main__', alter_sys=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
