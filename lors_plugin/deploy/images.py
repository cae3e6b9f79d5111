"""Read and resize images as a test pipeline does, without MMCV.

Sizes and pixels are those of MMCV's and MMPretrain's transforms. OpenCV is
used where it is installed. Without it, Pillow decodes files and NumPy resizes
bilinearly, which differs from OpenCV by one grey level at most.
"""

import io
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

import numpy as np

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import PIL.Image
    import PIL.ImageOps
except ImportError:
    PIL = None

Image = Union[str, os.PathLike, bytes, np.ndarray]
IGNORED = ('LoadAnnotations', 'PackDetInputs', 'PackInputs')


class ImageError(ValueError):
    """An image that cannot be read or resized."""


def read_image(
    image: Image, gray: bool = False, backend: str = 'cv2'
) -> np.ndarray:
    """Read an image as MMCV does: turned by its EXIF tag, 8 bits, BGR.

    Args:
        image (str | Path | bytes | np.ndarray): A file, the content of one,
            or an array, which is only checked.
        gray (bool): Whether the model takes one channel.
        backend (str): 'cv2' or 'pillow', taken where it is installed.

    Returns:
        np.ndarray: Shape (H, W, 3), or (H, W) for ``gray``, uint8.

    Raises:
        ImageError: If it is no image, is empty, or has another shape or type.
    """
    if isinstance(image, np.ndarray):
        return _check_array(image, gray)
    if isinstance(image, (bytes, bytearray, memoryview)):
        name, content = f'{len(image)} bytes', bytes(image)
    else:
        name, content = str(image), Path(image).read_bytes()
    decoders = [cv2 and _decode_by_opencv, PIL and _decode_by_pillow]
    if backend == 'pillow':
        decoders.reverse()
    decoders = [decode for decode in decoders if decode]
    if not decoders:
        raise ImportError(
            'images need OpenCV or Pillow: pip install opencv-python-headless'
        )
    decoded = decoders[0](content, gray, name) if content else None
    if decoded is None or not decoded.size:
        raise ImageError(f'{name}: not an image, or a damaged one')
    return decoded


def image_size(content: bytes) -> tuple[int, int]:
    """Read width and height of an image file without decoding it.

    Args:
        content (bytes): Of the file.

    Raises:
        ImageError: If it is no image.
    """
    try:
        with warnings.catch_warnings():
            # The caller has a limit of its own.
            warnings.simplefilter('ignore')
            return PIL.Image.open(io.BytesIO(content)).size
    except PIL.UnidentifiedImageError:
        raise ImageError(f'{len(content)} bytes: not an image') from None
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise ImageError(f'{len(content)} bytes: {error}') from error


def _check_array(image: np.ndarray, gray: bool) -> np.ndarray:
    wanted = '(height, width)' if gray else '(height, width, 3)'
    if gray and image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    channels = () if gray else (3,)
    if image.ndim < 2 or image.shape[2:] != channels or not image.size:
        raise ImageError(
            f'an image of shape {image.shape}: the model takes {wanted}'
        )
    if image.dtype != np.uint8:
        raise ImageError(
            f'an image of {image.dtype}: pixels from 0 to 255 as uint8 are '
            'expected'
        )
    return image


def _decode_by_opencv(
    content: bytes, gray: bool, name: str
) -> Optional[np.ndarray]:
    flag = cv2.IMREAD_GRAYSCALE if gray else cv2.IMREAD_COLOR
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flag)
    except cv2.error as error:
        raise ImageError(f'{name}: {error.err or error}') from error


def _decode_by_pillow(
    content: bytes, gray: bool, name: str
) -> Optional[np.ndarray]:
    try:
        image = PIL.Image.open(io.BytesIO(content))
        image = PIL.ImageOps.exif_transpose(image)
        if image.mode[:1] in ('I', 'F'):
            raise ImageError(
                f'{name}: more than 8 bits per channel need OpenCV: pip '
                'install opencv-python-headless'
            )
        image = image.convert('RGB')
        if gray:
            return np.asarray(image.convert('L'))
        return np.asarray(image)[..., ::-1]
    except ImageError:
        raise
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise ImageError(f'{name}: {error}') from error


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: str = 'bilinear',
    backend: str = 'cv2',
) -> np.ndarray:
    """Resize as ``mmcv.imresize`` does.

    Args:
        image (np.ndarray): Shape (H, W) or (H, W, 3), uint8.
        size (tuple[int]): New width and height.
        interpolation (str): One of MMCV's names. Defaults to 'bilinear'.
        backend (str): 'cv2' or 'pillow', which computes something else: it
            averages over the pixels of a smaller image.

    Returns:
        np.ndarray: Of the new size, uint8.

    Raises:
        ImageError: If nothing would be left of an edge.
    """
    if image.shape[1::-1] == tuple(size):
        return image
    if min(size) < 1:
        height, width = image.shape[:2]
        raise ImageError(
            f'an image of {height} x {width} is too narrow: resized, it would '
            f'be {size[1]} x {size[0]}'
        )
    method = _METHODS[backend][interpolation]
    if backend == 'pillow':
        if PIL is None:
            raise ImportError('resizing by Pillow: pip install pillow')
        resized = PIL.Image.fromarray(np.ascontiguousarray(image))
        return np.asarray(resized.resize(size, method))
    if cv2 is not None:
        return cv2.resize(image, size, interpolation=method)
    if interpolation != 'bilinear':
        raise ImportError(
            f'{interpolation} resizing needs OpenCV: pip install '
            'opencv-python-headless'
        )
    return _resize_bilinearly(image, size)


