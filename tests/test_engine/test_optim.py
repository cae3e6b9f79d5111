"""Mixed precision on any device."""

import copy
import math

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn
from torch.testing import assert_close

from lors_plugin.engine.optim import AutocastOptimWrapper
from lors_plugin.engine.optim.autocast_optim_wrapper import _check_bfloat16

DTYPES = ['float16', 'bfloat16']


def make(dtype='float16', lr=0.5, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    return model, AutocastOptimWrapper(dtype, optimizer=optimizer, **options)


@pytest.mark.parametrize('dtype', DTYPES)
def test_autocast_inside_the_context_only(dtype):
    model, wrapper = make(dtype)
    x = torch.randn(4, 3)
    with wrapper.optim_context(model):
        assert model(x).dtype == getattr(torch, dtype)
    assert model(x).dtype == torch.float32


@pytest.mark.parametrize('dtype', DTYPES)
def test_steps_are_those_of_full_precision(dtype):
    """The scale of the loss cancels, also for the clipping."""
    x = torch.randn(4, 3)
    results = []
    for kind in (None, dtype):
        model, wrapper = make('bfloat16', clip_grad=dict(max_norm=0.1))
        if kind is None:
            wrapper = OptimWrapper(
                wrapper.optimizer, clip_grad=dict(max_norm=0.1)
            )
        elif kind == 'float16':
            model, wrapper = make(kind, clip_grad=dict(max_norm=0.1))
        for _ in range(3):
            # No autocast: only what the wrapper does to gradients.
            wrapper.update_params(model(x).square().sum())
        results.append(dict(model.state_dict()))
    assert_close(results[1], results[0])


def test_overflow_skips_the_step_and_lowers_the_scale():
    model, wrapper = make(clip_grad=dict(max_norm=1.0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    scale = wrapper.loss_scaler.get_scale()
    wrapper.update_params(model(torch.full((1, 3), math.inf)).sum())
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert wrapper.loss_scaler.get_scale() == scale / 2
    wrapper.update_params(model(torch.ones(1, 3)).sum())
    assert (model.weight != before['weight']).all()
    assert model.weight.isfinite().all()


def test_fixed_scale_stays():
    model, wrapper = make(loss_scale=64.0)
    for value in (1.0, math.inf, 1.0):
        wrapper.update_params(model(torch.full((1, 3), value)).sum())
        assert wrapper.loss_scaler.get_scale() == 64


def test_bfloat16_scales_nothing():
    model, wrapper = make('bfloat16')
    loss = model(torch.ones(1, 3)).sum()
    wrapper.backward(loss)
    assert_close(model.weight.grad, torch.ones(2, 3), rtol=0, atol=0)
    assert not wrapper.loss_scaler.is_enabled()


@pytest.mark.parametrize('dtype', DTYPES)
def test_accumulated_gradients(dtype):
    """Four quarter batches step once, as the whole batch does."""
    x = torch.randn(8, 3)
    whole, wrapper = make(dtype)
    wrapper.update_params(whole(x).square().mean())
    parts, wrapper = make(dtype, accumulative_counts=4)
    wrapper.initialize_count_status(parts, 0, 4)
    for i, part in enumerate(x.split(2)):
        before = parts.weight.detach().clone()
        with wrapper.optim_context(parts):
            pass
        wrapper.update_params(parts(part).square().mean())
        assert (parts.weight != before).any() == (i == 3)
    assert_close(dict(parts.state_dict()), dict(whole.state_dict()))


@pytest.mark.parametrize('dtype', DTYPES)
def test_state_goes_on_exactly(dtype):
    x = torch.randn(4, 3)

    def step(model, wrapper, times):
        for _ in range(times):
            wrapper.update_params(model(x).square().sum() * 1e-3)

    model, wrapper = make(dtype)
    wrapper.loss_scaler._growth_interval = 2
    step(model, wrapper, 3)
    state = copy.deepcopy(wrapper.state_dict())
    other, resumed = make(dtype, seed=5)
    resumed.loss_scaler._growth_interval = 2
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert 'loss_scaler' in state
    scales = [w.loss_scaler.get_scale() for w in (wrapper, resumed)]
    assert scales[0] == scales[1]
    step(model, wrapper, 2)
    step(other, resumed, 2)
    assert_close(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize('dtype', DTYPES)
def test_takes_the_state_of_other_precisions(dtype):
    """A training may go on in another precision."""
    model, full = make('bfloat16')
    full = OptimWrapper(full.optimizer)
    full.update_params(model(torch.ones(1, 3)).sum())
    states = [full.state_dict()]
    for other in DTYPES:
        model, wrapper = make(other)
        wrapper.update_params(model(torch.ones(1, 3)).sum())
        states.append(wrapper.state_dict())
    for state in states:
        model, wrapper = make(dtype)
        wrapper.load_state_dict(state)
        wrapper.update_params(model(torch.ones(1, 3)).sum())
        momentum = wrapper.optimizer.state_dict()['state'][0]
        assert_close(momentum['momentum_buffer'], torch.full((2, 3), 1.9))


def test_bad_dtype():
    with pytest.raises(ValueError, match="dtype='float8' must be one of"):
        make('float8')


def test_built_from_a_config():
    wrapper = build_optim_wrapper(
        nn.Linear(3, 2),
        dict(
            type='lors_plugin.AutocastOptimWrapper',
            dtype='bfloat16',
            optimizer=dict(type='AdamW', lr=1e-3),
            clip_grad=dict(max_norm=1.0),
        ),
    )
    assert isinstance(wrapper, AutocastOptimWrapper)
    assert wrapper.dtype == torch.bfloat16
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)


def test_gpu_without_bfloat16_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match='7.0.*--amp float16'):
        _check_bfloat16((7, 0))
    _check_bfloat16((8, 0))
