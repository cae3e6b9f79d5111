"""Whole models as functions from images to results, ready for export."""

import copy

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.mixing import AdaptiveMixing
from lors_plugin.adamixer.sampling import AdaptiveSampling3D
from lors_plugin.reparam import reparameterize

from .dynamic_layers import replace_dynamic
from .mixing import ExportMixing
from .sampling import ExportSampling
from .windows import replace_windows

INPUTS = ('float', 'uint8', 'normalized')


def for_export(model: nn.Module, sampling: str = 'gather') -> nn.Module:
    """A copy of a model that exporters can follow.

    Branches and adapters are merged, dynamic layers become batched products,
    windows of any map are laid out in tensors, and operators of this package
    give way to plain ones.

    Args:
        model (nn.Module): Left as it is.
        sampling (str): How AdaMixer reads features: 'gather' or
            'grid_sample'. Defaults to 'gather'.

    Returns:
        nn.Module: In evaluation mode.
    """
    model = revert_sync_batchnorm(copy.deepcopy(model)).eval()
    reparameterize(model)
    replace_dynamic(model)
    replace_windows(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptiveSampling3D):
                setattr(parent, name, ExportSampling(child, sampling))
            elif isinstance(child, (AdaptiveMixing, LORSAdaptiveMixing)):
                setattr(parent, name, ExportMixing(child))
        if isinstance(getattr(parent, 'backend', None), str):
            parent.backend = 'reference'
    return model.requires_grad_(False)


class Normalize(nn.Module):
    """From pixels to what the model's data preprocessor would give.

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
    """'RGB' or 'BGR': what the model sees; files are read as BGR."""
    converts = getattr(preprocessor, '_channel_conversion', False)
    return (
        'RGB'
        if converts or getattr(preprocessor, 'to_rgb', False)
        else ('BGR')
    )


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
        self.several = isinstance(model.head, MultiLabelClsHead)

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


class DetectorForExport(nn.Module):
    """Images to the best detections, as ``AdaMixer.predict`` gives them.

    Args:
        model (nn.Module): An AdaMixer or LORS-AdaMixer, from
            :func:`for_export`.
        kind (str): See :class:`Normalize`. Defaults to 'float'.
    """

    inputs = ('images', 'sizes')
    outputs = ('boxes', 'scores', 'labels')

    @property
    def known_sizes(self) -> dict:
        """dict: What exporters do not find out, by output and dimension."""
        number = {1: self.number}
        return dict(boxes={**number, 2: 4}, scores=number, labels=number)

    def __init__(self, model: nn.Module, kind: str = 'float') -> None:
        super().__init__()
        self.normalize = Normalize(model.data_preprocessor, kind)
        self.model = model
        self.pad_value = float(model.data_preprocessor.pad_value)
        decoder, queries = model.decoder, model.query_generator.num_queries
        self.num_classes = decoder.num_classes
        self.number = min(
            decoder.max_per_img or queries, queries * self.num_classes
        )

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
        feats = self.model.extract_feat(images)
        queries = self.model.query_generator(sizes)
        logits, boxes, _ = self.model.decoder(feats, *queries)
        scores, index = logits[-1].sigmoid().flatten(1).topk(self.number)
        query = torch.div(index, self.num_classes, rounding_mode='floor')
        query = query.unsqueeze(-1).expand(-1, -1, 4)
        boxes = boxes[-1].gather(1, query)
        return boxes, scores, index % self.num_classes

    def _cover_padding(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Give padding the value that it has in training and testing.

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
