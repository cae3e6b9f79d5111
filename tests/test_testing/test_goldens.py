"""The port against what the original programs computed.

Also that the checks would notice if it were wrong.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from check_golden import main as check_golden_main
from make_golden import make_golden

from lors_plugin.adamixer import lors_mixing, mixing
from lors_plugin.adamixer.mixing import AdaptiveMixing, MixingShape
from lors_plugin.lors import AdaptiveLowRankStack
from lors_plugin.ops.backend import ENV_NAME
from lors_plugin.testing import (
    Golden,
    check_golden,
    golden_detector,
    golden_ops,
)
from lors_plugin.testing.golden import TOLERANCE, relative_error
from lors_plugin.testing.golden_detector import _detection_error, _norm_error

FILES = sorted((Path(__file__).parents[1] / 'data/goldens').glob('*.npz'))
MIXING = ['adamixer_mixing_small', 'lors_mixing_small', 'lors_mixing_by_rule']
PARAMETERNETS = ['parameternet_tiny', 'parameternet_by_rule']
DETECTORS = ['adamixer_detector_small', 'lors_detector_small']


def test_all_goldens_are_here():
    stems = {path.stem for path in FILES}
    assert {
        *MIXING,
        *DETECTORS,
        *PARAMETERNETS,
        'sampling_3d_small',
        'rep_adapter_small',
    } <= stems


@pytest.mark.parametrize(
    ('path', 'backend'),
    [
        pytest.param(path, backend, id=f'{path.stem}-{backend}')
        for path in FILES
        # A detector has the operators of the smaller files.
        for backend in ['torch', 'reference'][: 2 - (path.stem in DETECTORS)]
    ],
)
def test_port_agrees(path, backend, monkeypatch):
    monkeypatch.setenv(ENV_NAME, backend)
    golden = Golden(path)
    errors = check_golden(golden)
    bad = {key: error for key, error in errors.items() if not error < 1e-4}
    assert not bad
    # Which side a value 1e-6 from zero falls on is up to the machine: on the
    # one where this was written it is one element of the LORS detector.
    assert len(golden.notes) <= (3 if golden.kind == 'detector' else 0)


def test_every_entry_is_compared(goldens):
    """All of the file but its inputs and an accuracy that is no loss."""
    golden = Golden(goldens / 'adamixer_detector_small.npz')
    inputs = ('img', 'seed', 'config', 'gt_', 'w.')
    wanted = {
        key
        for key in golden.arrays
        if not key.startswith(inputs) and 'pos_acc' not in key
    }
    wanted.remove('grad_norms')
    wanted |= {f'grad_norm {key}' for key in golden.json('grad_norms')}
    errors, _ = golden_detector._run(golden, ())
    assert set(errors) == wanted


def largest(path):
    return max(check_golden(Golden(path)).values())


@pytest.fixture
def change_weights(monkeypatch):
    """Let every golden hand out weights that went through a function."""
    plain = Golden.original_weights

    def change(function):
        monkeypatch.setattr(
            Golden, 'original_weights', lambda self: function(plain(self))
        )

    return change


def swap_keys(first, second):
    def function(state):
        swapped = dict(state)
        for key in state:
            if first in key:
                other = key.replace(first, second)
                swapped[key], swapped[other] = state[other], state[key]
        return swapped

    return function


@pytest.fixture
def no_kinks(monkeypatch):
    """Searching for kinks takes long and cannot help here."""
    monkeypatch.setattr(golden_detector, 'MAX_KINKS', 0)


@pytest.mark.parametrize('part', ['fc_reg', 'ffn.', 'iof_tau'])
@pytest.mark.parametrize('name', DETECTORS)
def test_swapped_stages_are_noticed(
    name, part, goldens, change_weights, no_kinks
):
    change_weights(swap_keys(f'bbox_head.0.{part}', f'bbox_head.1.{part}'))
    assert largest(goldens / f'{name}.npz') > 10 * TOLERANCE


@pytest.mark.parametrize(
    'part', ['out_weight_bias', 'ml_parameters', 'out_norm']
)
def test_swapped_private_parts_are_noticed(part, goldens, change_weights):
    change_weights(
        lambda state: (
            {
                key.replace(f'{part}.0', f'{part}.x')
                .replace(f'{part}.1', f'{part}.0')
                .replace(f'{part}.x', f'{part}.1'): value
                for key, value in state.items()
            }
            if part != 'ml_parameters'
            else dict(
                state,
                **{
                    key: value.flip(0)
                    for key, value in state.items()
                    if part in key
                },
            )
        )
    )
    path = goldens / 'lors_mixing_small.npz'
    assert largest(path) > 10 * TOLERANCE


def transposed(shape, channel, spatial):
    spatial = spatial.unflatten(-1, (shape.in_points, shape.out_points))
    return channel, spatial.transpose(-1, -2).flatten(-2)


def other_order(shape, channel, spatial):
    number = spatial.shape[-1]
    both = torch.cat([channel, spatial], -1)
    return both[..., number:], both[..., :number]


def channel_transposed(shape, channel, spatial):
    channel = channel.unflatten(-1, (shape.width, shape.width))
    return channel.transpose(-1, -2).flatten(-2), spatial


@pytest.fixture
def change_matrices(monkeypatch):
    """Let what is generated mean other entries of the matrices."""
    plain = mixing.adaptive_mixing

    def change(function):
        def changed(x, weights, *args, **kwargs):
            groups, points, width = x.shape[2:]
            size = weights.shape[-1]
            out_points = (size - width**2) // points
            sizes = MixingShape(groups * width, groups, points, out_points)
            parts = weights.split([width**2, size - width**2], -1)
            moved = torch.cat(function(sizes, *parts), -1)
            return plain(x, moved, *args, **kwargs)

        for module in (mixing, lors_mixing):
            monkeypatch.setattr(module, 'adaptive_mixing', changed)

    return change


@pytest.mark.parametrize(
    'function', [transposed, other_order, channel_transposed]
)
@pytest.mark.parametrize('name', MIXING)
def test_other_matrices_are_noticed(name, function, goldens, change_matrices):
    change_matrices(function)
    assert largest(goldens / f'{name}.npz') > 10 * TOLERANCE


@pytest.mark.parametrize('name', DETECTORS)
def test_other_matrices_in_a_detector_are_noticed(
    name, goldens, change_matrices, no_kinks
):
    change_matrices(transposed)
    assert largest(goldens / f'{name}.npz') > 10 * TOLERANCE


@pytest.mark.parametrize('name', [*MIXING[1:], DETECTORS[1]])
def test_swapped_cores_are_noticed(name, goldens, monkeypatch, no_kinks):
    """The cores of S before those of M, as a port might do."""
    forward = AdaptiveLowRankStack.forward

    def other(self, core, layer):
        return forward(self, core.flip(-1), layer)

    monkeypatch.setattr(AdaptiveLowRankStack, 'forward', other)
    assert largest(goldens / f'{name}.npz') > 10 * TOLERANCE


@pytest.mark.parametrize(
    'change',
    [
        swap_keys('ghost1', 'ghost2'),
        swap_keys('primary_conv.1.bias', 'primary_conv.1.running_mean'),
        lambda state: {
            key: value.flip(0) if 'cond_conv' in key else value
            for key, value in state.items()
        },
    ],
    ids=['modules', 'norms', 'experts'],
)
@pytest.mark.parametrize('name', PARAMETERNETS)
def test_other_parameternets_are_noticed(
    name, change, goldens, change_weights
):
    change_weights(change)
    try:
        error = largest(goldens / f'{name}.npz')
    except (RuntimeError, ValueError):
        return  # it does not even fit
    assert error > TOLERANCE


def test_every_stage_of_a_parameternet_is_compared(goldens):
    for name in PARAMETERNETS:
        golden = Golden(goldens / f'{name}.npz')
        stages = {k for k in golden.arrays if k.startswith('stage')}
        assert set(check_golden(golden)) == stages | {'logits'}


def test_other_level_weights_are_noticed(goldens, monkeypatch):
    plain = golden_ops.sampling_3d

    def rescaled(feats, points, strides, **kwargs):
        points = points * points.new_tensor([1, 1, 1.001])
        return plain(feats, points, strides, **kwargs)

    monkeypatch.setattr(golden_ops, 'sampling_3d', rescaled)
    assert largest(goldens / 'sampling_3d_small.npz') > TOLERANCE


def test_wrong_gradient_is_not_explained_away(goldens, monkeypatch):
    """A gradient that is a little off, with kinks to blame it on."""
    build = golden_detector.build_detector

    def wrong(golden):
        model = build(golden)
        weight = model.get_parameter('decoder.mixing.generator.weight')
        weight.register_hook(lambda grad: 1.001 * grad)
        return model

    monkeypatch.setattr(golden_detector, 'build_detector', wrong)
    monkeypatch.setattr(golden_detector, 'KINK_WIDTH', 3.5e-6)  # fewer
    error = largest(goldens / 'lors_detector_small.npz')
    assert error == pytest.approx(1e-3, rel=0.1)


def test_gradients_and_their_noise(goldens, monkeypatch):
    """Where there are too many kinks to try each: one gradient is wrong."""
    build = golden_detector.build_detector
    weight = 'decoder.stages.1.ffn.layers.1.weight'

    def wrong(golden):
        model = build(golden)
        model.get_parameter(weight).register_hook(lambda grad: 1.0015 * grad)
        return model

    monkeypatch.setattr(golden_detector, 'build_detector', wrong)
    golden, said = Golden(goldens / 'adamixer_detector_small.npz'), []
    errors = golden_detector._compare_with_noise(golden, said.append)
    assert len(said) == 1 + len(golden_detector.NOISE_RUNS)
    assert golden.noise.keys() == errors.keys()
    assert 0 < max(golden.noise.values()) <= golden_detector.LARGEST_NOISE
    above = [
        key
        for key, error in errors.items()
        if error > max(TOLERANCE, golden.noise[key])
    ]
    wrong = 'grad_norm roi_head.bbox_head.1.ffn.layers.1.weight'
    assert above == [wrong]


@pytest.fixture(scope='module')
def float64_golden(tmp_path_factory):
    """A golden that the original formulation makes in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_NAME, 'auto')  # the tool changes it
        small = Golden(FILES[0].with_name('lors_detector_small.npz'))
        keys = json.loads(small.path.with_suffix('.keys.json').read_text())
        path = tmp_path_factory.mktemp('made') / 'lors.npz'
        make_golden(
            path,
            config=small.json('config'),
            keys=keys,
            size=(64, 96),
            formulation='original',
            dtype=torch.float64,
            seed=3,
        )
    return path, small


