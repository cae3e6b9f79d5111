"""Whole models as functions from images to results, ready for export."""

import abc
import copy
from functools import partial
from typing import Optional

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from lors_plugin.deploy.eager import OPTIMIZED
from lors_plugin.parameternet.cpu_inference import is_converted
from lors_plugin.reparam import reparameterize, unmerge

from .dynamic_layers import replace_dynamic
from .sampling import sample_by_gather

INPUTS = ('float', 'uint8', 'normalized')


def for_export(
    model: nn.Module,
    number: Optional[int] = None,
    sampling: str = 'gather',
) -> nn.Module:
    """Copy a model into a form that exporters can follow.

    Branches and adapters are merged, dynamic layers become batched products,
    operators of this package run by their reference implementation, and
    windows of Swin leave the number of images open.

    Args:
        model (nn.Module): Not changed.
        number (int, optional): Images per batch, written into the file, where
            dynamic convolutions are faster. Defaults to None for any.
        sampling (str): 'gather' or 'grid_sample', how AdaMixer reads
            features. Defaults to 'gather'.

    Returns:
        nn.Module: In evaluation mode, without gradients.
    """
    model = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    unmerge(model)
    if hasattr(model, OPTIMIZED) or any(map(is_converted, model.modules())):
        raise ValueError(
            'the model was made for inference in PyTorch (by optimize(), or '
            'deploy=True of ParameterNet); export the model that it was made '
            'from'
        )
    reparameterize(model, convert=False)
    replace_dynamic(model, number)
    if sampling == 'gather':
        sample_by_gather(model)
    for module in model.modules():
        if isinstance(getattr(module, 'backend', None), str):
            module.backend = 'reference'
        if _has_windows(module):
            module.window_reverse = partial(_join_windows, module.window_size)
    return model.requires_grad_(False)


def takes_one_size(model: nn.Module) -> bool:
    """Return whether the exported model takes images of one size only.

    Swin of MMPretrain and MMDetection computes padding, shifts and masks of
    its windows with Python numbers, which an exporter writes into the file.

    Args:
        model (nn.Module): A detector or a classifier.
    """
    return any(map(_has_windows, model.modules()))


def _has_windows(module: nn.Module) -> bool:
    return any(
        kind.__name__ == 'ShiftWindowMSA' for kind in type(module).__mro__
    )


def _join_windows(
    side: int, windows: Tensor, height: int, width: int, *_
) -> Tensor:
    """Join windows without counting the images, as the hosts do by ``int``.

    Args:
        side (int): Of a window.
        windows (Tensor): Shape (B windows, side, side, C).
        height (int): Of the map.
        width (int): Of the map.

    Returns:
        Tensor: Shape (B, height, width, C).
    """
    grid = (height // side, width // side, side, side, windows.shape[-1])
    x = windows.reshape(-1, *grid).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, height, width, windows.shape[-1])


class Normalize(nn.Module):
    """Normalise images as the model's data preprocessor does.

    Args:
        preprocessor (nn.Module): Of a detector or a classifier.
        kind (str): 'float' or 'uint8' for RGB from 0 to 255, 'normalized'
            for images that went through the preprocessor already.
    """

    def __init__(self, preprocessor: nn.Module, kind: str) -> None:
        super().__init__()
        if kind not in INPUTS:
            raise ValueError(f'input={kind!r} must be one of {INPUTS}')
        self.kind = kind
        self.order = order_of(preprocessor)
        for name in ('mean', 'std'):
            value = getattr(preprocessor, name, None)
            value = None if value is None else value.detach().clone().cpu()
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Shape (B, 3, H, W), in and out."""
        if self.kind == 'normalized':
            return images
        images = images.float()
        if self.order == 'BGR' and images.shape[1] == 3:
            images = torch.cat([images[:, i : i + 1] for i in (2, 1, 0)], 1)
        if self.mean is not None:
            images = (images - self.mean) / self.std
        return images


def order_of(preprocessor: nn.Module) -> str:
    """Return the order of channels that the model sees, 'RGB' or 'BGR'.

    Files are read as BGR.
    """
    flags = ('_channel_conversion', 'to_rgb')
    converts = any(getattr(preprocessor, flag, False) for flag in flags)
    return 'RGB' if converts else 'BGR'


class ClassifierForExport(nn.Module):
    """Images to logits and scores.

    Args:
        model (nn.Module): A classifier of MMPretrain, from
            :func:`for_export`.
        kind (str): See :class:`Normalize`. Defaults to 'float'.
    """

    inputs = ('images',)
    outputs = ('logits', 'scores')

    def __init__(self, model: nn.Module, kind: str = 'float') -> None:
        super().__init__()
        from mmpretrain.models.heads import MultiLabelClsHead

        self.normalize = Normalize(model.data_preprocessor, kind)
        self.model = model
        # Wrappers of TIMM and Hugging Face models have no head.
        head = getattr(model, 'head', None)
        self.several = isinstance(head, MultiLabelClsHead)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Args:
            images (Tensor): Shape (B, 3, H, W).

        Returns:
            tuple[Tensor]: Logits and, by softmax or, for several labels an
            image, by sigmoid, scores, both of shape (B, classes).
        """
        logits = self.model(self.normalize(images))
        if isinstance(logits, (list, tuple)):
            logits = logits[-1]
        if self.several:
            return logits, logits.sigmoid()
        return logits, logits.softmax(-1)


