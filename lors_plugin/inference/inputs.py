"""Images, folders, patterns, videos, webcams and COCO files as frames."""

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import cv2
import numpy as np

from .errors import InferenceError

IMAGES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
# A video whose file promises more frames than can be read is damaged; the
# number in the file is often a little off.
ENOUGH_FRAMES = 0.9


@dataclass
class Source:
    """An input that frames are read from.

    Attributes:
        path (Path): The file; ``webcam0`` for a webcam.
        kind (str): 'image', 'video' or 'webcam'.
        image_id (int, optional): Of a COCO file.
    """

    path: Path
    kind: str = 'image'
    image_id: Optional[int] = None

    def count(self) -> Optional[int]:
        """Return the number of frames, None where nobody knows."""
        if self.kind == 'image':
            return 1
        if self.kind == 'webcam':
            return None
        capture = cv2.VideoCapture(str(self.path))
        try:
            return max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        finally:
            capture.release()


@dataclass
class Frame:
    """An image, or what is wrong with it.

    Attributes:
        source (Source): Where it comes from.
        index (int): Number within a video, from 0; 0 for images.
        image (np.ndarray, optional): BGR, shape (H, W, 3).
        error (str): Why there is none.
        fps (float, optional): Of the video.
    """

    source: Source
    index: int = 0
    image: Optional[np.ndarray] = None
    error: str = ''
    fps: Optional[float] = None


def find_sources(
    inputs: Sequence[str],
    image_dir: Optional[str] = None,
    leave_out: Optional[Union[str, Path]] = None,
) -> list[Source]:
    """Find what the inputs of a command line name.

    Args:
        inputs (Sequence[str]): Images, videos, folders (with those in them),
            glob patterns, numbers of webcams, and COCO files.
        image_dir (str, optional): Folder of the images of COCO files.
            Defaults to None, which means the folder of the file.
        leave_out (str | Path, optional): A folder whose files are not taken
            from folders and patterns: that of the results.

    Returns:
        list[Source]: Each file once. Image files that do not exist are among
        those of a COCO file; reading tells.

    Raises:
        InferenceError: If an input names nothing.
    """
    found: dict[Path, Source] = {}
    for name in inputs:
        sources = list(_sources_of(name, image_dir, leave_out))
        if not sources:
            raise InferenceError(
                f'{name}: there are no images or videos (the suffixes '
                f'{" ".join((*IMAGES, *VIDEOS))} are known)'
            )
        for source in sources:
            found.setdefault(source.path.absolute(), source)
    return list(found.values())


def _sources_of(
    name: str, image_dir: Optional[str], leave_out: Union[str, Path, None]
) -> Iterator[Source]:
    path = Path(name)
    if path.is_dir():
        yield from _known_files(sorted(path.rglob('*')), leave_out, path)
    elif path.suffix.lower() == '.json' and path.is_file():
        yield from _coco_sources(path, image_dir)
    elif path.is_file():
        video = path.suffix.lower() in VIDEOS
        yield Source(path, 'video' if video else 'image')
    elif name.isdigit():
        yield Source(Path(f'webcam{name}'), 'webcam')
    elif glob.has_magic(name):
        matches = map(Path, sorted(glob.glob(name, recursive=True)))
        yield from _known_files(matches, leave_out)
    else:
        raise InferenceError(
            f'{name}: there is no such file or folder (current directory: '
            f'{Path.cwd()})'
        )


def _known_files(
    paths: Sequence[Path],
    leave_out: Union[str, Path, None],
    root: Path = Path(),
) -> Iterator[Source]:
    """Yield the images and videos that are neither hidden nor results."""
    results = None if leave_out is None else Path(leave_out).absolute()
    for path in paths:
        hidden = path.name.startswith('.') or (
            path.is_relative_to(root)
            and any(p.startswith('.') for p in path.relative_to(root).parts)
        )
        # A link that leads nowhere is an input that cannot be read.
        broken = path.is_symlink() and not path.exists()
        if hidden or not (broken or path.is_file()):
            continue
        if results is not None and results in path.absolute().parents:
            continue
        suffix = path.suffix.lower()
        if suffix in IMAGES or suffix in VIDEOS:
            yield Source(path, 'image' if suffix in IMAGES else 'video')


def read_coco(path: Path) -> dict:
    """Read the images and categories of a COCO file.

    Raises:
        InferenceError: If it is none.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        content = {
            'images': [
                dict(id=int(i['id']), file_name=str(i['file_name']))
                for i in content['images']
            ],
            'categories': [
                dict(c, id=int(c['id']), name=str(c['name']))
                for c in content.get('categories') or ()
            ],
        }
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InferenceError(
            f'{path} is no COCO file: it needs a list `images` whose entries '
            f'have id and file_name ({type(error).__name__}: {error})'
        ) from error
    return content


def _coco_sources(path: Path, image_dir: Optional[str]) -> Iterator[Source]:
    root = path.parent if image_dir is None else Path(image_dir)
    images = read_coco(path)['images']
    paths = [root / info['file_name'] for info in images]
    if paths and not any(map(Path.is_file, paths)):
        raise InferenceError(
            f'{path}: none of its {len(paths)} images is in {root} (first: '
            f'{paths[0]}); --image-dir names their folder'
        )
    for info, file in zip(images, paths):
        yield Source(file, 'image', info['id'])


def read_frames(
    sources: Sequence[Source],
    read: Callable[[Path], np.ndarray],
    max_frames: Optional[int] = None,
) -> Iterator[Frame]:
    """Read all frames, one after the other.

    Args:
        sources (Sequence[Source]): From :func:`find_sources`.
        read (Callable): Reads an image file, as ``Predictor.read``.
        max_frames (int, optional): Of each video and webcam.

    Yields:
        Frame: With an image, or with an error that says why there is none.
    """
    for source in sources:
        if source.kind == 'image':
            try:
                yield Frame(source, image=read(source.path))
            except InferenceError as error:
                yield Frame(source, error=str(error))
        else:
            yield from _read_video(source, max_frames)


def _read_video(source: Source, max_frames: Optional[int]) -> Iterator[Frame]:
    webcam = source.kind == 'webcam'
    name = str(source.path)
    opened = int(name.removeprefix('webcam')) if webcam else name
    capture = cv2.VideoCapture(opened)
    try:
        fps = capture.get(cv2.CAP_PROP_FPS) or None
        promised = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        index = 0
        while max_frames is None or index < max_frames:
            good, image = capture.read()
            if not good:
                break
            yield Frame(source, index, image, fps=fps)
            index += 1
    finally:
        capture.release()
    if not index:
        what = f'webcam {opened}' if webcam else f'the video {name}'
        yield Frame(source, error=f'{what} cannot be read')
    elif index != max_frames and index < ENOUGH_FRAMES * promised:
        yield Frame(
            source,
            index,
            error=f'the video {name} ends after {index} of '
            f'{promised:.0f} frames; it is damaged',
        )