def test_a_made_golden_in_float64(float64_golden, tool, capsys):
    path, small = float64_golden
    golden = Golden(path)
    norms = golden.json('grad_norms')
    assert norms.keys() == small.json('grad_norms').keys()
    assert max(check_golden(golden).values()) < 1e-9
    assert tool(path) == 0
    assert 'all within 1e-04' in capsys.readouterr().out


@pytest.mark.parametrize(
    'weight', ['backbone.layer3.1.conv2.weight', 'neck.norm.bias']
)
def test_a_gradient_that_is_a_little_wrong(
    float64_golden, monkeypatch, weight
):
    """By 1e-3 in one layer: no noise of float32 is in the way."""
    build = golden_detector.build_detector

    def wrong(golden):
        model = build(golden)
        model.get_parameter(weight).register_hook(lambda grad: 1.001 * grad)
        return model

    monkeypatch.setattr(golden_detector, 'build_detector', wrong)
    errors = check_golden(Golden(float64_golden[0]))
    above = {key: e for key, e in errors.items() if not e < TOLERANCE}
    assert list(above.values()) == pytest.approx([1e-3], rel=0.01)


def test_wrong_loss_is_noticed(goldens, monkeypatch, no_kinks):
    from lors_plugin.adamixer.criterion import SetCriterion

    forward = SetCriterion.forward

    def wrong(self, *args):
        losses = forward(self, *args)
        return losses | dict(stage1_loss_iou=1.001 * losses['stage1_loss_iou'])

    monkeypatch.setattr(SetCriterion, 'forward', wrong)
    path = goldens / 'adamixer_detector_small.npz'
    assert largest(path) > TOLERANCE