class DetectorBase(nn.Module, abc.ABC):
    """Images to detections: what all detectors have in common.

    Args:
        model (nn.Module): A detector, from :func:`for_export`.
        kind (str): See :class:`Normalize`. Defaults to 'float'.
    """

    inputs = ('images', 'sizes')
    outputs = ('boxes', 'scores', 'labels')
    # Axes whose sizes are known or open, by output, beside the first.
    known_sizes: dict = {}
    open_sizes: dict = {}

    def __init__(self, model: nn.Module, kind: str = 'float') -> None:
        super().__init__()
        self.normalize = Normalize(model.data_preprocessor, kind)
        self.model = model
        value = getattr(model.data_preprocessor, 'pad_value', 0)
        self.pad_value = float(value or 0)

    def forward(
        self, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images (Tensor): Shape (B, 3, H, W), padded at the right and the
                bottom.
            sizes (Tensor): Width and height of each image without padding,
                shape (B, 2).

        Returns:
            tuple[Tensor]: Of the K best detections, best first, the corners
            of the boxes in pixels of the images given, shape (B, K, 4), the
            scores (B, K) and the labels (B, K).
        """
        images = self._cover_padding(self.normalize(images), sizes)
        return self.detect(images, sizes)

    @abc.abstractmethod
    def detect(
        self, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect in normalized images, as :meth:`forward` does."""

    def _cover_padding(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Set padding to its value in training and testing.

        The preprocessor pads behind normalising; raw pixels are padded
        before, with anything.
        """
        if self.normalize.kind == 'normalized':
            return images
        width, height = sizes[:, 0], sizes[:, 1]
        x = torch.arange(images.shape[3], device=images.device)
        y = torch.arange(images.shape[2], device=images.device)
        inside = (x < width.view(-1, 1, 1, 1)) & (
            y.unsqueeze(-1) < height.view(-1, 1, 1, 1)
        )
        return torch.where(inside, images, images.new_full((), self.pad_value))


class DetectorForExport(DetectorBase):
    """Images to the best detections, as ``AdaMixer.predict`` gives them.

    Args:
        model (nn.Module): An AdaMixer or LORS-AdaMixer, from
            :func:`for_export`.
        kind (str): See :class:`Normalize`. Defaults to 'float'.
    """

    @property
    def known_sizes(self) -> dict:
        """dict: Sizes that exporters do not infer, by output and axis."""
        number = {1: self.number}
        return dict(boxes={**number, 2: 4}, scores=number, labels=number)

    def __init__(self, model: nn.Module, kind: str = 'float') -> None:
        super().__init__(model, kind)
        decoder, queries = model.decoder, model.query_generator.num_queries
        self.num_classes = decoder.num_classes
        self.number = min(
            decoder.max_per_img or queries, queries * self.num_classes
        )

    def detect(
        self, images: Tensor, sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`DetectorBase.forward`."""
        feats = self.model.extract_feat(images)
        queries = self.model.query_generator(sizes)
        logits, boxes, _ = self.model.decoder(feats, *queries)
        return best_of(logits[-1].sigmoid(), boxes[-1], self.number)


def best_of(
    scores: Tensor, boxes: Tensor, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best pairs of a query and a class.

    Args:
        scores (Tensor): Shape (B, N, classes).
        boxes (Tensor): Corners, shape (B, N, 4).
        number (int): K of them.

    Returns:
        tuple[Tensor]: Boxes (B, K, 4), scores and labels (B, K).
    """
    classes = int(scores.shape[-1])
    scores, index = scores.flatten(1).topk(number)
    query = torch.div(index, classes, rounding_mode='floor')
    boxes = boxes.gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    return boxes, scores, index % classes
