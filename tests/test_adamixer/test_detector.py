"""The whole detector: modes, sizes, padding, copies, mixed precision."""

import copy
import math
import re

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.testing import assert_close

from lors_plugin.adamixer.box_geometry import boxes_from_sizes
from lors_plugin.engine.optim import AutocastOptimWrapper
from lors_plugin.testing import randomize

KINDS = ['adamixer', 'lors']


def images(batch=2, height=64, width=96):
    return torch.randn(batch, 3, height, width)


@pytest.mark.parametrize('kind', KINDS)
def test_modes(kind, tiny_detector, make_samples):
    detector = tiny_detector(kind)
    losses = detector(images(), make_samples(), mode='loss')
    assert sorted(losses) == sorted(
        f'stage{s}_loss_{part}' for s in range(3) for part in LOSSES
    )
    results = detector(images(), make_samples(), mode='predict')
    assert [type(r) for r in results] == [DetDataSample] * 2
    for result in results:
        found = result.pred_instances
        assert found.bboxes.shape == (7, 4)
        assert found.scores.shape == found.labels.shape == (7,)
        assert (found.scores.diff() <= 0).all()
    scores, boxes, contents = detector(images(), make_samples())
    assert scores.shape == (3, 2, 7, 3)
    assert boxes.shape == (3, 2, 7, 4)
    assert contents.shape == (3, 2, 7, 32)
    with pytest.raises(RuntimeError, match='Invalid mode'):
        detector(images(), make_samples(), mode='train')


LOSSES = ('cls', 'bbox', 'iou')


def first_boxes(detector, *args):
    """What the decoder starts from."""
    seen = []
    handle = detector.decoder.register_forward_pre_hook(
        lambda module, given: seen.append(given[2])
    )
    assert len(detector(*args)) == 3
    handle.remove()
    return seen[0]


def test_forward_without_samples_takes_the_padded_size(tiny_detector):
    wanted = boxes_from_sizes(torch.tensor([96.0, 64.0]))
    found = first_boxes(tiny_detector(), images())
    assert_close(found, wanted.expand(2, 7, 4))


@pytest.mark.parametrize(
    ('batch', 'height', 'width'), [(1, 32, 32), (3, 96, 64), (2, 160, 224)]
)
def test_other_sizes(batch, height, width, tiny_detector, make_samples):
    detector = tiny_detector()
    samples = make_samples((2,) * batch, shapes=(height, width))
    losses = detector.loss(images(batch, height, width), samples)
    assert all(value.isfinite() for value in losses.values())
    results = detector.predict(images(batch, height, width), samples)
    assert len(results) == batch


def test_queries_start_from_unpadded_sizes(tiny_detector, make_samples):
    detector = tiny_detector()
    shapes = [(50, 90), (64, 40)]
    samples = make_samples((1, 1), shapes=shapes)
    for height, width in ((64, 96), (128, 160)):
        xyzr = first_boxes(detector, images(2, height, width), samples)
        for boxes, (h, w) in zip(xyzr, shapes):
            wanted = boxes_from_sizes(torch.tensor([float(w), float(h)]))
            assert_close(boxes, wanted.expand(7, 4))