def test_missing_gradient_counts_as_zero(goldens, monkeypatch):
    forward = AdaptiveMixing.forward
    monkeypatch.setattr(
        AdaptiveMixing,
        'forward',
        lambda self, x, query: forward(self, x, query.detach()),
    )
    errors = check_golden(Golden(goldens / 'adamixer_mixing_small.npz'))
    assert errors['out'] < TOLERANCE
    assert errors['grad_query'] > 0.1
    assert errors['grad decoder.mixing.0.generator.weight'] < TOLERANCE


@pytest.mark.parametrize(
    'arrays',
    [dict(logits=np.zeros(2)), dict(upstream=np.zeros(1)), {}],
    ids=['other', 'part', 'empty'],
)
def test_unknown_kind(tmp_path, arrays):
    path = tmp_path / 'other.npz'
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match='other.npz is no golden'):
        Golden(path)


def test_relative_error():
    reference = torch.tensor([1.0, -4.0])
    assert relative_error(torch.tensor([1.2, -4.0]), reference) == (
        pytest.approx(0.05)
    )
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) > 1
    nan = relative_error(torch.tensor([float('nan'), -4.0]), reference)
    assert not nan < TOLERANCE
    with pytest.raises(ValueError, match='shape .1,. is compared with .2,.'):
        relative_error(torch.zeros(1), reference)


