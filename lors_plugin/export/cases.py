"""Inputs of an exported model, and what the model in PyTorch makes of them.

The model runs as it does in ``tools/test.py``: with its own data preprocessor
and its own operators, not with what was rewritten for export.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def random_images(
    batch: int, shape: tuple[int, int], seed: int, channels: int = 3
) -> list[Tensor]:
    """Images that are smooth as photos are, all of one shape.

    Returns:
        list[Tensor]: BGR as files are read, uint8, shape (channels, H, W).
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(
        batch, channels, *(max(n // 16, 2) for n in shape), generator=generator
    )
    images = F.interpolate(coarse, size=shape, mode='bilinear')
    return list((images * 255).to(torch.uint8))


@torch.no_grad()
def classifier_case(
    model: nn.Module, images: Sequence[Tensor], kind: str, several: bool
) -> tuple[tuple, tuple]:
    """Inputs and outputs of :class:`ClassifierForExport`.

    Args:
        model (nn.Module): The classifier, in evaluation mode.
        images (Sequence[Tensor]): BGR, uint8, all of shape (3, H, W).
        kind (str): 'float', 'uint8' or 'normalized'.
        several (bool): Whether an image has several labels.

    Returns:
        tuple[tuple[Tensor]]: Inputs and wanted outputs.
    """
    ready = model.data_preprocessor(dict(inputs=list(images)))['inputs']
    logits = model(ready)
    if isinstance(logits, (list, tuple)):
        logits = logits[-1]
    scores = logits.sigmoid() if several else logits.softmax(-1)
    inputs = ready if kind == 'normalized' else _rgb(images, kind)
    return (inputs,), (logits, scores)


@torch.no_grad()
def detector_case(
    model: nn.Module,
    images: Sequence[Tensor],
    kind: str,
    shape: Optional[tuple[int, int]] = None,
) -> tuple[tuple, tuple]:
    """Inputs and outputs of :class:`DetectorForExport` and of its like.

    Args:
        model (nn.Module): The detector, in evaluation mode.
        images (Sequence[Tensor]): BGR, uint8, of shapes (3, H_i, W_i).
        kind (str): 'float', 'uint8' or 'normalized'.
        shape (tuple[int], optional): Height and width to pad to. Defaults to
            those that the preprocessor pads to.

    Returns:
        tuple[tuple[Tensor]]: Inputs and wanted outputs.
    """
    from mmdet.structures import DetDataSample

    samples = []
    for image in images:
        size = tuple(image.shape[-2:])
        meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta))
    data = model.data_preprocessor(
        dict(inputs=list(images), data_samples=samples)
    )
    if shape is not None:
        height, width = data['inputs'].shape[-2:]
        padding = (0, shape[1] - width, 0, shape[0] - height)
        value = float(model.data_preprocessor.pad_value)
        data['inputs'] = F.pad(data['inputs'], padding, value=value)
        for sample in data['data_samples']:
            sample.set_metainfo(dict(batch_input_shape=tuple(shape)))
    results = model.predict(
        data['inputs'], data['data_samples'], rescale=False
    )
    found = [result.pred_instances for result in results]
    wanted = (
        torch.stack([part.bboxes for part in found]),
        torch.stack([part.scores for part in found]),
        torch.stack([part.labels for part in found]),
    )
    sizes = torch.tensor([[*image.shape[:0:-1]] for image in images])
    inputs = data['inputs']
    if kind != 'normalized':
        height, width = inputs.shape[-2:]
        padded = [
            # Any value will do: the exported model covers the padding.
            F.pad(
                image,
                (0, width - image.shape[2], 0, height - image.shape[1]),
                value=255,
            )
            for image in images
        ]
        inputs = _rgb(padded, kind)
    return (inputs, sizes.float()), wanted


def _rgb(images: Sequence[Tensor], kind: str) -> Tensor:
    batch = torch.stack(list(images))
    if batch.shape[1] == 3:
        batch = batch.flip(1)
    return batch.float() if kind == 'float' else batch