def test_padding_does_not_move_the_decoder(tiny_decoder, decoder_inputs):
    """Zero cells right of and below a map are what lies outside anyway."""
    decoder = tiny_decoder()
    feats, content, xyzr = decoder_inputs()
    padded = [
        nn.functional.pad(f, (0, 64 // s, 0, 32 // s))
        for f, s in zip(feats, decoder.strides)
    ]
    outs, others = (decoder(f, content, xyzr) for f in (feats, padded))
    for a, b in zip(outs, others):
        assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_padding_changes_predictions_little(tiny_detector, make_samples):
    """Borders of convolutions and the norm of the neck see the padding."""
    detector = randomize(tiny_detector()).eval()
    img = images(1, 64, 96)
    padded = nn.functional.pad(img, (0, 32, 0, 0))
    with torch.no_grad():
        outs = [detector(i, make_samples((1,))) for i in (img, padded)]
    first = (outs[0][1][0] - outs[1][1][0]).abs().max()
    assert first < 0.15 * 96


def test_rescale(tiny_detector, make_samples):
    detector, img = tiny_detector().eval(), images()
    small = detector.predict(img, make_samples(scale=0.5), rescale=True)
    same = detector.predict(img, make_samples(scale=0.5), rescale=False)
    for a, b in zip(small, same):
        assert_close(a.pred_instances.bboxes, 2 * b.pred_instances.bboxes)
        assert_close(a.pred_instances.scores, b.pred_instances.scores)


@pytest.mark.parametrize('kind', KINDS)
def test_state_dict_round_trip(kind, tiny_detector, make_samples, tmp_path):
    detector = tiny_detector(kind).eval()
    torch.save(detector.state_dict(), tmp_path / 'weights.pth')
    other = tiny_detector(kind, seed=5).eval()
    img, samples = images(), make_samples()
    assert (detector(img, samples)[2] != other(img, samples)[2]).any()
    state = torch.load(tmp_path / 'weights.pth', weights_only=True)
    other.load_state_dict(state)
    assert_close(other(img, samples), detector(img, samples), rtol=0, atol=0)


@pytest.mark.parametrize('kind', KINDS)
def test_copies_are_independent(kind, tiny_detector, make_samples):
    """EMA and others copy the model."""
    detector = tiny_detector(kind)
    other = copy.deepcopy(detector)
    img, samples = images(), make_samples()
    assert_close(other(img, samples), detector(img, samples))
    mine = {p.data_ptr() for p in detector.parameters() if p.numel()}
    assert not mine & {p.data_ptr() for p in other.parameters()}
    with torch.no_grad():
        for param in detector.parameters():
            param.zero_()
    assert other(img, samples)[2].abs().sum() > 0


def test_moving_average(tiny_detector):
    detector = tiny_detector()
    average = ExponentialMovingAverage(detector, momentum=0.5)
    key = 'decoder.mixing.generator.weight'
    average.update_parameters(detector)
    before = detector.get_parameter(key).detach().clone()
    with torch.no_grad():
        detector.get_parameter(key).add_(1)
    average.update_parameters(detector)
    assert_close(average.module.get_parameter(key), before + 0.5)


def data_batch(make_samples, counts=(3, 2)):
    samples = make_samples(counts)
    inputs = [
        torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8) for _ in counts
    ]
    return dict(inputs=inputs, data_samples=samples)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
@pytest.mark.parametrize('kind', KINDS)
def test_mixed_precision_trains(kind, dtype, tiny_detector, make_samples):
    detector = tiny_detector(kind).train()
    wrapper = AutocastOptimWrapper(
        dtype=dtype,
        loss_scale=128.0,
        optimizer=torch.optim.AdamW(detector.parameters(), 1e-3),
        clip_grad=dict(max_norm=1.0),
    )
    before = copy.deepcopy(detector.state_dict())
    batch = data_batch(make_samples)
    values = [
        detector.train_step(copy.deepcopy(batch), wrapper)['loss'].item()
        for _ in range(6)
    ]
    assert all(math.isfinite(v) for v in values)
    assert values[-1] < values[0]
    after = detector.state_dict()
    for key in (
        'decoder.stages.0.fc_reg.weight',
        'query_generator.content.weight',
        'neck.convs.0.weight',
        'backbone.layer4.0.conv1.weight',
    ):
        assert after[key].isfinite().all()
        assert (after[key] != before[key]).any(), key
    frozen = 'backbone.layer1.0.conv1.weight'
    assert_close(after[frozen], before[frozen], rtol=0, atol=0)


def test_data_preprocessor_pads_and_normalises(tiny_detector, make_samples):
    """From uint8 images of two sizes to predictions."""
    detector = tiny_detector().eval()
    samples = make_samples((1, 1), shapes=[(50, 90), (64, 40)])
    inputs = [
        torch.randint(0, 256, (3, *s.img_shape), dtype=torch.uint8)
        for s in samples
    ]
    with torch.no_grad():
        results = detector.test_step(dict(inputs=inputs, data_samples=samples))
    assert results[0].batch_input_shape == (64, 96)
    assert all(len(r.pred_instances) == 7 for r in results)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(query_generator=dict(embed_dims=16)),
            'query_generator.embed_dims=16 does not fit decoder.embed_dims=32',
        ),
        (
            dict(neck=dict(out_channels=16)),
            'neck.out_channels=16 does not fit decoder.feat_channels=32',
        ),
        (
            dict(decoder=dict(feat_channels=64)),
            'neck.out_channels=32 does not fit decoder.feat_channels=64',
        ),
    ],
)
def test_widths_that_do_not_fit(changes, message, tiny_config, build):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tiny_config(**changes))


@pytest.mark.parametrize('mode', ['loss', 'predict'])
def test_queries_start_as_the_image_without_its_padding(
    mode, tiny_detector, make_samples
):
    detector, sizes = tiny_detector(), []
    detector.query_generator.register_forward_pre_hook(
        lambda module, args: sizes.extend(args[0].tolist())
    )
    samples = make_samples(shapes=[(64, 80), (48, 96)])
    assert samples[0].batch_input_shape == (64, 96)
    detector.eval()
    getattr(detector, mode)(torch.randn(2, 3, 64, 96), samples)
    assert sizes == [[80, 64], [96, 48]]