def test_detections_are_paired_one_to_one():
    rows = torch.tensor(
        [
            [0.0, 0, 10, 10, 0.9, 2],
            [5, 5, 20, 20, 0.9, 1],
            [5, 5, 20, 20, 0.5, 0],
        ]
    )
    assert _detection_error(rows[[1, 0, 2]], rows) == 0
    assert _detection_error(rows[[1, 1, 2]], rows) > 0.1
    other = rows.clone()
    other[2, 5] = 3
    assert _detection_error(other, rows) >= 1
    other = rows.clone()
    other[0, 3] = 11
    assert _detection_error(other, rows) == pytest.approx(0.05)
    with pytest.raises(ValueError, match='detections are compared'):
        _detection_error(rows[:2], rows)


def test_norms_of_gradients():
    grad = torch.randn(1000)
    norm = grad.double().norm().item()
    assert _norm_error(grad, norm, 0) < 1e-6
    assert _norm_error(grad, norm * 1.001, 0) == pytest.approx(1e-3, rel=0.1)
    assert _norm_error(torch.zeros(3), 1e-9, 1e-8) < TOLERANCE
    assert _norm_error(torch.zeros(3), 1e-3, 1e-8) == 1


@pytest.fixture
def tool():
    return lambda *args: check_golden_main([str(arg) for arg in args])


def test_tool(tool, goldens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(ENV_NAME, 'auto')
    good = goldens / 'adamixer_mixing_small.npz'
    assert tool(good, '--backend', 'reference') == 0
    assert 'all within 1e-04' in capsys.readouterr().out
    # With the threads of the original the port agrees to the last bit.
    assert tool(good, '--tolerance=-1') == 1
    assert 'above the tolerance' in capsys.readouterr().out

    arrays = dict(np.load(good))
    arrays['grad_x'] = arrays['grad_x'] * np.float32(1.001)
    bad = tmp_path / 'bad.npz'
    np.savez(bad, **arrays)
    assert tool(good, bad, '--worst', 2) == 1
    out = capsys.readouterr().out
    assert out.count('above the tolerance') == 1
    assert 'grad_x' in out

    other = tmp_path / 'other.npz'
    np.savez(other, a=1)
    assert tool(other, good) == 2
    assert 'cannot be checked' in capsys.readouterr().err
    assert tool(tmp_path / 'none.npz') == 2


def test_weights_by_rule_need_their_keys(goldens, tmp_path, tool):
    name = 'lors_mixing_by_rule.npz'
    shutil.copy(goldens / name, tmp_path / name)
    assert tool(tmp_path / name) == 2
