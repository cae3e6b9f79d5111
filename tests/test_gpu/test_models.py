"""Whole models on a GPU: training steps, adapters, merging, evaluation."""

import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OptimWrapper
from torch import nn

from lors_plugin.adapters import inject_adapters
from lors_plugin.engine.optim import AutocastOptimWrapper
from lors_plugin.export import DetectorForExport, for_export
from lors_plugin.models import ParameterNet
from lors_plugin.ops.backend import device_verdict
from lors_plugin.reparam import reparameterize
from lors_plugin.testing import randomize

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

SMALL_GHOST = dict(
    width=0.5, rows=[[(3, 16, 16, 0, 1)], [(3, 50, 22, 0.25, 2)]]
)
# The interpreter takes long for a model; test_kernels.py runs the kernels.
BACKENDS = ['torch', pytest.param('triton', marks=pytest.mark.needs_gpu)]


@pytest.fixture
def detector(device, tiny_detector):
    """A tiny LORS detector on the device, and the same on the CPU."""

    def make(backend='torch', **decoder):
        possible, reason = device_verdict(device.type, None, torch.float32)
        if backend == 'triton' and not possible:
            pytest.skip(reason)
        decoder.update(backend=backend, num_stages=2, adaptive_groups=[1, 2])
        queries = dict(num_queries=3)
        model = tiny_detector(query_generator=queries, decoder=decoder)
        same = copy.deepcopy(model)
        for module in same.modules():
            if hasattr(module, 'backend'):
                module.backend = 'reference'
        return model.to(device), same

    return make


def batch(make_samples, device, images=1):
    torch.manual_seed(0)
    pixels = torch.randn(images, 3, 64, 96).to(device)
    return pixels, [s.to(device) for s in make_samples([2] * images)]


def skip_without(kind, device):
    """Skip bfloat16 on GPUs that do not have it."""
    if kind == 'bfloat16' and device.type == 'cuda':
        possible, reason = device_verdict('cuda', None, torch.bfloat16)
        if not possible:
            pytest.skip(reason)


def loss_of(model, data):
    return sum(model.loss(*data).values())


