"""The detector: backbone, neck, queries, decoder."""

from typing import Optional

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from lors_plugin.registry import MODELS

from .norm import refuse_half


def _freeze_behind_outputs(backbone: nn.Module) -> None:
    """Train no layer that comes after the last output.

    MobileNetV2 always ends in a convolution for classifiers, and ResNet,
    Swin, PVT or ConvNeXt have the stages behind ``out_indices`` too. They
    never get a gradient, for which several processes would wait.
    """
    outputs = getattr(backbone, 'out_indices', ())
    last = max(outputs, default=-1)
    if last < 0:
        return
    for name in ('res_layers', 'layers', 'stages', 'downsample_layers'):
        parts = getattr(backbone, name, ())
        if isinstance(parts, (list, tuple, nn.ModuleList)):
            for part in parts[last + 1 :]:
                part = (
                    getattr(backbone, part, None)
                    if isinstance(part, str)
                    else part
                )
                part.requires_grad_(False)
    if 'Swin' in type(backbone).__name__:
        # The output of a stage is taken before it is made smaller.
        after = getattr(backbone, 'out_after_downsample', False)
        shrink = getattr(backbone.stages[last], 'downsample', None)
        if shrink is not None and not after:
            shrink.requires_grad_(False)


@MODELS.register_module()
class AdaMixer(BaseDetector):
    """`AdaMixer <https://arxiv.org/abs/2203.16507>`_, and with
    ``LORSAdaMixerDecoder`` `LORS <https://arxiv.org/abs/2403.04303>`_.

    Args:
        backbone (dict): Any backbone of MMDetection or of this package.
        neck (dict): Usually ``lors_plugin.SharedNormChannelMapping``.
        query_generator (dict): ``lors_plugin.InitialQueryGenerator``.
        decoder (dict): ``lors_plugin.AdaMixerDecoder`` or
            ``lors_plugin.LORSAdaMixerDecoder``.
        train_cfg (dict, optional): ``assigner``; passed to the decoder.
        test_cfg (dict, optional): ``max_per_img``; passed to the decoder.
        data_preprocessor (dict, optional): As in MMDetection.
        init_cfg (dict, optional): As in MMEngine. Defaults to None.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        query_generator: dict,
        decoder: dict,
        train_cfg: Optional[dict] = None,
        test_cfg: Optional[dict] = None,
        data_preprocessor: Optional[dict] = None,
        init_cfg: Optional[dict] = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MMDET_MODELS.build(backbone)
        _freeze_behind_outputs(self.backbone)
        # Some backbones freeze their first stages only here, which is too
        # late once the model is wrapped for several processes.
        self.backbone.train(self.backbone.training)
        self.neck = MMDET_MODELS.build(neck)
        self.query_generator = MMDET_MODELS.build(query_generator)
        self.decoder = MMDET_MODELS.build(
            dict(train_cfg=train_cfg, test_cfg=test_cfg, **decoder)
        )
        self._check_widths()

    def _check_widths(self) -> None:
        """Parts that were sized in different places must fit together."""
        for name, part, have, want in (
            (
                'query_generator.embed_dims',
                self.query_generator,
                'embed_dims',
                'embed_dims',
            ),
            ('neck.out_channels', self.neck, 'out_channels', 'feat_channels'),
        ):
            width = getattr(part, have, None)
            wanted = getattr(self.decoder, want)
            if width is not None and width != wanted:
                raise ValueError(
                    f'{name}={width} does not fit '
                    f'decoder.{want}={wanted}; make them equal'
                )

    def extract_feat(self, batch_inputs: Tensor) -> list[Tensor]:
        """Levels of shape (B, F, H_l, W_l) of images (B, 3, H, W)."""
        refuse_half(self.neck)
        return self.neck(self.backbone(batch_inputs))

    def _check_levels(self, image: Tensor, feats: list[Tensor]) -> None:
        """The levels must be those that ``decoder.strides`` says."""
        height, width = image.shape[-2:]
        strides = self.decoder.strides
        fits = len(feats) == len(strides) and all(
            abs(feat.shape[2] - height / stride) <= 1
            and abs(feat.shape[3] - width / stride) <= 1
            for feat, stride in zip(feats, strides)
        )
        if not fits:
            real = [round(width / feat.shape[3]) for feat in feats]
            raise ValueError(
                f'decoder.strides={tuple(strides)} does not fit the '
                f'{len(feats)} levels of the neck, whose strides are {real}; '
                f'set decoder.strides={tuple(real)}'
            )

    def _decoder_inputs(
        self, batch_inputs: Tensor, batch_data_samples: Optional[list]
    ) -> tuple:
        feats = self.extract_feat(batch_inputs)
        self._check_levels(batch_inputs, feats)
        if batch_data_samples is None:
            shapes = [batch_inputs.shape[-2:]] * len(batch_inputs)
        else:
            shapes = [s.metainfo['img_shape'][:2] for s in batch_data_samples]
        sizes = batch_inputs.new_tensor(
            [(w, h) for h, w in shapes], dtype=torch.float32
        )
        content, xyzr = self.query_generator(sizes)
        return feats, content, xyzr

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict:
        """Losses of all stages; see :meth:`AdaMixerDecoder.loss`."""
        inputs = self._decoder_inputs(batch_inputs, batch_data_samples)
        return self.decoder.loss(*inputs, batch_data_samples)

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: list,
        rescale: bool = True,
    ) -> list:
        """Data samples with ``pred_instances``, best first."""
        inputs = self._decoder_inputs(batch_inputs, batch_data_samples)
        results = self.decoder.predict(*inputs, batch_data_samples, rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: Optional[list] = None
    ) -> tuple:
        """Raw output of all stages; see :meth:`AdaMixerDecoder.forward`."""
        inputs = self._decoder_inputs(batch_inputs, batch_data_samples)
        return self.decoder(*inputs)

    def parse_losses(self, losses: dict) -> tuple[Tensor, dict]:
        """As in MMEngine, but what is logged is the mean over processes."""
        loss, log_vars = super().parse_losses(losses)
        if get_world_size() > 1:
            values = torch.stack([v.detach() for v in log_vars.values()])
            all_reduce(values, op='mean')
            log_vars = type(log_vars)(zip(log_vars, values))
        return loss, log_vars