# By MMCV's names: the numbers of OpenCV and Pillow.
_METHODS = dict(
    cv2=dict(nearest=0, bilinear=1, bicubic=2, area=3, lanczos=4),
    pillow=dict(nearest=0, lanczos=1, bilinear=2, bicubic=3, box=4, hamming=5),
)


def _resize_bilinearly(image: np.ndarray, size: tuple) -> np.ndarray:
    """Compute OpenCV's ``INTER_LINEAR``: two neighbours per axis."""
    out = image.astype(np.float32)
    for axis, new in ((0, size[1]), (1, size[0])):
        old = image.shape[axis]
        at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        first = at.astype(np.int64)
        second = np.minimum(first + 1, old - 1)
        shape = [-1 if i == axis else 1 for i in range(image.ndim)]
        share = (at - first).astype(np.float32).reshape(shape)
        out = out.take(first, axis) * (1 - share) + (
            out.take(second, axis) * share
        )
    return np.rint(out).astype(np.uint8)


class Pipeline:
    """The steps of a test pipeline between reading and normalising.

    Args:
        steps (Sequence[dict]): Transforms of MMCV, MMDetection and
            MMPretrain, from a config or the metadata of a file.

    Raises:
        ValueError: If a step, or an option of one, is not known here.
    """

    def __init__(self, steps: Sequence[Mapping]) -> None:
        self.color, self.decoder = 'color', 'cv2'
        self.steps: list[Callable] = []
        for step in steps:
            options = dict(step)
            kind = str(options.pop('type')).rpartition('.')[2]
            if kind in IGNORED:
                continue
            if kind == 'LoadImageFromFile':
                self.color = options.get('color_type', 'color')
                self.decoder = options.get('imdecode_backend') or 'cv2'
                if self.color not in ('color', 'grayscale') or (
                    options.get('to_float32')
                ):
                    raise ValueError(f'the step {step} is not known')
                continue
            try:
                self.steps.append(_STEPS[kind](**options))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f'the step {step} is not known') from error

    def __call__(
        self, image: np.ndarray, limits: Sequence[Optional[int]] = (None, None)
    ) -> tuple[np.ndarray, tuple[float, float]]:
        """Resize, crop and pad an image.

        Args:
            image (np.ndarray): Shape (H, W, 3) or (H, W), uint8.
            limits (Sequence[int | None]): The height and width that a model
                takes. A larger image is resized to fit instead, its ratio
                kept, where resizing is all that the pipeline does.

        Returns:
            tuple: The new image, and by how much its width and its height
            were scaled.
        """
        scale, new = np.ones(2), image
        for step in self.steps:
            before = new.shape[1::-1]
            new = step(new)
            if step.scales:
                scale *= np.divide(new.shape[1::-1], before)
        only_resized = [type(step) for step in self.steps] == [Resize]
        if only_resized and not fits(new, limits):
            sides = zip(limits, image.shape)
            factor = min(limit / side for limit, side in sides if limit)
            size = scaled(image, factor)
            new = resize(image, size, *self.steps[0].how)
            scale = np.divide(size, image.shape[1::-1])
        return new, tuple(scale.tolist())


