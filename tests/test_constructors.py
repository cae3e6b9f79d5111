"""Every bad value of a constructor is named with its field.

Values of the parameters in each signature, and seeded draws: what is built
runs, and what is refused names a field.
"""

import copy
import inspect
import random
from collections.abc import Sequence
from typing import Union

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
Sizes = Union[int, Sequence[int]]


def choice(*values):
    """Values of a parameter that has one of some values."""
    return list(values), ['other', None, 3]


def loss(kind):
    """Values of a parameter that is the config of a loss."""
    return [None, dict(type=kind)], ['x', dict(), dict(type='NoSuchLoss'), 3]


# Values that are fine for some combination, and ones that never are: for
# parameters of a name, else for those of a type.
WHOLE = [1, 2, 3, 4, 8], [0, -1, 1.5, '4', None, NAN, [2], {}]
COUNT = [0, 1, 2], [-1, 0.5, '1', None, [1]]
TWO_LAYERS = [2], WHOLE[1]
RANKS = [0, 1, 2, [1, 2], [0, 2]], [-1, '2', None, 1.0, [2], [2, -1]]
PAIR = (
    [1, 2, 3, (1, 3), [3, 1]],
    [0, -1, '3', None, 1.5, (1,), (1, 2, 3), (1, 0), (1.5, 1), {}],
)
PADDING = [0, 1, (0, 1)], [-1, 'big', None, 0.5, (1, -1)]
NORM = [dict(type='BN')], [dict(type='NoNorm'), dict(), 'BN', 3]
ROWS = [[(3, 8, 8, 0, 1)], [(3, 16, 8, 0.25, 2)]]
BY_TYPE = {
    int: WHOLE,
    bool: ([False, True], []),
    Sizes: (
        [1, 2, 4, [2, 2], [1, 4], (4, 2)],
        [0, '2', None, 1.0, [2], [2] * 3, [2, 0], [2, 'a'], {}],
    ),
}
BY_NAME = dict(
    act_cfg=([dict(type='ReLU')], [dict(type='NoAct'), {}, 'ReLU']),
    adaptive_ranks=RANKS,
    adaptive_weights=choice('lors', 'private', 'full'),
    backend=(['auto', 'reference', 'torch'], ['cuda', None, 3, []]),
    capacity_factor=([None, 0.5, 2], [0, -1, NAN, '1']),
    channel_dim=([-1], [0, 2, None, 'x']),
    conv=choice('dynamic', 'rep'),
    dilation=PAIR,
    dropout=([0, 0.1, 0.5], [-0.1, 1.5, NAN, '0.1', None, [0.1]]),
    eval_capacity_factor=([None, 1.5], [0, NAN, '1']),
    fan_in=choice('stacked', 'matrix'),
    frozen_stages=([-1, 0, 2], [3, -2, '0', None, 1.0]),
    generator_init=choice('zero', 'kaiming'),
    fixed_mixing=(
        [(), ['channel']],
        ['channel', None, ['x'], ['channel'] * 2, 3],
    ),
    initial_boxes=choice('image', 'grid', 'learned'),
    jitter=([0, 0.1], [-0.1, 1, NAN, '0', None]),
    kernel_size=PAIR,
    loss_bbox=loss('mmdet.L1Loss'),
    loss_cls=loss('mmdet.FocalLoss'),
    loss_iou=loss('mmdet.GIoULoss'),
    mixing_steps=(
        [('channel', 'spatial'), ['spatial', 'channel'], ['channel']],
        [(), 'channel', None, ['x'], ['channel'] * 2, 3],
    ),
    num_branches=COUNT,
    num_cls_fcs=COUNT,
    num_layers=TWO_LAYERS,
    num_reg_fcs=COUNT,
    num_stages=TWO_LAYERS,
    out_indices=(
        [(-1,), (0, 1), [2]],
        [(), (3,), (-4,), 1, None, ('a',), (1.0,)],
    ),
    padding=PADDING,
    position_encoding=choice('all', 'query_key', 'none'),
    rank=COUNT,
    ranks=RANKS,
    routing=(['softmax_mlp', 'sigmoid_linear'], ['linear', None, 1]),
    scale=([0, -1, 0.5], [NAN, INF, '1', None]),
    stage_loss_weights=([1, 0.5, [1, 2]], [-1, NAN, '1', None, [1], [1, 'a']]),
    static_ranks=RANKS,
    static_weights=choice('lors', 'private', 'full'),
    strides=(
        [(4, 8)],
        [(), (0, 4), (4, -8), 4, None, '48', (4, NAN), (4, 'a')],
    ),
    stride=PAIR,
    temperature=([0.5, 1, 2.0], [0, -1, NAN, INF, '1', None, [1]]),
    test_cfg=(
        [None, dict(max_per_img=2)],
        [dict(max_per_img=0), dict(max_per_img='9'), 3],
    ),
    train_cfg=([None, dict()], [dict(assigner=3), dict(assigner={}), 3]),
    width=([None, 0.5, 2], [0, -1, NAN, INF, '1', [1]]),
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
)
# What hosts and PyTorch check.
NOT_OURS = ('init_cfg', 'device', 'dtype', 'owner', 'unknown')


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
MIXING = dict(
    embed_dims=8, feat_channels=8, num_groups=2, in_points=4, out_points=2
)
DECODER = dict(feat_channels=([None, 4, 8], [0, -8, 1.5, '8', [8]]))
# Name: class, values that work, how it is called, values of parameters that
# are unlike those of other classes.
CASES = dict(
    decoder=(AdaMixerDecoder, SMALL, run_decoder, DECODER),
    lors_decoder=(
        LORSAdaMixerDecoder,
        dict(SMALL, adaptive_ranks=2, static_ranks=2),
        run_decoder,
        # Its own default follows from the number of stages.
        dict(DECODER, adaptive_groups=([None, 1, [1, 2]], [0, '2', [1]])),
    ),
    mixing=(AdaptiveMixing, MIXING, run_mixing),
    lors_mixing=(
        LORSAdaptiveMixing,
        dict(MIXING, num_stages=2, adaptive_ranks=2, static_ranks=2),
        run_lors_mixing,
    ),
    sampling=(
        AdaptiveSampling3D,
        dict(embed_dims=8, num_groups=2, num_points=4),
        run_sampling,
    ),
    attention=(
        BoxSelfAttention,
        dict(embed_dims=8, num_heads=2),
        run_attention,
    ),
    queries=(
        InitialQueryGenerator,
        dict(num_queries=3, embed_dims=8),
        lambda module: module(torch.rand(2, 2))[0],
    ),
    neck=(
        SharedNormChannelMapping,
        dict(in_channels=[4, 8], out_channels=8, num_norm_groups=2),
        run_neck,
        dict(
            in_channels=(
                [[4, 8]],
                [[], [0, 4], 4, '48', None, [4, '8'], [4, 1.5]],
            )
        ),
    ),
    parameternet=(
        ParameterNet,
        dict(arch=dict(rows=ROWS), width=0.5, num_experts=2, in_channels=3),
        lambda module: module(
            torch.rand(2, module.stem.conv.in_channels, 32, 32)
        )[-1],
        dict(norm_cfg=NORM),
    ),
    dynamic_conv=(
        DynamicConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3),
        run_images,
        dict(padding=([*PADDING[0], 'same', 'valid'], PADDING[1])),
    ),
    rep_conv=(
        RepConv2d,
        dict(in_channels=4, out_channels=4, kernel_size=3),
        run_images,
        dict(norm_cfg=([None, *NORM[0]], NORM[1])),
    ),
    dynamic_linear=(
        DynamicLinear,
        dict(in_features=4, out_features=4),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
    router=(
        ExpertRouter,
        dict(in_channels=4, num_experts=2),
        lambda module: module(torch.rand(2, module.fc.in_features)),
    ),
    adapter=(
        RepAdapter,
        dict(embed_dims=8),
        lambda module: module(torch.rand(2, 3, module.embed_dims)),
        dict(inputs=(['', 'q', 'kv'], [])),
    ),
    lors_linear=(
        LowRankResidualLinear,
        dict(in_features=4, out_features=4, rank=2),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
    lors_stack=(
        LowRankLinearStack,
        dict(in_features=4, out_features=4, num_layers=2, ranks=2),
        lambda module: module(torch.rand(2, 3, module.in_features), 1),
    ),
    adaptive_stack=(
        AdaptiveLowRankStack,
        dict(rows=4, cols=4, num_layers=2, ranks=2, groups=1),
        lambda module: (
            module(torch.rand(2, 3, module.core_sizes[1]), 1) or torch.zeros(1)
        ),
    ),
    switch=(
        SwitchLinear,
        dict(in_features=4, out_features=4),
        lambda module: module(torch.rand(2, 3, module.in_features)),
    ),
)


def parameters_of(kind):
    """Parameters of a constructor that passes the others on."""
    own = dict(inspect.signature(kind, eval_str=True).parameters)
    if 'kwargs' not in own:
        return own
    del own['kwargs']
    return parameters_of(kind.__base__) | own


def values_of(name):
    """Right and wrong values of all parameters of a case."""
    kind, _, _, *special = CASES[name]
    given = BY_NAME | (special[0] if special else {})
    return {
        key: given[key] if key in given else BY_TYPE[parameter.annotation]
        for key, parameter in parameters_of(kind).items()
        if key not in NOT_OURS
    }


def build(name, options):
    kind = CASES[name][0]
    torch.manual_seed(0)
    return kind(**copy.deepcopy(options))


@pytest.mark.parametrize('name', CASES)
def test_bad_values_are_named(name):
    _, small, run, *_ = CASES[name]
    run(build(name, small))
    wrong = []
    for field, (_, values) in values_of(name).items():
        for value in values:
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
    _, small, run, *_ = CASES[name]
    fields = values_of(name)
    rnd = random.Random(name)
    built = 0
    for _ in range(12):
        chosen = rnd.sample(
            sorted(fields), rnd.randint(1, min(4, len(fields)))
        )
        options = dict(small)
        for field in chosen:
            options[field] = rnd.choice(fields[field][0])
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
    layer = build(name, CASES[name][1]).eval()
    x = torch.rand(2, 3 + (name != 'parameternet'), 32, 32)
    wanted, found = layer(x), layer.to(dtype)(x.to(dtype))
    if isinstance(wanted, tuple):
        (wanted,), (found,) = wanted, found
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
