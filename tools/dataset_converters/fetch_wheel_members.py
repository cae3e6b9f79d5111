"""Get files out of a pinned wheel of the package index, without installing.

Example:
    python tools/dataset_converters/fetch_wheel_members.py \
        deepforest==2.1.0 --sha256 8c2798... --wheel-dir downloads \
        --dest photos --members deepforest/data/OSBS_029.png
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from converter_utils import ConverterError, logger, run_tool

from lors_plugin.checkpoints.files import replace_file


def fetch_wheel_members(
    requirement: str,
    sha256: str,
    members: Sequence[str],
    dest: str | Path,
    wheel_dir: str | Path,
) -> list[Path]:
    """Get files out of a pinned wheel; reuse what is already there.

    Args:
        requirement (str): ``NAME==VERSION``.
        sha256 (str): Expected checksum of the wheel.
        members (Sequence[str]): Paths inside the wheel, with different file
            names.
        dest (str or Path): Folder for the files; their own folders are
            dropped.
        wheel_dir (str or Path): Folder that keeps the wheel. A wheel that
            was put there by hand is used instead of a download.

    Returns:
        list[Path]: The files, in the order of ``members``.
    """
    if requirement.count('==') != 1:
        raise ConverterError(f'pin a version: {requirement} is not NAME==X.Y')
    paths = [Path(dest) / Path(member).name for member in members]
    if len(set(paths)) != len(paths):
        raise ConverterError(f'two members share a file name: {members}')
    if all(path.is_file() for path in paths):
        logger.info('%s: %d files are in %s', requirement, len(paths), dest)
        return paths
    with zipfile.ZipFile(get_wheel(requirement, sha256, wheel_dir)) as wheel:
        missing = sorted(set(members) - set(wheel.namelist()))
        if missing:
            raise ConverterError(
                f'{wheel.filename} does not contain {missing}'
            )
        for member, path in zip(members, paths):
            with replace_file(path) as beside:
                beside.write_bytes(wheel.read(member))
    logger.info('%s: %d files put in %s', requirement, len(paths), dest)
    return paths


def get_wheel(requirement: str, sha256: str, wheel_dir: str | Path) -> Path:
    """Download a wheel with pip unless it is there, and check it."""
    name, version = requirement.split('==')
    pattern = f'{name.replace("-", "_")}-{version}-*.whl'
    wheel_dir = Path(wheel_dir)
    wheel_dir.mkdir(parents=True, exist_ok=True)
    for wheel in sorted(wheel_dir.glob(pattern)):
        check_wheel(wheel, sha256)
        logger.info('%s: using %s', requirement, wheel)
        return wheel
    with tempfile.TemporaryDirectory(prefix='.pip-', dir=wheel_dir) as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
        command += ['--only-binary', ':all:', '--disable-pip-version-check']
        result = subprocess.run([*command, '-d', folder, requirement])
        wheel = next(Path(folder).glob(pattern), None)
        if result.returncode or wheel is None:
            raise ConverterError(
                f'pip could not download {requirement} (see its message '
                'above). Without a network: on a machine that has one, run\n'
                f'    pip download --no-deps --only-binary :all: {requirement}'
                f'\nand copy the wheel to\n    {wheel_dir.resolve()}\n'
                'then start again.'
            )
        check_wheel(wheel, sha256)
        return wheel.rename(wheel_dir / wheel.name)


def check_wheel(wheel: Path, sha256: str) -> None:
    """Raise an error when a wheel is not the pinned one."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ConverterError(
            f'{wheel} has the sha256 {found}, not the pinned {sha256}: it is '
            'damaged or another file. Move it away and start again.'
        )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Get files out of a pinned wheel of the package index'
    )
    parser.add_argument('requirement', help='NAME==VERSION')
    parser.add_argument('--sha256', required=True, help='of the wheel')
    parser.add_argument(
        '--members', nargs='+', required=True, help='paths inside the wheel'
    )
    parser.add_argument('--dest', required=True, help='folder for the files')
    parser.add_argument(
        '--wheel-dir', required=True, help='folder that keeps the wheel'
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(
        lambda args: fetch_wheel_members(**vars(args)), parse_args(argv)
    )


if __name__ == '__main__':
    sys.exit(main())
