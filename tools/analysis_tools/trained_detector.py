"""Configs, detectors and predictions for the drawing tools."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

# First: it makes mmcv.ops importable.
from lors_plugin.adapters import is_adapter_checkpoint
from lors_plugin.checkpoints import load_checkpoint_file, weights_of
from lors_plugin.compat import read_safely
from lors_plugin.engine.checkpoint_fit import check_weights
from lors_plugin.engine.hooks.finite_predictions_hook import not_finite
from lors_plugin.reparam.structure import adapt, build_base, has_adapters

# isort: split
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn

logger = logging.getLogger('draw')


class DrawError(RuntimeError):
    """A mistake in the input that the user can repair."""


def run_tool(work: Callable[..., None], *args: object) -> int:
    """Run a tool; its errors become a message and the exit code 1."""
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        work(*args)
    except (DrawError, ValueError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


def load_config(path: str, trust: bool = False) -> Config:
    """Read a config of MMDetection, and files afterwards as ``trust`` says."""
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    read_safely(trust)
    return cfg


def load_detector(
    cfg: Config, checkpoint: str, device: str, trust: bool = False
) -> nn.Module:
    """Build a detector and load its weights, all of them.

    MMDetection's ``init_detector`` leaves what does not fit as it was
    initialised, lets a file run code, and takes COCO's class names for a
    file without any.

    Args:
        cfg (Config): The config; hooks of this package that change a model
            are followed.
        checkpoint (str): The weights.
        device (str): Where to run.
        trust (bool): Allow the file to run code of its own while it is
            read. Defaults to False.

    Returns:
        nn.Module: The detector, ready for ``inference_detector``, with
        ``dataset_meta['classes']``.

    Raises:
        ValueError: If the file cannot be read, or not without ``trust``, or
            does not belong to the model.
    """
    for field in ('model', 'test_dataloader'):
        if cfg.get(field) is None:
            raise DrawError(f'{cfg.filename} has no {field}')
    content = load_checkpoint_file(checkpoint, trust)
    if is_adapter_checkpoint(content):
        raise DrawError(
            f'{checkpoint} holds adapters without their base; merge them '
            'first (tools/reparam.py)'
        )
    state = weights_of(content, path=checkpoint)
    model = build_base(cfg)
    if has_adapters(state):
        adapt(model, cfg, state)
    check_weights(model, state, checkpoint)
    model.load_state_dict(state, strict=False)
    names = _classes_in(content.get('meta') or {}, checkpoint)
    model.dataset_meta = dict(classes=names or config_classes(cfg))
    model.cfg = cfg
    return revert_sync_batchnorm(model).to(device).eval()


def config_classes(cfg: Config) -> Sequence[str]:
    """Return the class names of a config's test set; no file is read."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    dataset = DATASETS.build(dict(dataset, lazy_init=True))
    return dataset.metainfo.get('classes') or ()


def _classes_in(meta: dict, path: str) -> Sequence[str]:
    """Class names that a checkpoint holds, or none."""
    dataset_meta = meta.get('dataset_meta')
    names = meta.get('CLASSES')  # of MMDetection 2
    if isinstance(dataset_meta, dict):
        names = {k.lower(): v for k, v in dataset_meta.items()}.get('classes')
    if names is None:
        return ()
    if isinstance(names, str):
        names = (names,)
    if not isinstance(names, (list, tuple)) or not all(
        isinstance(name, str) for name in names
    ):
        raise DrawError(f'{path}: its class names are {names!r:.80}')
    return tuple(names)


def predict(model: nn.Module, path: str) -> DetDataSample:
    """Run a detector on an image; an error names the image."""
    if not Path(path).is_file():
        raise DrawError(f'the image {path} does not exist')
    try:
        sample = inference_detector(model, path)
    except Exception as error:  # of OpenCV, the pipeline or the model
        raise DrawError(
            f'the image {path} cannot be read, or the detector cannot take '
            f'it ({type(error).__name__}: {error})'
        ) from error
    names = not_finite(sample)
    if names:
        raise DrawError(
            f'the image {path}: {", ".join(names)} of its prediction hold NaN '
            'or inf; the weights are damaged, or the training diverged'
        )
    return sample
