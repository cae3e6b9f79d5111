"""Errors of a data pipeline that name the image.

An empty file or a picture that is one pixel high ends a training with an
assertion of OpenCV, out of a worker process at that. The name of the file is
what the user needs.
"""

from collections.abc import Callable
from typing import Any, Optional

from mmengine.dataset import Compose
from mmengine.runner import Runner


class ImageError(RuntimeError):
    """A data pipeline cannot prepare an image.

    PyTorch raises an error of a worker process again in the main process,
    with the worker's traceback as its message: the message is what follows
    the last mention of this class.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition('ImageError: ')[2].rstrip())


class NamingPipeline(Compose):
    """A pipeline whose errors are :class:`ImageError`."""

    def __call__(self, data: dict) -> Optional[dict]:
        """Apply the transforms to the data of an image."""
        path = data.get('img_path') if isinstance(data, dict) else None
        try:
            return super().__call__(data)
        except Exception as error:
            if path is None or isinstance(error, ImageError):
                raise
            what = f'{type(error).__name__}: {error}'.strip()
            raise ImageError(
                f'the image {path} cannot be read or prepared ({what})'
            ) from error


def name_images(dataset: Any) -> None:
    """Let errors in the pipelines of a data set and those inside name images.

    Args:
        dataset (Any): A data set or a wrapper of data sets.
    """
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        dataset.pipeline = NamingPipeline(dataset.pipeline.transforms)
    inner = getattr(dataset, 'datasets', None) or ()
    for child in (getattr(dataset, 'dataset', None), *inner):
        if child is not None:
            name_images(child)


def name_images_of(runner: Runner) -> None:
    """Let errors in the pipelines of a runner's data loaders name images.

    It is done when a loader is built, before its workers start.
    """
    build: Callable = runner.build_dataloader

    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        loader = build(*args, **kwargs)
        name_images(loader.dataset)
        return loader

    runner.build_dataloader = build_dataloader
