"""Every bad value of a constructor is named with its field.

Tables of fields and seeded draws: what is built runs, and what is refused
names a field.
"""

import copy
import random

import pytest
import torch

from lors_plugin.adamixer import (
    AdaMixerDecoder,
    AdaptiveMixing,
    AdaptiveSampling3D,
    BoxSelfAttention,
    InitialQueryGenerator,
    LORSAdaMixerDecoder,
    LORSAdaptiveMixing,
    SharedNormChannelMapping,
)
from lors_plugin.adapters import RepAdapter
from lors_plugin.language import SwitchLinear
from lors_plugin.lors import AdaptiveLowRankStack, LowRankLinearStack
from lors_plugin.lors.linear import LowRankResidualLinear
from lors_plugin.parameternet import (
    DynamicConv2d,
    DynamicLinear,
    ExpertRouter,
    ParameterNet,
    RepConv2d,
)

NAN, INF = float('nan'), float('inf')
# By kind: values that are fine for some combination, and ones that never
# are.
KINDS = dict(
    whole=([1, 2, 3, 4, 8], [0, -1, 1.5, '4', None, NAN, [2], {}]),
    count=([0, 1, 2], [-1, 0.5, '1', None, [1]]),
    layers=(
        [1, 2, 4, [2, 2], [1, 4], (4, 2)],
        [0, '2', None, 1.0, [2], [2] * 3, [2, 0], [2, 'a'], {}],
    ),
    ranks=([0, 1, 2, [1, 2], [0, 2]], [-1, '2', None, 1.0, [2], [2, -1]]),
    pair=(
        [1, 2, 3, (1, 3), [3, 1]],
        [0, -1, '3', None, 1.5, (1,), (1, 2, 3), (1, 0), (1.5, 1), {}],
    ),
    padding=([0, 1, (0, 1), 'same', 'valid'], [-1, 'big', None, 0.5, (1, -1)]),
    share=([0, 0.1, 0.5], [-0.1, 1.5, NAN, '0.1', None, [0.1]]),
    positive=([0.5, 1, 2.0], [0, -1, NAN, INF, '1', None, [1]]),
    number=([0, -1, 0.5], [NAN, INF, '1', None]),
    channels=([[4, 8]], [[], [0, 4], 4, '48', None, [4, '8'], [4, 1.5]]),
    strides=(
        [(4, 8)],
        [(), (0, 4), (4, -8), 4, None, '48', (4, NAN), (4, 'a')],
    ),
    backend=(['auto', 'reference', 'torch'], ['cuda', None, 3, []]),
    routing=(['softmax_mlp', 'sigmoid_linear'], ['linear', None, 1]),
    norm=([dict(type='BN')], [dict(type='NoNorm'), dict(), 'BN', 3]),
)


def choice(*values):
    """A kind of field that has one of some values."""
    return list(values), ['other', None, 3]


def loss(kind):
    """A kind of field that is the config of a loss."""
    return [None, dict(type=kind)], ['x', dict(), dict(type='NoSuchLoss'), 3]


def levels():
    return [torch.rand(2, 32, 8, 8), torch.rand(2, 32, 4, 4)]


def boxes(n=3):
    return torch.tensor([[9.0, 9, 3, 0]]).expand(2, n, 4)


def run_decoder(module):
    feats = [x[:, :1].repeat(1, module.feat_channels, 1, 1) for x in levels()]
    content = torch.rand(2, 3, module.embed_dims)
    return module(feats, content, boxes())[0]


def run_mixing(module):
    shape = module.shape
    x = torch.rand(2, 3, shape.groups, shape.in_points, shape.width)
    return module(x, torch.rand(2, 3, module.generator.in_features))


def run_lors_mixing(module):
    width = module.core_generators[0].in_features
    shape = module.shape
    x = torch.rand(2, 3, shape.groups, shape.in_points, shape.width)
    return module(x, torch.rand(2, 3, width), 1)