class Resize:
    """Resize to ``scale``, or as far as it goes with the ratio kept."""

    scales = True

    def __init__(
        self,
        scale: Union[int, Sequence[int]],
        keep_ratio: bool = False,
        interpolation: str = 'bilinear',
        backend: str = 'cv2',
        clip_object_border: bool = True,
    ) -> None:
        del clip_object_border  # of annotations
        scale = (scale,) * 2 if isinstance(scale, int) else tuple(scale)
        self.scale, self.keep_ratio = scale, keep_ratio
        self.how = _how(interpolation, backend)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to the new size."""
        size = self.scale
        if self.keep_ratio:
            width, height = image.shape[1::-1]
            factor = min(
                max(size) / max(width, height), min(size) / min(width, height)
            )
            size = scaled(image, factor)
        return resize(image, size, *self.how)


class ResizeEdge:
    """Resize one edge to ``scale`` and keep the ratio."""

    scales = True

    def __init__(
        self,
        scale: int,
        edge: str = 'short',
        backend: str = 'cv2',
        interpolation: str = 'bilinear',
    ) -> None:
        if edge not in ('short', 'long', 'width', 'height'):
            raise ValueError(edge)
        self.scale, self.edge = scale, edge
        self.how = _how(interpolation, backend)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to the new size."""
        width, height = image.shape[1::-1]
        shorter = dict(
            short=width < height,
            long=width > height,
            width=True,
            height=False,
        )
        if shorter[self.edge]:
            size = (self.scale, int(self.scale * height / width))
        else:
            size = (int(self.scale * width / height), self.scale)
        return resize(image, size, *self.how)


class CenterCrop:
    """Cut the middle out of an image that is large enough."""

    scales = False

    def __init__(self, crop_size: Union[int, Sequence[int]]) -> None:
        if isinstance(crop_size, int):
            crop_size = (crop_size, crop_size)
        self.width, self.height = crop_size

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to (height, width, C) at most."""
        top = max(0, int(round((image.shape[0] - self.height) / 2.0)))
        left = max(0, int(round((image.shape[1] - self.width) / 2.0)))
        return image[top : top + self.height, left : left + self.width]


class EfficientNetCenterCrop:
    """Cut a square out of the middle by its share, then resize it."""

    scales = True

    def __init__(
        self,
        crop_size: int,
        crop_padding: int = 32,
        interpolation: str = 'bicubic',
        backend: str = 'cv2',
    ) -> None:
        self.size, self.padding = crop_size, crop_padding
        self.how = _how(interpolation, backend)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to (size, size, C)."""
        side = self.size / (self.size + self.padding) * min(image.shape[:2])
        for axis in (0, 1):
            first = max(0, int(round((image.shape[axis] - side) / 2.0)))
            index = np.arange(first, int(first + side - 1) + 1)
            image = image.take(index[index < image.shape[axis]], axis)
        return resize(image, (self.size, self.size), *self.how)


class Pad:
    """Pad at the right and the bottom."""

    scales = False

    def __init__(
        self,
        size: Optional[Sequence[int]] = None,
        size_divisor: Optional[int] = None,
        pad_to_square: bool = False,
        pad_val: Union[int, Mapping] = 0,
    ) -> None:
        value = pad_val if isinstance(pad_val, int) else pad_val.get('img', 0)
        self.size, self.divisor, self.value = size, size_divisor or 1, value
        self.square = pad_to_square

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, C) to the size that is asked for."""
        width, height = image.shape[1::-1]
        if self.square:
            width = height = max(width, height)
        if self.size is not None:
            width, height = self.size
        height, width = (
            -(-side // self.divisor) * self.divisor for side in (height, width)
        )
        return pad(image, (height, width), self.value)


_STEPS = {
    kind.__name__: kind
    for kind in (Resize, ResizeEdge, CenterCrop, EfficientNetCenterCrop, Pad)
}


def pad(
    image: np.ndarray, shape: tuple[int, int], value: Union[int, Sequence]
) -> np.ndarray:
    """Pad to (H, W) at the right and the bottom; larger ones are refused."""
    height, width = image.shape[:2]
    if (height, width) == tuple(shape):
        return image
    if not fits(image, shape):
        raise ValueError(
            f'an image that is {height} x {width} after resizing does not fit '
            f'in {shape[0]} x {shape[1]}'
        )
    padded = np.empty((*shape, *image.shape[2:]), image.dtype)
    padded[...] = value
    padded[:height, :width] = image
    return padded


def fits(image: np.ndarray, limits: Sequence[Optional[int]]) -> bool:
    """Return whether height and width are within limits."""
    return all(
        limit is None or side <= limit
        for side, limit in zip(image.shape, limits)
    )


def scaled(image: np.ndarray, factor: float) -> tuple[int, int]:
    """Return width and height times a factor, as MMCV rounds them."""
    return tuple(int(side * factor + 0.5) for side in image.shape[1::-1])


def _how(interpolation: str, backend: str) -> tuple[str, str]:
    if interpolation not in _METHODS.get(backend, ()):
        raise ValueError(f'{interpolation} by {backend}')
    return interpolation, backend
