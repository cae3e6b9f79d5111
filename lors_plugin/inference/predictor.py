"""Trained models as functions from images to predictions.

A checkpoint runs in PyTorch, a file of ``tools/export.py`` in ONNX
Runtime or OpenVINO. All read and resize images by the test pipeline of the
config, so that they see the same pixels as in ``tools/test.py``.
"""

import abc
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from torch import nn

from lors_plugin.adapters import (
    AdapterFileError,
    adapters_of,
    is_adapter_checkpoint,
    load_adapter_checkpoint,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.adapters.hook import RepAdapterHook
from lors_plugin.build import is_detector, test_pipeline
from lors_plugin.checkpoints import (
    load_checkpoint_file,
    read_weights,
    weights_of,
)
from lors_plugin.deploy.engines import open_engine, read_metadata
from lors_plugin.deploy.runtime import stack
from lors_plugin.engine.checkpoint_fit import check_weights
from lors_plugin.engine.hooks.finite_predictions_hook import not_finite
from lors_plugin.reparam.structure import (
    adapt,
    build_base,
    has_adapters,
    load_base,
)
from lors_plugin.utils import type_name

from .errors import InferenceError
from .prediction import Prediction, name_of

# Files of tools/export.py.
EXPORTED = ('.onnx', '.xml')


def load_predictor(
    cfg: Config,
    checkpoint: Union[str, Path],
    device: str = 'cpu',
    trust: bool = False,
    amp: bool = False,
    base: Optional[Union[str, Path]] = None,
) -> 'Predictor':
    """Load a trained detector or classifier.

    Args:
        cfg (Config): The config of the training, or of the merged model.
        checkpoint (str | Path): Weights of the whole model, an adapter file
            (``adapter_only``), or an ONNX or OpenVINO file of
            ``tools/export.py``, for which no model is built.
        device (str): Where PyTorch runs. Defaults to 'cpu'.
        trust (bool): Allow the file to run code of its own while it is
            read. Defaults to False.
        amp (bool): Whether PyTorch computes in mixed precision. Defaults to
            False.
        base (str | Path, optional): Weights that the adapters of an adapter
            file were trained on, of the whole model or its backbone. Defaults
            to what the config or the file names, as in ``tools/test.py``.

    Returns:
        Predictor: Call it with a list of images.

    Raises:
        ValueError: If the file cannot be read, or not without ``trust``, or
            does not belong to the model.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InferenceError(
            f'device {device!r} is none that PyTorch knows: cpu, cuda, cuda:1'
        ) from None
    if kind == 'cuda' and not torch.cuda.is_available():
        raise InferenceError(f'device {device}: PyTorch finds no CUDA GPU')
    if Path(checkpoint).suffix.lower() not in EXPORTED:
        return TorchPredictor(cfg, checkpoint, device, trust, amp, base)
    if amp or base or kind != 'cpu':
        raise InferenceError(
            f'{checkpoint} is an exported file and runs on the CPU: leave '
            'out device, mixed precision and base'
        )
    return ExportedPredictor(cfg, checkpoint)


class Predictor(abc.ABC):
    """Predict for images.

    Args:
        cfg (Config): With the test pipeline.

    Attributes:
        classes (tuple[str]): Class names; empty where none are known.
        detects (bool): Whether predictions have boxes.
    """

    classes: tuple[str, ...] = ()
    detects: bool

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        if cfg.get('default_scope') == 'mmseg':
            raise InferenceError(
                f'{cfg.filename} is of MMSegmentation; detectors and '
                'classifiers predict here. Merge the model by '
                'tools/reparam.py and use mmseg.apis.MMSegInferencer'
            )
        steps = [
            step
            for step in test_pipeline(cfg)
            if 'Annotations' not in type_name(step['type'])
        ]
        if not steps or not type_name(steps[0]['type']).startswith('Load'):
            raise InferenceError(
                f'{cfg.filename} has no test pipeline (test_dataloader) that '
                'begins with reading an image'
            )
        with self._scope():
            self._load = TRANSFORMS.build(steps[0])
            self._prepare = Compose(
                [TRANSFORMS.build(step) for step in steps[1:]]
            )

    def _scope(self) -> contextlib.AbstractContextManager:
        scope = self.cfg.get('default_scope') or 'mmdet'
        return DefaultScope.overwrite_default_scope(scope)

    def read(self, path: Union[str, Path]) -> np.ndarray:
        """Read an image as the test pipeline does.

        Returns:
            np.ndarray: BGR (or gray) as the pipeline's first step makes it,
            uint8, shape (H, W, 3).

        Raises:
            InferenceError: If there is no such image.
        """
        if not Path(path).is_file():
            raise InferenceError(f'the image {path} does not exist')
        try:
            found = self._load(dict(img_path=str(path)))
        except Exception as error:  # whatever decoders make of no image
            raise InferenceError(
                f'the image {path} cannot be read: it is damaged, or no '
                'image of a known format'
            ) from error
        image = None if found is None else found.get('img')
        if image is None or not image.size:
            raise InferenceError(f'the image {path} cannot be read')
        return image

    def name(self, label: int) -> str:
        """Return the name of a class, its number where there is none."""
        return name_of(self.classes, label)

    def labels_of(self, names: Sequence[str]) -> list[int]:
        """Find classes by names or numbers.

        Raises:
            InferenceError: If there is no such class.
        """
        found = []
        for name in names:
            if name in self.classes:
                found.append(self.classes.index(name))
            elif name.isdigit() and (
                not self.classes or int(name) < len(self.classes)
            ):
                found.append(int(name))
            else:
                raise InferenceError(
                    f'there is no class {name!r}; the model knows '
                    f'{", ".join(self.classes) or "no names"}'
                )
        return found

    def prepare(self, image: np.ndarray) -> dict:
        """Apply the test pipeline to an image that was read.

        Returns:
            dict: ``inputs``, a tensor of shape (C, H, W), and
            ``data_samples``.
        """
        if image.ndim == 3 and image.shape[2] == 4:
            image = image[..., :3]
        shape = image.shape[:2]
        data = dict(
            img=np.ascontiguousarray(image),
            img_id=0,
            img_path='',
            img_shape=shape,
            ori_shape=shape,
            height=shape[0],
            width=shape[1],
        )
        try:
            with self._scope():
                packed = self._prepare(data)
        except Exception as error:  # of OpenCV: too thin, for example
            raise InferenceError(
                f'the test pipeline cannot prepare an image of {shape[1]} x '
                f'{shape[0]} pixels ({type(error).__name__}: '
                f'{str(error).strip()})'
            ) from error
        if packed['data_samples'].get('flip'):
            raise InferenceError(
                'the test pipeline mirrors images; take that out'
            )
        return packed

    @abc.abstractmethod
    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict for a batch.

        Args:
            images (Sequence[np.ndarray]): As :meth:`read` returns them.

        Returns:
            list[Prediction]: One per image, boxes clipped to it.

        Raises:
            InferenceError: If an image cannot be prepared, or a prediction
                holds NaN or inf.
        """


class TorchPredictor(Predictor):
    """Predict in PyTorch; see :func:`load_predictor`.

    MMDetection's ``init_detector`` leaves what does not fit as it was
    initialised, lets a file run code, and takes COCO's class names for a
    file without any.

    Attributes:
        model (nn.Module): In evaluation mode.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: Union[str, Path],
        device: str = 'cpu',
        trust: bool = False,
        amp: bool = False,
        base: Optional[Union[str, Path]] = None,
    ) -> None:
        content = load_checkpoint_file(checkpoint, trust)
        super().__init__(cfg)
        with self._scope():
            model = load_model(cfg, content, checkpoint, base, trust)
            self.model = model.to(device)
            names = _classes_in(content.get('meta') or {}, checkpoint)
            self.classes = names or config_classes(cfg)
        self.detects = is_detector(self.model)
        self.device, self.amp = torch.device(device), amp

    def run(self, images: Sequence[np.ndarray]) -> list:
        """Run the model on a batch.

        Returns:
            list: Data samples of the host, boxes in pixels of the images.
        """
        packed = [self.prepare(image) for image in images]
        batch = {key: [item[key] for item in packed] for key in packed[0]}
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=self.amp),
            self._scope(),
        ):
            samples = self.model.test_step(batch)
        for sample in samples:
            names = not_finite(sample)
            if names:
                raise InferenceError(
                    f'{", ".join(names)} of the prediction hold NaN or inf; '
                    'the weights are damaged, the training diverged, or '
                    'values overflow in mixed precision'
                )
        return samples

    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict for a batch, see :class:`Predictor`."""
        return [self.prediction(sample) for sample in self.run(images)]

    def prediction(self, sample: Any) -> Prediction:
        """Take the prediction out of a data sample."""
        if self.detects:
            found = sample.pred_instances
            parts = (found.labels, found.scores, found.bboxes)
        else:
            scores = sample.pred_score.flatten()
            parts = (torch.arange(len(scores)), scores)
        found = Prediction.sorted(*(part.float().cpu() for part in parts))
        return found.inside(*sample.ori_shape[:2])


def load_model(
    cfg: Config,
    content: dict,
    path: Any,
    base: Optional[Union[str, Path]] = None,
    trust: bool = False,
) -> nn.Module:
    """Build a model with its adapters and load its weights, all of them.

    Args:
        cfg (Config): The config; hooks of this package that change a model
            are followed.
        content (dict): The checkpoint.
        path (Any): Its file, for messages.
        base (str | Path, optional): See :func:`load_predictor`.
        trust (bool): Whether the base may run code while it is read. Defaults
            to False.

    Returns:
        nn.Module: In evaluation mode, on the CPU.
    """
    if cfg.get('model') is None:
        raise InferenceError(f'{cfg.filename} has no model')
    state = weights_of(content, path=path)
    model = build_base(cfg)
    if is_adapter_checkpoint(content):
        content = dict(content, state_dict=state)
        _load_adapters(model, cfg, content, path, base, trust)
    elif base is not None:
        raise InferenceError(
            f'{path} holds more than adapters: leave out the base {base}'
        )
    else:
        if has_adapters(state):
            adapt(model, cfg, state)
        check_weights(model, state, str(path))
        model.load_state_dict(state, strict=False)
    return revert_sync_batchnorm(model).eval()


def _load_adapters(
    model: nn.Module,
    cfg: Config,
    content: dict,
    path: Any,
    base: Optional[Union[str, Path]],
    trust: bool,
) -> None:
    """Load an adapter file and the base that it was trained on.

    Without ``base``, the pretrained files of the config, the base of its
    ``RepAdapterHook`` and the one that the adapter file names are tried in
    turn, as in a test by a runner.
    """
    named = [
        hook.get('base')
        for hook in cfg.get('custom_hooks') or ()
        if type_name(hook['type']) == RepAdapterHook.__name__
    ]
    named.append(content['meta'][META].get('source'))
    bases = [base] if base else [None, *filter(None, named)]
    trained = list(content['state_dict'])
    for file in bases:
        if file is None:
            with _without_init_report():
                model.init_weights()
        elif '://' in str(file) or not Path(file).is_file():
            error = f'its base {file} is not there'
            continue
        else:
            load_base(model, read_weights(file, trust), trained, file)
        try:
            load_adapter_checkpoint(model, content)
        except AdapterFileError as problem:
            error = str(problem)
        else:
            return
    raise InferenceError(
        f'{path}: {error}. --base names the weights that the adapters were '
        'trained on'
    )


@contextlib.contextmanager
def _without_init_report() -> Iterator[None]:
    """Keep MMEngine from telling how each parameter was initialised."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def config_classes(cfg: Config) -> tuple[str, ...]:
    """Return the class names of a config's test set; no file is read."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while inner := dataset.get('dataset') or dataset.get('datasets'):
        dataset = inner[0] if isinstance(inner, (list, tuple)) else inner
    if not dataset:
        return ()
    named = (dataset.get('metainfo') or {}).get('classes')
    if not named or isinstance(named, str):
        # The class of the data set has names, or a file of names is read.
        built = DATASETS.build(dict(dataset, lazy_init=True))
        named = built.metainfo.get('classes')
    return tuple(named or ())


def _classes_in(meta: dict, path: Any) -> tuple[str, ...]:
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
        raise InferenceError(f'{path}: its class names are {names!r:.80}')
    return tuple(names)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[int]:
    """Let the adapters of a model do nothing within a block.

    An adapter adds ``scale`` times its output, so with a scale of 0 it is
    the identity. What was trained beside adapters, such as the head, stays.

    Args:
        model (nn.Module): Any model.

    Yields:
        int: The number of adapters.
    """
    scales = [adapter.scale for adapter in adapters_of(model).values()]
    before = [scale.clone() for scale in scales]
    try:
        for scale in scales:
            scale.zero_()
        yield len(scales)
    finally:
        for scale, value in zip(scales, before):
            scale.copy_(value)


class ExportedPredictor(Predictor):
    """Predict by an exported file; see :func:`load_predictor`."""

    def __init__(self, cfg: Config, path: Union[str, Path]) -> None:
        super().__init__(cfg)
        try:
            self.engine = open_engine(path)
        except (ImportError, OSError, ValueError) as error:
            raise InferenceError(str(error)) from error
        self.said = read_metadata(self.engine.metadata)
        if 'input' not in self.said or 'size_divisor' not in self.said:
            raise InferenceError(
                f'{path} was not written by tools/export.py: its '
                'metadata do not say what images it takes'
            )
        with self._scope():
            self.classes = tuple(self.said['classes']) or config_classes(cfg)
        self.detects = 'boxes' in self.engine.outputs

    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict for a batch, see :class:`Predictor`."""
        step = self.engine.shapes['images'][0] or len(images)
        if len(images) > step:
            starts = range(0, len(images), step)
            return [p for i in starts for p in self(images[i : i + step])]
        packed = [self.prepare(image) for image in images]
        arrays = [item['inputs'].numpy().transpose(1, 2, 0) for item in packed]
        self._check_sizes(arrays)
        try:
            found = self.engine.run(stack(arrays, self.engine, self.said))
        except Exception as error:
            # Errors of engines have no common base below Exception.
            text = str(error).strip().split('\n')[0]
            raise InferenceError(f'{self.engine.name}: {text}') from error
        # Of a fixed number of images, the last ones may be empty.
        found = {name: value[: len(images)] for name, value in found.items()}
        if not all(np.isfinite(value).all() for value in found.values()):
            raise InferenceError('the prediction holds NaN or inf')
        return [
            self._prediction(
                {name: value[index] for name, value in found.items()},
                item['data_samples'].metainfo,
            )
            for index, item in enumerate(packed)
        ]

    def _check_sizes(self, images: Sequence[np.ndarray]) -> None:
        """Refuse images of other sizes than a file of one size takes."""
        fixed = self.engine.shapes['images'][2:]
        if None in fixed:
            return
        height, width = np.max([image.shape[:2] for image in images], 0)
        if (
            height > fixed[0]
            or width > fixed[1]
            or (not self.detects and (height, width) != fixed)
        ):
            raise InferenceError(
                f'the file takes images of {fixed[1]} x {fixed[0]} alone, and '
                f'the test pipeline makes {width} x {height}; export it '
                'without --fixed-size and --static, or with --shape of that '
                'size'
            )

    def _prediction(self, found: Mapping, meta: Mapping) -> Prediction:
        scores = found['scores']
        if not self.detects:
            return Prediction.sorted(np.arange(len(scores)), scores)
        factors = np.tile(meta.get('scale_factor', (1.0, 1.0)), 2)
        boxes = found['boxes'] / factors
        found = Prediction.sorted(found['labels'], scores, boxes)
        return found.inside(*meta['ori_shape'])