def run_sampling(module):
    feats = [x[:, :1].repeat(1, 4 * module.num_groups, 1, 1) for x in levels()]
    content = torch.rand(2, 3, module.offsets.in_features)
    return module(feats, content, boxes(), (4, 8))


def run_attention(module):
    query = torch.rand(2, 3, module.qkv.in_features)
    return module(query, torch.rand(2, 3, 3))


def run_neck(module):
    feats = [torch.rand(2, c, 4, 4) for c in module.in_channels]
    return module(feats)[0]


def run_images(module):
    return module(torch.rand(2, module.in_channels, 16, 16))


DECODER = dict(
    num_classes='whole',
    num_stages=([2], KINDS['whole'][1]),
    embed_dims='whole',
    feat_channels=([None, 4, 8], [0, -8, 1.5, '8', [8]]),
    strides='strides',
    num_groups='layers',
    in_points='layers',
    out_points='layers',
    num_heads='layers',
    feedforward_channels='layers',
    num_cls_fcs='count',
    num_reg_fcs='count',
    dropout='share',
    loss_cls=loss('mmdet.FocalLoss'),
    loss_bbox=loss('mmdet.L1Loss'),
    loss_iou=loss('mmdet.GIoULoss'),
    backend='backend',
    train_cfg=([None, dict()], [dict(assigner=3), dict(assigner={}), 3]),
    test_cfg=(
        [None, dict(max_per_img=2)],
        [dict(max_per_img=0), dict(max_per_img='9'), 3],
    ),
)
SMALL = dict(
    num_classes=2,
    num_stages=2,
    embed_dims=8,
    strides=(4, 8),
    num_groups=2,
    in_points=4,
    out_points=2,
    num_heads=2,
    feedforward_channels=8,
)
CONV = dict(
    in_channels='whole',
    out_channels='whole',
    kernel_size='pair',
    stride='pair',
    dilation='pair',
    groups='whole',
)
WEIGHTS = choice('lors', 'private', 'full')
MIXING = dict(
    embed_dims='whole',
    feat_channels='whole',
    num_groups='whole',
    in_points='whole',
    out_points='whole',
    backend='backend',
)
MIXING_SMALL = dict(
    embed_dims=8, feat_channels=8, num_groups=2, in_points=4, out_points=2
)
LORS = dict(
    adaptive_ranks='ranks',
    adaptive_groups='layers',
    static_ranks='ranks',
    generator_init=choice('zero', 'kaiming'),
    fan_in=choice('stacked', 'matrix'),
    adaptive_weights=WEIGHTS,
    static_weights=WEIGHTS,
)
ROWS = [[(3, 8, 8, 0, 1)], [(3, 16, 8, 0.25, 2)]]
# Name: class, its fields, values that work, how it is called.
CASES = dict(
    decoder=(AdaMixerDecoder, DECODER, SMALL, run_decoder),
    lors_decoder=(
        LORSAdaMixerDecoder,
        # Its own default follows from the number of stages.
        {
            **DECODER,
            **LORS,
            'adaptive_groups': ([None, 1, [1, 2]], [0, '2', [1]]),
        },
        dict(SMALL, adaptive_ranks=2, static_ranks=2),
        run_decoder,
    ),
    mixing=(AdaptiveMixing, MIXING, MIXING_SMALL, run_mixing),
    lors_mixing=(
        LORSAdaptiveMixing,
        {**MIXING, **LORS, 'num_stages': ([2], KINDS['whole'][1])},
        dict(MIXING_SMALL, num_stages=2, adaptive_ranks=2, static_ranks=2),
        run_lors_mixing,
    ),
    sampling=(
        AdaptiveSampling3D,
        dict(
            embed_dims='whole',
            num_groups='whole',
            num_points='whole',
            backend='backend',
        ),
        dict(embed_dims=8, num_groups=2, num_points=4),
        run_sampling,
    ),
    attention=(
        BoxSelfAttention,
        dict(embed_dims='whole', num_heads='whole', dropout='share'),
        dict(embed_dims=8, num_heads=2),
        run_attention,
    ),
    queries=(
        InitialQueryGenerator,
        dict(
            num_queries='whole',
            embed_dims='whole',
            initial_boxes=choice('image', 'grid'),
        ),
        dict(num_queries=3, embed_dims=8),
        lambda module: module(torch.rand(2, 2))[0],
    ),
    neck=(
        SharedNormChannelMapping,
        dict(
            in_channels='channels',
            out_channels='whole',
            num_norm_groups='whole',
        ),
        dict(in_channels=[4, 8], out_channels=8, num_norm_groups=2),
        run_neck,
    ),
    parameternet=(
        ParameterNet,
        dict(
            arch=(
                [dict(rows=ROWS), dict(rows=ROWS, width=2)],
                [
                    None,
                    'big',
                    {},
                    dict(rows=[]),
                    dict(rows=[[]]),
                    dict(rows=[ROWS[0], []]),
                    dict(rows=3),
                    dict(rows=[3]),
                    dict(rows=[[(3, 8, 8, 0)]]),
                    dict(rows=[[(2, 8, 8, 0, 1)]]),
                    dict(rows=[[(3, -8, 8, 0, 1)]]),
                    dict(rows=[[None]]),
                    dict(rows=[[(3, 8, 8, 0, '1')]]),
                ],
            ),
            width=([None, 0.5, 2], [0, -1, NAN, INF, '1', [1]]),
            conv=choice('dynamic', 'rep'),
            num_experts='whole',
            routing='routing',
            temperature='positive',
            num_branches='count',
            in_channels='whole',
            stem_stride='whole',
            out_indices=(
                [(-1,), (0, 1), [2]],
                [(), (3,), (-4,), 1, None, ('a',), (1.0,)],
            ),
            frozen_stages=([-1, 0, 2], [3, -2, '0', None, 1.0]),
            norm_cfg='norm',
            act_cfg=([dict(type='ReLU')], [dict(type='NoAct'), {}, 'ReLU']),
        ),
        dict(arch=dict(rows=ROWS), width=0.5, num_experts=2, in_channels=3),
        lambda module: module(
            torch.rand(2, module.stem.conv.in_channels, 32, 32)
        )[-1],
    ),
    dynamic_conv=(
        DynamicConv2d,
        dict(
            CONV,
            padding='padding',
            num_experts='whole',
            routing='routing',
            temperature='positive',
            backend='backend',
        ),
        dict(in_channels=4, out_channels=4, kernel_size=3),
        run_images,
    ),
    rep_conv=(
        RepConv2d,
        dict(
            CONV,
            padding=([0, 1, (0, 1)], KINDS['padding'][1]),
            num_branches='count',
            norm_cfg=([None, *KINDS['norm'][0]], KINDS['norm'][1]),
        ),
        dict(in_channels=4, out_channels=4, kernel_size=3),
        run_images,
    ),
    dynamic_linear=(
        DynamicLinear,
        dict(
            in_features='whole',
            out_features='whole',
            num_experts='whole',
            routing='routing',
            temperature='positive',
            backend='backend',
        ),
        dict(in_features=4, out_features=4),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
    router=(
        ExpertRouter,
        dict(
            in_channels='whole',
            num_experts='whole',
            routing='routing',
            temperature='positive',
        ),
        dict(in_channels=4, num_experts=2),
        lambda module: module(torch.rand(2, module.fc.in_features)),
    ),
    adapter=(
        RepAdapter,
        dict(
            embed_dims='whole',
            hidden_dims='whole',
            groups='whole',
            scale='number',
            dropout='share',
            channel_dim=([-1], [0, 2, None, 'x']),
        ),
        dict(embed_dims=8),
        lambda module: module(torch.rand(2, 3, module.embed_dims)),
    ),
    lors_linear=(
        LowRankResidualLinear,
        dict(in_features='whole', out_features='whole', rank='count'),
        dict(in_features=4, out_features=4, rank=2),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
    lors_stack=(
        LowRankLinearStack,
        dict(
            in_features='whole',
            out_features='whole',
            num_layers=([2], KINDS['whole'][1]),
            ranks='ranks',
            groups='layers',
        ),
        dict(in_features=4, out_features=4, num_layers=2, ranks=2),
        lambda module: module(torch.rand(2, 3, module.in_features), 1),
    ),
    adaptive_stack=(
        AdaptiveLowRankStack,
        dict(
            rows='whole',
            cols='whole',
            num_layers=([2], KINDS['whole'][1]),
            ranks='ranks',
            groups='layers',
            copies='whole',
            fan_in=choice('stacked', 'matrix'),
        ),
        dict(rows=4, cols=4, num_layers=2, ranks=2, groups=1),
        lambda module: (
            module(torch.rand(2, 3, module.core_sizes[1]), 1) or torch.zeros(1)
        ),
    ),
    switch=(
        SwitchLinear,
        dict(
            in_features='whole',
            out_features='whole',
            num_experts='whole',
            capacity_factor=([None, 0.5, 2], [0, -1, NAN, '1']),
            eval_capacity_factor=([None, 1.5], [0, NAN, '1']),
            jitter=([0, 0.1], [-0.1, 1, NAN, '0', None]),
        ),
        dict(in_features=4, out_features=4),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
)


def values_of(kind):
    return KINDS[kind] if isinstance(kind, str) else kind


def build(name, options):
    kind = CASES[name][0]
    torch.manual_seed(0)
    return kind(**copy.deepcopy(options))


@pytest.mark.parametrize('name', CASES)
def test_bad_values_are_named(name):
    _, fields, small, run = CASES[name]
    run(build(name, small))
    wrong = []
    for field, kind in fields.items():
        for value in values_of(kind)[1]:
            try:
                build(name, {**small, field: value})
            except (ValueError, TypeError) as error:
                # Of a config within, its own name will do.
                inner = value if isinstance(value, dict) else ()
                if not any(str(n) in str(error) for n in (field, *inner)):
                    wrong.append((field, value, repr(error)))
            except Exception as error:
                wrong.append((field, value, repr(error)))
            else:
                wrong.append((field, value, 'no error'))
    assert not wrong, '\n'.join(map(str, wrong))


@pytest.mark.parametrize('name', CASES)
def test_what_is_built_runs(name):
    """Of random combinations of values, each of which is fine somewhere."""
    _, fields, small, run = CASES[name]
    rnd = random.Random(name)
    built = 0
    for _ in range(12):
        chosen = rnd.sample(
            sorted(fields), rnd.randint(1, min(4, len(fields)))
        )
        options = dict(small)
        for field in chosen:
            options[field] = rnd.choice(values_of(fields[field])[0])
        try:
            module = build(name, options)
        except (ValueError, TypeError) as error:
            assert any(f in str(error) for f in fields), (options, error)
            continue
        try:
            run(module.train())
        except Exception as error:
            # A kernel larger than the image, which PyTorch says.
            assert 'Kernel size' in str(error), (options, error)
            continue
        built += 1
    assert built


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_casts_of_the_whole_model(kind, dtype, tiny_detector):
    """Boxes stay in float32, which mixed precision knows."""
    model = tiny_detector(kind).eval().to(dtype)
    for image in (
        torch.rand(1, 3, 64, 64),
        torch.rand(1, 3, 64, 64).to(dtype),
    ):
        with pytest.raises(TypeError, match=f'{dtype}.*--amp'):
            model(image)
    with pytest.raises(TypeError, match=f'{dtype}.*--amp'):
        run_decoder(model.decoder)
    model.float()(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('name', ['parameternet', 'dynamic_conv', 'rep_conv'])
def test_casts_of_layers(name, dtype):
    layer = build(name, CASES[name][2]).eval()
    x = torch.rand(2, 3 + (name != 'parameternet'), 32, 32)
    wanted, found = layer(x), layer.to(dtype)(x.to(dtype))
    if isinstance(wanted, tuple):
        (wanted,), (found,) = wanted, found
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