def wrapper_of(model, kind='float32', **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if kind == 'float32':
        return OptimWrapper(optimizer=optimizer, **options)
    scale = dict(loss_scale=1.0) if kind == 'float16' else {}
    return AutocastOptimWrapper(kind, optimizer=optimizer, **scale, **options)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    ('kind', 'with_cp'),
    [
        ('float32', False),
        ('float32', True),
        pytest.param('float16', False, marks=pytest.mark.needs_gpu),
        ('bfloat16', False),
    ],
)
def test_training_step(
    device, detector, make_samples, no_tf32, backend, kind, with_cp
):
    """The loss of the CPU, and gradients for every parameter."""
    skip_without(kind, device)
    model, same = detector(backend, with_cp=with_cp)
    wanted = loss_of(same, batch(make_samples, torch.device('cpu')))
    wrapper = wrapper_of(model, kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with wrapper.optim_context(model):
        loss = loss_of(model, batch(make_samples, device))
    tolerance = 1e-3 if kind == 'float32' else 5e-2
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
    wrapper.backward(loss)
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    wrapper.step()
    moved = [
        not torch.equal(p, before[n])
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    assert all(moved)


def test_gradients_are_those_of_the_cpu(
    device, detector, make_samples, no_tf32
):
    model, same = detector()
    for one, where in ((model, device), (same, torch.device('cpu'))):
        loss_of(one, batch(make_samples, where)).backward()
    pairs = zip(model.parameters(), same.parameters())
    pairs = [(a.grad.cpu(), b.grad) for a, b in pairs if b.requires_grad]
    found, wanted = (torch.cat([g.flatten() for g in x]) for x in zip(*pairs))
    # Kinks of norms and cells: some elements jump between right programs.
    assert (found - wanted).norm() < 0.05 * wanted.norm()


def test_accumulated_steps(device, detector, make_samples):
    model, _ = detector()
    wrapper = wrapper_of(model, accumulative_counts=2)
    weight = model.neck.norm.weight
    steps = []
    for _ in range(2):
        before = weight.detach().clone()
        with wrapper.optim_context(model):
            loss = loss_of(model, batch(make_samples, device))
        wrapper.update_params(loss)
        steps.append(not torch.equal(weight, before))
    assert steps == [False, True]


def test_averaged_weights(device, detector, make_samples):
    model, _ = detector()
    average = ExponentialMovingAverage(model, momentum=0.5, device=device)
    first = {n: t.clone() for n, t in model.state_dict().items()}
    average.update_parameters(model)  # takes the weights as they are
    wrapper = wrapper_of(model)
    wrapper.update_params(loss_of(model, batch(make_samples, device)))
    average.update_parameters(model)
    for name, now in model.state_dict().items():
        found = average.module.state_dict()[name]
        assert found.device.type == device.type
        if now.is_floating_point():
            wanted = (first[name] + now) / 2
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('backend', BACKENDS)
def test_evaluation_is_that_of_the_cpu(
    device, detector, make_samples, no_tf32, backend
):
    model, same = detector(backend)
    found, wanted = (
        one.eval().predict(*batch(make_samples, where))
        for one, where in ((model, device), (same, torch.device('cpu')))
    )
    for a, b in zip(found, wanted):
        a, b = a.pred_instances.cpu(), b.pred_instances
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=1e-3, atol=1e-2)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.needs_gpu  # minutes on a CPU, where it was tried by hand
def test_compiled_detector(device, detector, make_samples, no_tf32):
    """``compile=True`` of MMEngine: a training step, then inference."""
    losses, weights, scores = [], [], []
    for compiled in (False, True):
        model, _ = detector()
        if compiled:
            torch._dynamo.reset()
            for name in ('train_step', 'test_step'):
                setattr(model, name, torch.compile(getattr(model, name)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        pixels, samples = batch(make_samples, device)
        images = [(image * 50 + 128).byte() for image in pixels]
        data = dict(inputs=images, data_samples=samples)
        wrapper = OptimWrapper(optimizer=optimizer)
        losses.append(model.train_step(data, wrapper)['loss'].item())
        weights.append(
            torch.cat([p.detach().flatten() for p in model.parameters()])
        )
        with torch.no_grad():
            (found,) = model.eval().test_step(data)
        scores.append(found.pred_instances.scores)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(*scores, rtol=1e-2, atol=1e-3)


def small_parameternet():
    return randomize(ParameterNet(SMALL_GHOST, num_experts=2))


HALF = [
    'float32',
    'bfloat16',
    pytest.param('float16', marks=pytest.mark.needs_gpu),
]


@pytest.mark.parametrize('kind', HALF)
def test_parameternet(device, no_tf32, kind):
    """Inference and a training step, merged and not."""
    skip_without(kind, device)
    torch.manual_seed(0)
    model, images = small_parameternet(), torch.randn(2, 3, 32, 32)
    same = copy.deepcopy(model).eval()
    model = model.to(device)
    wrapper = wrapper_of(model.train(), kind)
    with wrapper.optim_context(model):
        loss = model(images.to(device))[-1].float().square().mean()
    wrapper.backward(loss)
    assert loss.isfinite()
    assert all(
        p.grad is not None and p.grad.isfinite().all()
        for p in model.parameters()
    )
    model.load_state_dict(same.state_dict())
    with torch.no_grad():
        wanted = same(images)[-1]
        found = model.eval()(images.to(device))[-1]
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)
        assert reparameterize(model) > 0
        found = model(images.to(device))[-1]
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-3, atol=1e-4)
    assert all(p.device.type == device.type for p in model.parameters())


@pytest.mark.parametrize('kind', HALF)
def test_adapters(device, no_tf32, kind):
    """Only adapters train, and merging keeps the outputs."""
    skip_without(kind, device)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    inject_adapters(model, '', targets=['0', '2'])
    model = randomize(model).to(device)
    x = torch.randn(5, 16, device=device)
    wrapper = wrapper_of(model, kind)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with wrapper.optim_context(model):
        loss = model(x).float().square().mean()
    wrapper.update_params(loss)
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad, name
    with torch.no_grad():
        wanted = model.eval()(x)
        assert reparameterize(model) == 2
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.needs_gpu
def test_export_of_a_model_on_the_gpu(device, detector):
    """The copy for export computes the same, and a file can be written."""
    from lors_plugin.export.cases import detector_case, random_images
    from lors_plugin.export.onnx_file import check_file, export_file

    model, _ = detector()
    module = DetectorForExport(for_export(model.eval())).eval().cpu()
    images = random_images(1, (64, 96), 0)
    inputs, wanted = detector_case(model.cpu(), images, 'float')
    for found, right in zip(module(*inputs), wanted):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
    content = export_file(module, inputs)
    check_file(content, [(inputs, wanted)], 1e-2)
