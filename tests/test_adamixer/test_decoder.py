"""The decoder of AdaMixer and what LORS' one shares with it."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lors_plugin.adamixer.box_geometry import decode_boxes

KINDS = ['adamixer', 'lors']


def loss_and_grads(decoder, inputs, samples):
    decoder.zero_grad()
    losses = decoder.loss(*inputs, samples)
    sum(losses.values()).backward()
    return losses, {k: p.grad for k, p in decoder.named_parameters()}


def random_upstream(decoder, inputs):
    """Outputs of the decoder and gradients for random upstream ones."""
    rng = torch.Generator().manual_seed(3)
    inputs = [
        [f.detach().clone().requires_grad_() for f in inputs[0]],
        inputs[1].detach().clone().requires_grad_(),
        inputs[2],
    ]
    decoder.zero_grad()
    outs = decoder(*inputs)
    torch.autograd.backward(
        outs, [torch.randn(o.shape, generator=rng) for o in outs]
    )
    grads = {k: p.grad for k, p in decoder.named_parameters()}
    grads['content'] = inputs[1].grad
    grads.update({f'feat{i}': f.grad for i, f in enumerate(inputs[0])})
    return outs, grads


@pytest.mark.parametrize('kind', KINDS)
def test_shapes_and_types(kind, tiny_decoder, decoder_inputs):
    decoder = tiny_decoder(kind)
    scores, boxes, contents = decoder(*decoder_inputs())
    assert scores.shape == (3, 2, 7, 3)
    assert boxes.shape == (3, 2, 7, 4)
    assert contents.shape == (3, 2, 7, 32)
    assert (boxes[..., 2:] > boxes[..., :2]).all()


SIZES = {
    'per_stage': (
        'adamixer',
        dict(
            num_groups=[1, 2, 4],
            in_points=[3, 4, 5],
            out_points=[6, 7, 2],
            num_heads=[1, 2, 4],
            feedforward_channels=[8, 16, 24],
        ),
        {},
    ),
    'per_stage_lors': (
        'lors',
        dict(
            adaptive_ranks=[0, 2, 4],
            static_ranks=[3, 0, 1],
            num_heads=[1, 2, 4],
            feedforward_channels=[8, 16, 24],
        ),
        {},
    ),
    'one_stage': ('lors', dict(num_stages=1, adaptive_groups=2), {}),
    'five_levels': (
        'lors',
        dict(strides=(2, 4, 8, 16, 32)),
        dict(strides=(2, 4, 8, 16, 32)),
    ),
    'one_level': ('adamixer', dict(strides=(8,)), dict(strides=(8,))),
    'other_feature_width': (
        'lors',
        dict(feat_channels=12),
        dict(feat_channels=12),
    ),
    'wide_features': (
        'adamixer',
        dict(feat_channels=48, num_groups=3),
        dict(feat_channels=48),
    ),
    'points_36': ('adamixer', dict(in_points=36), {}),
    'one_query': ('lors', {}, dict(queries=1)),
    'more_queries': ('lors', {}, dict(queries=30)),
    'one_image': ('adamixer', {}, dict(batch=1)),
    'deeper_branches': ('lors', dict(num_cls_fcs=2, num_reg_fcs=3), {}),
    'no_hidden_layers': ('lors', dict(num_cls_fcs=0, num_reg_fcs=0), {}),
    'one_class': ('adamixer', dict(num_classes=1), {}),
}


@pytest.mark.parametrize('name', SIZES)
def test_sizes_train(name, tiny_decoder, decoder_inputs, make_samples):
    """Any size runs, and leaves no parameter without a gradient."""
    kind, options, shapes = SIZES[name]
    decoder = tiny_decoder(kind, **options)
    inputs = decoder_inputs(**shapes)
    counts = (3, 2)[: len(inputs[1])]
    samples = make_samples(counts, decoder.num_classes)
    losses, grads = loss_and_grads(decoder, inputs, samples)
    stages = decoder.num_stages
    assert len(losses) == 3 * stages
    for key, grad in grads.items():
        param = decoder.get_parameter(key)
        if not param.requires_grad:
            assert param.numel() == 0, key
            continue
        assert grad is not None, key
        assert grad.isfinite().all(), key
    results = decoder.predict(*inputs, samples)
    assert len(results[0]) == inputs[1].shape[1]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('counts', [(0, 0), (0, 3)], ids=['none', 'some'])
def test_images_without_boxes_use_every_parameter(
    kind, counts, tiny_decoder, decoder_inputs, make_samples
):
    decoder = tiny_decoder(kind)
    losses, grads = loss_and_grads(
        decoder, decoder_inputs(), make_samples(counts)
    )
    for name, value in losses.items():
        assert value.isfinite(), name
        if 'cls' in name:
            assert value > 0
        elif not sum(counts):
            assert value == 0
    for key, grad in grads.items():
        assert grad is not None, key
        assert grad.isfinite().all(), key


@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_backends_agree(kind, with_cp, tiny_decoder, decoder_inputs):
    inputs = decoder_inputs()
    results = [
        random_upstream(
            tiny_decoder(kind, backend=backend, with_cp=with_cp), inputs
        )
        for backend in ('reference', 'torch')
    ]
    (outs, grads), (wanted, wanted_grads) = results
    assert_close(outs, wanted, rtol=1e-3, atol=1e-3)
    for key, grad in grads.items():
        scale = wanted_grads[key].abs().max() + 1e-6
        assert (grad - wanted_grads[key]).abs().max() < 1e-3 * scale, key


@pytest.mark.parametrize('kind', KINDS)
def test_positions_are_detached_between_stages_contents_not(
    kind, tiny_decoder, decoder_inputs
):
    decoder = tiny_decoder(kind)
    _, boxes, _ = decoder(*decoder_inputs())
    stages = decoder.stages
    weights = [stages[0].fc_reg.weight, stages[0].ffn.layers[1].weight]
    last, content = torch.autograd.grad(boxes[-1].sum(), weights)
    assert not last.any()
    assert content.abs().sum() > 0


def test_each_stage_refines_the_last_one(tiny_decoder, decoder_inputs):
    """With a box branch of zero all boxes stay what they were."""
    decoder = tiny_decoder('lors')
    for stage in decoder.stages:
        torch.nn.init.zeros_(stage.fc_reg.weight)
        torch.nn.init.zeros_(stage.fc_reg.bias)
    inputs = decoder_inputs()
    _, boxes, _ = decoder(*inputs)
    for stage in boxes:
        assert_close(stage, decode_boxes(inputs[2]))
    step = torch.tensor([0.5, -0.5, 0.25, 0.125])
    decoder.stages[1].fc_reg.bias.data.copy_(step)
    _, boxes, _ = decoder(*inputs)
    moved = inputs[2].clone()
    moved[..., :2] += step[:2] * 2 ** moved[..., 2:3]
    moved[..., 2:] += step[2:]
    for stage, wanted in zip(boxes, (inputs[2], moved, moved)):
        assert_close(stage, decode_boxes(wanted))


def test_queries_are_a_set(tiny_decoder, decoder_inputs):
    """Another order of queries gives the same results in that order."""
    decoder = tiny_decoder('lors')
    feats, content, xyzr = decoder_inputs()
    order = torch.randperm(content.shape[1])
    outs = decoder(feats, content, xyzr)
    other = decoder(feats, content[:, order], xyzr[:, order])
    for a, b in zip(outs, other):
        assert_close(a[:, :, order], b, rtol=1e-3, atol=1e-3)


def test_stage_is_the_sequence_of_the_paper(tiny_decoder, decoder_inputs):
    """One stage, put together from its parts in the order of the text."""
    decoder = tiny_decoder('adamixer', num_stages=1)
    feats, content, xyzr = decoder_inputs()
    stage, mixing = decoder.stages[0], decoder.mixing[0]
    from lors_plugin.adamixer.box_geometry import (
        box_position_encoding,
        intersection_over_foreground,
        refine_boxes,
    )

    def norm(module, x):
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias)

    x = content + box_position_encoding(xyzr, 32)
    iof = intersection_over_foreground(xyzr)
    x = norm(stage.attention_norm, x + stage.attention(x, iof))
    sampled = stage.sampling(feats, x, xyzr, (4, 8, 16, 32))
    x = norm(stage.mixing_norm, x + mixing(sampled, x))
    first, second = stage.ffn.layers[0][0], stage.ffn.layers[1]
    x = norm(stage.ffn_norm, x + second(first(x).relu()))
    branches = []
    for branch in (stage.cls_branch, stage.reg_branch):
        branches.append(norm(branch[1], branch[0](x)).relu())
    scores, boxes, contents = decoder(feats, content, xyzr)
    assert_close(contents[0], x)
    assert_close(scores[0], stage.fc_cls(branches[0]))
    wanted = decode_boxes(refine_boxes(xyzr, stage.fc_reg(branches[1])))
    assert_close(boxes[0], wanted)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('kind', KINDS)
def test_autocast_losses_are_float32_and_close(
    kind, dtype, tiny_decoder, decoder_inputs, make_samples
):
    decoder, inputs = tiny_decoder(kind), decoder_inputs()
    with torch.autocast('cpu', dtype):
        scores, boxes, contents = decoder(*inputs)
        losses = decoder.loss(*inputs, make_samples())
    wanted = decoder.loss(*inputs, make_samples())
    assert scores.dtype == boxes.dtype == contents.dtype == torch.float32
    for key, value in losses.items():
        assert value.dtype == torch.float32
        assert_close(value, wanted[key], rtol=0.15, atol=0.05)


def test_predict_takes_the_best_pairs(
    tiny_decoder, decoder_inputs, make_samples
):
    decoder, inputs = tiny_decoder('lors'), decoder_inputs()
    samples = make_samples()
    scores, boxes, _ = decoder(*inputs)
    results = decoder.predict(*inputs, samples, rescale=False)
    for image, found in enumerate(results):
        pairs = sorted(
            (
                (scores[-1, image, q, c].sigmoid().item(), q, c)
                for q in range(7)
                for c in range(3)
            ),
            reverse=True,
        )[:7]
        values, queries, classes = zip(*pairs)
        assert_close(found.scores, torch.tensor(values))
        assert found.labels.tolist() == list(classes)
        assert_close(found.bboxes, boxes[-1, image, list(queries)])


@pytest.mark.parametrize(
    ('wanted', 'number'), [(None, 7), (4, 4), (15, 15), (999, 21)]
)
def test_number_of_detections(
    wanted, number, tiny_decoder, decoder_inputs, make_samples
):
    """As many as queries by default, never more than pairs."""
    decoder = tiny_decoder('lors', test_cfg=dict(max_per_img=wanted))
    results = decoder.predict(*decoder_inputs(), make_samples())
    assert [len(found) for found in results] == [number, number]


def test_rescale_divides_by_the_scale_factor(
    tiny_decoder, decoder_inputs, make_samples
):
    decoder, inputs = tiny_decoder('lors'), decoder_inputs()
    samples = make_samples()
    for sample in samples:
        sample.set_metainfo(dict(scale_factor=(2.0, 0.5)))
    original = decoder.predict(*inputs, samples)
    resized = decoder.predict(*inputs, samples, rescale=False)
    factor = torch.tensor([2.0, 0.5, 2.0, 0.5])
    for a, b in zip(original, resized):
        assert_close(a.bboxes * factor, b.bboxes)
