"""Detectors and classifiers from exported files.

    from lors_plugin.deploy.runtime import Detector

    detector = Detector('detector.onnx', threads=2)
    (found,) = detector(['photo.jpg'])
    names = [detector.classes[label] for label in found['labels']]
    boxes, scores = found['boxes'], found['scores']

A file of ``tools/export.py`` says how images are resized, normalised and
padded, so that results are those of the host's inferencers.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from .engines import CHECKSUM, open_engine, read_metadata, verify
from .images import Image, ImageError, Pipeline, pad, read_image

__all__ = ['Classifier', 'Detector', 'ImageError', 'load']


class _Model:
    """Base of detectors and classifiers from files.

    Args:
        path (str | Path): A file of ``tools/export.py``.
        engine (str, optional): 'onnxruntime' or 'openvino'; by default what
            the ending of the file says. Or an object with the attributes of
            :class:`~lors_plugin.deploy.engines.OnnxRuntimeEngine`.
        threads (int, optional): Of the engine; by default one per core.
        batch_size (int): Images that run at once. Defaults to 1.
        channel_order (str): Of arrays: 'BGR', as OpenCV and MMCV read
            images, or 'RGB'. Defaults to 'BGR'.
        verify (bool): Whether to compare the checksum. Defaults to True.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the engine is not installed.
        ValueError: If the file is damaged, or not one of this package.
    """

    outputs: tuple = ()

    def __init__(
        self,
        path: Union[str, os.PathLike],
        engine: Optional[Any] = None,
        threads: Optional[int] = None,
        batch_size: int = 1,
        channel_order: str = 'BGR',
        verify: bool = True,
    ) -> None:
        if channel_order not in ('BGR', 'RGB'):
            raise ValueError(f'channel_order={channel_order!r}: BGR or RGB')
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} must be at least 1')
        if engine is None or isinstance(engine, str):
            engine = open_engine(path, engine, threads)
        self.engine = engine
        self.path, self.channel_order = path, channel_order
        self.metadata = self._check(verify)
        self.classes = tuple(self.metadata['classes'])
        self.batch_size = self.engine.shapes['images'][0] or batch_size
        self.channels, *self.fixed = self.engine.shapes['images'][1:]
        self.pipeline = Pipeline(self.metadata['pipeline'])

    def _check(self, verified: bool) -> dict[str, Any]:
        """Return the metadata of a file that fits."""
        metadata = read_metadata(self.engine.metadata)
        if 'pipeline' not in metadata or CHECKSUM not in metadata:
            raise ValueError(
                f'{self.path} does not say how images are resized: it was '
                'written by another program, or by an earlier lors_plugin; '
                'export it anew by tools/export.py'
            )
        if verified:
            verify(self.path, metadata)
        if not set(self.outputs) <= set(self.engine.outputs):
            raise ValueError(
                f'{self.path} is no {type(self).__name__.lower()}: its '
                f'outputs are {", ".join(self.engine.outputs)}'
            )
        if isinstance(metadata['pipeline'], str):
            raise ValueError(f'{self.path}: {metadata["pipeline"]}')
        return metadata

    def inputs(
        self, images: Iterable[Image]
    ) -> Iterator[tuple[dict[str, np.ndarray], list[tuple[float, float]]]]:
        """Yield inputs of the engine, batch by batch.

        Args:
            images (Iterable): See :meth:`Detector.__call__`.

        Yields:
            tuple: ``images`` (B, C, H, W) and, for detectors, ``sizes``
            (B, 2), by name; and per image by how much its width and its
            height were scaled.
        """
        if isinstance(images, (str, bytes, os.PathLike, np.ndarray)):
            raise TypeError('a list of images is expected, not one image')
        ready, scales = [], []
        for image in images:
            image, scale = self.pipeline(self._read(image), self.fixed)
            ready.append(image)
            scales.append(scale)
            if len(ready) == self.batch_size:
                yield stack(ready, self.engine, self.metadata), scales
                ready, scales = [], []
        if ready:
            yield stack(ready, self.engine, self.metadata), scales

    def _read(self, image: Image) -> np.ndarray:
        gray = self.channels == 1
        found = read_image(image, gray, self.pipeline.decoder)
        is_rgb = isinstance(image, np.ndarray) and self.channel_order == 'RGB'
        if is_rgb and not gray:
            found = found[..., ::-1]
        return np.ascontiguousarray(found)


class Detector(_Model):
    """Detect objects, as ``mmdet.apis.DetInferencer`` does.

    Args:
        path (str | Path): A file of ``tools/export.py``.
        score_threshold (float): Detections of a lower score are left out.
            Defaults to 0.
        **options: Of all models: ``engine`` ('onnxruntime' or 'openvino'),
            ``threads``, ``batch_size`` (1), ``channel_order`` of arrays
            ('BGR'), ``verify`` (True).
    """

    outputs = ('boxes', 'scores', 'labels')

    def __init__(
        self,
        path: Union[str, os.PathLike],
        score_threshold: float = 0.0,
        **options,
    ) -> None:
        super().__init__(path, **options)
        self.score_threshold = score_threshold

    def __call__(self, images: Iterable[Image]) -> list[dict]:
        """Detect objects.

        Args:
            images (Iterable[str | Path | bytes | np.ndarray]): Files, what
                is in them, or arrays (H, W, 3) of uint8.

        Returns:
            list[dict]: Per image ``boxes`` (K, 4), x1, y1, x2, y2 in pixels
            of that image, ``labels`` (K, ) and ``scores`` (K, ), best first.

        Raises:
            ImageError: If one cannot be read.
        """
        return list(self.stream(images))

    def stream(self, images: Iterable[Image]) -> Iterator[dict]:
        """Yield what ``__call__`` returns, batch by batch."""
        for inputs, scales in self.inputs(images):
            outputs = self.engine.run(inputs)
            for index, scale in enumerate(scales):
                found = {name: outputs[name][index] for name in self.outputs}
                found['boxes'] = found['boxes'] / np.float32(scale * 2)
                keep = found['scores'] >= self.score_threshold
                yield {name: value[keep] for name, value in found.items()}


class Classifier(_Model):
    """Classify images, as ``mmpretrain.ImageClassificationInferencer`` does.

    Args:
        path (str | Path): A file of ``tools/export.py``.
        top (int, optional): How many classes to return; None for all.
            Defaults to 5.
        **options: See :class:`Detector`.
    """

    outputs = ('logits', 'scores')

    def __init__(
        self,
        path: Union[str, os.PathLike],
        top: Optional[int] = 5,
        **options,
    ) -> None:
        super().__init__(path, **options)
        self.top = top

    def __call__(self, images: Iterable[Image]) -> list[dict]:
        """Classify.

        Args:
            images (Iterable[str | Path | bytes | np.ndarray]): As for
                :meth:`Detector.__call__`.

        Returns:
            list[dict]: Per image ``labels`` (K, ) and their ``scores``
            (K, ), best first.
        """
        return list(self.stream(images))

    def stream(self, images: Iterable[Image]) -> Iterator[dict]:
        """Yield what ``__call__`` returns, batch by batch."""
        for inputs, scales in self.inputs(images):
            scores = self.engine.run(inputs)['scores']
            for values in scores[: len(scales)]:
                labels = np.argsort(-values, kind='stable')[: self.top]
                yield dict(labels=labels, scores=values[labels])


def stack(
    images: Sequence[np.ndarray], engine: Any, metadata: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Normalise images as a file wants them, pad them to one size, stack them.

    Args:
        images (Sequence[np.ndarray]): Shapes (H, W, 3) in BGR, or (H, W) or
            (H, W, 1) in gray; resized, pixels from 0 to 255. As many as the
            file takes at the most.
        engine (Any): Of the file.
        metadata (Mapping): What :func:`~.engines.read_metadata` returned.

    Returns:
        dict[str, np.ndarray]: ``images`` (B, C, H, W) and, for detectors,
        ``sizes`` (B, 2).

    Raises:
        ValueError: If one is larger than the file takes.
    """
    count, channels, *fixed = engine.shapes['images']
    divisor = int(metadata['size_divisor'] or 1)
    largest = [max(sides) for sides in zip(*(i.shape[:2] for i in images))]
    target = [
        side or -(-most // divisor) * divisor
        for side, most in zip(fixed, largest)
    ]
    kind = np.uint8 if metadata['input'] == 'uint8' else np.float32
    # The number of images of a file may be fixed.
    number = count or len(images)
    batch = np.zeros((number, channels, *target), kind)
    for place, image in zip(batch, images):
        if image.ndim == 2:
            image = image[..., None]
        elif metadata['channel_order'] == 'RGB':
            image = image[..., ::-1]
        value = 0
        if metadata['input'] == 'normalized':
            value = metadata.get('pad_value', 0)
            image = image.astype(np.float32)
            if metadata['mean'] is not None:
                image -= np.float32(metadata['mean'])
                image /= np.float32(metadata['std'])
        place[...] = pad(image, target, value).transpose(2, 0, 1)
    if 'sizes' not in engine.shapes:
        return dict(images=batch)
    sizes = [image.shape[1::-1] for image in images]
    sizes += sizes[-1:] * (number - len(sizes))
    return dict(images=batch, sizes=np.float32(sizes))


def load(
    path: Union[str, os.PathLike], **options
) -> Union[Detector, Classifier]:
    """Open a file as what it is.

    Args:
        path (str | Path): A file of ``tools/export.py``.
        **options: See :class:`Detector`.
    """
    engine = options.pop('engine', None)
    if engine is None or isinstance(engine, str):
        engine = open_engine(path, engine, options.get('threads'))
    kind = Detector if 'boxes' in engine.outputs else Classifier
    return kind(path, engine=engine, **options)
