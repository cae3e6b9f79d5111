"""The models of the benchmarks: those of the configs, with weights that
hide nothing."""

from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import lors_plugin.models  # noqa: F401, registers what is built
from lors_plugin.registry import MODELS
from lors_plugin.testing.weights import randomize

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
FILES = dict(
    adamixer='adamixer/adamixer_r50_8xb2-1x_coco.py',
    lors='lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py',
)
# Images at 800x1333, padded to a multiple of 32.
IMAGE = dict(r50=(800, 1344), tiny=(64, 96))


def model_config(name: str, size: str = 'r50'):
    """The model of a config, without weights to fetch.

    Args:
        name (str): 'adamixer' or 'lors'.
        size (str): 'r50', or 'tiny' to try a tool. Defaults to 'r50'.

    Returns:
        :obj:`ConfigDict`: Config of the detector.
    """
    config = Config.fromfile(CONFIGS / FILES[name]).model
    config.backbone.init_cfg = None
    if size == 'tiny':
        config.backbone.depth = 18
        config.backbone.base_channels = 8
        config.neck.update(in_channels=[8, 16, 32, 64], out_channels=32)
        config.query_generator.embed_dims = 32
        config.decoder.update(
            num_classes=3,
            num_stages=2,
            embed_dims=32,
            in_points=4,
            out_points=8,
            num_heads=2,
            feedforward_channels=16,
        )
    return config


def build_decoder(name: str, size: str, seed: int) -> nn.Module:
    """A decoder on the CPU; for the arguments see :func:`model_config`."""
    init_default_scope('mmdet')
    decoder = MODELS.build(model_config(name, size).decoder)
    return spread(decoder, seed)


def spread(decoder: nn.Module, seed: int) -> nn.Module:
    """Random weights, but sampling points that spread over the boxes."""
    MMLogger.get_current_instance().setLevel('ERROR')  # says all it sets
    randomize(decoder, seed)
    for stage in decoder.stages:
        stage.sampling.init_weights()
        nn.init.normal_(stage.sampling.offsets.weight, std=0.02)
    return decoder


def random_boxes(batch: int, queries: int, image: tuple) -> Tensor:
    """Boxes of all sizes and places, as late stages have them.

    Args:
        batch (int): ``B``.
        queries (int): ``N``.
        image (tuple[int]): Height and width.

    Returns:
        Tensor: (x, y, z, r), shape (B, N, 4).
    """
    height, width = image
    place = torch.rand(batch, queries, 2) * torch.tensor([width, height])
    z = 3 + torch.rand(batch, queries, 1) * (torch.tensor(height).log2() - 3)
    r = torch.randn(batch, queries, 1) * 0.5
    return torch.cat([place, z, r], dim=-1)


def feature_maps(batch: int, width: int, image: tuple, strides) -> list:
    """Random levels of shape (B, width, H_l, W_l), smooth as real ones.

    In white noise the smallest step of a point changes everything, so that
    six stages would turn rounding errors into other results.
    """
    return [
        F.interpolate(
            torch.randn(batch, width, *(max(n // (4 * s), 2) for n in image)),
            size=[n // s for n in image],
            mode='bilinear',
        )
        for s in strides
    ]
