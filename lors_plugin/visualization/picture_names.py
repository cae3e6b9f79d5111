"""Names of pictures that are drawn from images."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Union


def picture_names(
    paths: Sequence[Union[str, Path]], reserved: Sequence[str] = ()
) -> list[str]:
    """Name a picture for each image, so that no picture overwrites another.

    Args:
        paths (Sequence[str | Path]): The images.
        reserved (Sequence[str]): Names that are in use. Defaults to ().

    Returns:
        list[str]: Names without suffix. It is that of the image; images of
        the same name keep the folders in which they differ, those of
        different formats their suffix.
    """
    # Upper and lower case are the same for some file systems.
    paths = [Path(os.path.abspath(path)) for path in paths]
    folders: dict[str, set[Path]] = {}
    for path in paths:
        folders.setdefault(path.stem.casefold(), set()).add(path.parent)
    names: list[str] = []
    taken = {name.casefold() for name in reserved}
    for path in paths:
        root = os.path.commonpath(folders[path.stem.casefold()])
        relative = path.relative_to(root)
        name = relative.with_suffix('').as_posix()
        if name.casefold() in taken:
            name = relative.as_posix()
        while name.casefold() in taken:
            name += '_'
        taken.add(name.casefold())
        names.append(name)
    return names
