"""What the hosts and PyTorch do to models: trace, count, run again."""

import warnings

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.analysis import get_model_complexity_info
from mmengine.runner import turn_on_activation_checkpointing
from torch.testing import assert_close

KINDS = ['adamixer', 'lors']


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', torch.jit.TracerWarning)
        return function(*args)


@pytest.mark.parametrize('kind', KINDS)
def test_jit_trace(kind, tiny_decoder, decoder_inputs):
    """The trace computes other inputs of these sizes, too."""
    decoder = tiny_decoder(kind, backend='torch').eval()
    with torch.no_grad():
        traced = quietly(torch.jit.trace, decoder, decoder_inputs())
        torch.manual_seed(1)
        others = decoder_inputs()
        assert_close(traced(*others), decoder(*others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_model_complexity(kind, tiny_detector):
    """As MMDetection's get_flops.py asks for it."""
    model = tiny_detector(kind).eval()
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96))
    )
    forward = model.forward
    model.forward = lambda inputs: forward(inputs, data_samples=[sample])
    found = quietly(
        lambda: get_model_complexity_info(
            model,
            None,
            inputs=torch.randn(1, 3, 64, 96),
            show_table=False,
            show_arch=False,
        )
    )
    assert found['params'] == sum(p.numel() for p in model.parameters())
    assert found['flops'] > 0


@pytest.mark.parametrize('kind', KINDS)
def test_activation_checkpointing_of_stages(
    kind, tiny_decoder, decoder_inputs
):
    """Which would run backward through the neck once per stage."""
    decoder = tiny_decoder(kind, backend='torch')
    turn_on_activation_checkpointing(decoder, ['stages.0', 'stages.1'])
    feats, *others = decoder_inputs()
    feats = [feat.requires_grad_() for feat in feats]
    with pytest.raises(RuntimeError, match='set with_cp=True in the decoder'):
        decoder(feats, *others)
    with torch.no_grad():
        decoder(feats, *others)
