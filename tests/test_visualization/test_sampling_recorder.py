import pytest
import torch
from torch import nn

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.adamixer.box_geometry import boxes_from_sizes, decode_boxes
from lors_plugin.adamixer.decoder import AdaMixerDecoder
from lors_plugin.adamixer.lors_decoder import LORSAdaMixerDecoder
from lors_plugin.visualization import SamplingRecorder

OPTIONS = dict(
    num_classes=3,
    num_stages=2,
    embed_dims=16,
    strides=(8, 16, 32),
    num_groups=2,
    in_points=4,
    out_points=4,
    num_heads=2,
    feedforward_channels=16,
)


def make_inputs(batch=2, queries=5):
    feats = [torch.randn(batch, 16, 64 // s, 96 // s) for s in (8, 16, 32)]
    sizes = torch.tensor([96.0, 64.0]).expand(batch, queries, 2)
    content = torch.randn(batch, queries, 16)
    return feats, content, boxes_from_sizes(sizes)


@pytest.fixture(params=[AdaMixerDecoder, LORSAdaMixerDecoder])
def decoder(request):
    torch.manual_seed(0)
    decoder = request.param(**OPTIONS)
    decoder.init_weights()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def test_results_stay_and_agree_with_the_record(decoder):
    inputs = make_inputs()
    expected = decoder(*inputs)
    with SamplingRecorder(decoder) as recorder:
        found = decoder(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(recorder.records) == 2
    first, second = recorder.records
    torch.testing.assert_close(first.boxes_in, decode_boxes(inputs[2]))
    torch.testing.assert_close(second.boxes_in, first.boxes_out)
    for i, record in enumerate(recorder.records):
        torch.testing.assert_close(record.scores, expected[0][i].sigmoid())
        torch.testing.assert_close(record.boxes_out, expected[1][i])
        assert record.points.shape == (2, 5, 2, 4, 2)
        assert record.weights.shape == (2, 5, 2, 4, 3)
        assert record.strides == (8, 16, 32)


def test_points_and_weights_are_those_of_the_paper(decoder):
    inputs = make_inputs()
    sampling = decoder.stages[0].sampling
    nn.init.zeros_(sampling.offsets.weight)
    bias = sampling.offsets.bias.data.view(2, 4, 3)
    bias.zero_()
    bias[1, 2] = torch.tensor([0.25, -0.5, 4.0 - inputs[2][0, 0, 2]])
    with SamplingRecorder(decoder) as recorder:
        decoder(*inputs)
    record = recorder.records[0]
    centre = torch.tensor([48.0, 32.0])
    moved = centre + torch.tensor([24.0, -32.0])
    torch.testing.assert_close(record.points[0, 0, 0, 0], centre)
    torch.testing.assert_close(record.points[0, 0, 1, 2], moved)
    # Scale 4 is that of stride 16; the others are 1 away.
    near = torch.tensor([-0.5, 0.0, -0.5]).exp()
    torch.testing.assert_close(record.weights[0, 0, 1, 2], near / near.sum())


def test_the_last_pass_counts(decoder):
    with SamplingRecorder(decoder) as recorder:
        decoder(*make_inputs(batch=1))
        decoder(*make_inputs(batch=2))
    assert [len(r.points) for r in recorder.records] == [2, 2]
    decoder(*make_inputs(batch=3))
    assert [len(r.points) for r in recorder.records] == [2, 2]
    assert not decoder.stages[0]._forward_hooks
    assert not decoder.stages[0].sampling._forward_pre_hooks


def test_hooks_go_after_an_error(decoder):
    with pytest.raises(RuntimeError), SamplingRecorder(decoder):
        raise RuntimeError
    assert not decoder.stages[1].sampling._forward_pre_hooks


@pytest.mark.parametrize('model', [nn.Linear(1, 1), nn.Sequential()])
def test_other_models_are_refused(model):
    with pytest.raises(TypeError, match='for AdaMixer'):
        SamplingRecorder(model)
