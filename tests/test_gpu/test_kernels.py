"""The Triton kernels on a GPU, against the reference in float64.

Cases and tolerances are those of the self-check.
"""

import pytest
import torch

from lors_plugin.ops import share_levels
from lors_plugin.ops.backend import FULL_CAPABILITY, device_verdict
from lors_plugin.ops.self_check import probe

pytest.importorskip('triton')
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ON_GPU = pytest.mark.needs_gpu
OPERATORS = tuple(probe.SIZES)
SIZES = {
    **probe.QUICK,
    'mixing': {
        **probe.QUICK['mixing'],
        **probe.SIZES['mixing'],
        'few points': (1, 7, 1, 1, 16, 3, 0, 0, 1),
        'one query': (1, 1, 4, 32, 64, 128, 0, 0, 1),
        '300 queries': (2, 300, 4, 32, 64, 128, 0, 0, 1),
        'large tile': (1, 5, 2, 128, 128, 128, 0, 0, 1),
    },
    'low_rank_mixing': {
        **probe.QUICK['low_rank_mixing'],
        **probe.SIZES['low_rank_mixing'],
        'lors K 1': (2, 100, 2, 64, 128, 128, 1, 1, 16),
        'lors r 32': (2, 100, 2, 64, 128, 128, 3, 3, 32),
        'lors 300 queries': (2, 300, 2, 64, 128, 128, 2, 2, 16),
        'channel side': (2, 9, 2, 20, 16, 70, 2, 0, 16),
        'spatial side': (2, 9, 2, 20, 16, 70, 0, 2, 16),
    },
    'sampling': {
        **probe.QUICK['sampling'],
        **probe.SIZES['sampling'],
        'wide': (1, 3, 1, 4, 1000, (9, 7)),
        '300 queries': (2, 300, 4, 32, 64, (100, 168)),
    },
}
CASES = [
    pytest.param(
        operator, name, id=f'{operator}-{name}',
        marks=() if name == 'tiny' else ON_GPU,
    )
    for operator in OPERATORS
    for name in SIZES[operator]
]  # fmt: skip
KINDS = [
    'float32',
    'float16',
    pytest.param('bfloat16', marks=ON_GPU),  # wrong in the interpreter
    pytest.param('tf32', marks=ON_GPU),
]
QUICK = {name: next(iter(probe.QUICK[name].values())) for name in OPERATORS}
# In the interpreter, the kernels with low-rank parts stand for those without.
NAMES = [
    pytest.param(name, marks=ON_GPU if name == 'mixing' else ())
    for name in OPERATORS
]


def make(operator, size, device, dtype=torch.float32):
    """A case; skipped where the device has no kernel for the type."""
    possible, reason = device_verdict(device.type, None, dtype)
    if not possible:
        pytest.skip(reason)
    return probe.CASES[operator](size, dtype, str(device))


@pytest.fixture
def kind(request):
    """A type of products; 'tf32' allows TF32 for float32."""
    torch.backends.cuda.matmul.allow_tf32 = request.param == 'tf32'
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize('kind', KINDS, indirect=True)
@pytest.mark.parametrize(('operator', 'name'), CASES)
def test_against_float64(device, poisoned, operator, name, kind):
    """Output and every gradient, with new tensors full of NaN."""
    if operator == 'sampling' and kind != 'float32':
        pytest.skip('sampling computes in float32')
    dtype = torch.float32 if kind == 'tf32' else getattr(torch, kind)
    case = make(operator, SIZES[operator][name], device, dtype)
    for what, (error, allowed) in probe.compare(case, kind).items():
        assert error <= allowed, what


@pytest.mark.parametrize(
    'dtype', [torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
)
@pytest.mark.parametrize('operator', NAMES)
def test_autocast(device, operator, dtype):
    """Mixing computes in its type, sampling stays in float32."""
    size = QUICK[operator]
    make(operator, size, device, dtype)  # whether there is a kernel
    run, inputs, grad = make(operator, size, device)
    kind = 'float32' if operator == 'sampling' else str(dtype)[6:]
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    truth = probe.results(run, 'reference', wide, grad.double())
    wanted = torch.float32 if operator == 'sampling' else dtype

    def cast(backend, leaves):
        with torch.autocast(device.type, dtype):
            return run(backend, leaves)

    mine = probe.results(cast, 'triton', inputs, grad.to(wanted))
    plain = probe.results(cast, 'torch', inputs, grad.to(wanted))
    assert mine['output'].dtype == wanted
    for name, right in truth.items():
        assert mine[name].dtype == plain[name].dtype
        floor = probe.FLOORS[kind][name != 'output']
        allowed = 2 * probe.error(plain[name], right) + floor
        assert probe.error(mine[name], right) <= allowed, name


@pytest.mark.parametrize('operator', NAMES)
def test_no_queries(device, operator):
    size = list(QUICK[operator])
    size[1] = 0
    run, inputs, grad = make(operator, size, device)
    found = probe.results(run, 'triton', inputs, grad)
    assert found['output'].shape == grad.shape and not grad.numel()
    for name, tensor in inputs.items():
        gradient = found[f'gradient of {name}']
        assert gradient.shape == tensor.shape
        assert not gradient.count_nonzero()


def strided(tensor):
    """The same elements with other strides in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize('operator', NAMES)
def test_any_strides(device, operator):
    run, inputs, grad = make(operator, QUICK[operator], device)
    other = {name: strided(tensor) for name, tensor in inputs.items()}
    found = probe.results(run, 'triton', other, strided(grad))
    for name, right in probe.results(run, 'triton', inputs, grad).items():
        assert torch.equal(found[name] + 0, right + 0), name


@pytest.mark.parametrize(
    ('operator', 'name'),
    [
        ('sampling', 'tiny'),  # triton_runner.py repeats mixing
        pytest.param('mixing', 'adamixer', marks=ON_GPU),
        pytest.param('low_rank_mixing', 'lors', marks=ON_GPU),
        pytest.param('sampling', 'lors', marks=ON_GPU),
    ],
)
@pytest.mark.parametrize(
    'dtype', [torch.float32, pytest.param(torch.float16, marks=ON_GPU)]
)
def test_two_runs_agree_to_the_bit(device, operator, name, dtype):
    if operator == 'sampling' and dtype != torch.float32:
        pytest.skip('sampling computes in float32')
    case = make(operator, SIZES[operator][name], device, dtype)
    first, second = (probe.results(case[0], 'triton', *case[1:]) for _ in '12')
    for key, right in first.items():
        assert torch.equal(second[key] + 0, right + 0), key


@ON_GPU  # tests/test_ops/triton_runner.py compiles in the interpreter
@pytest.mark.parametrize('operator', NAMES)
def test_compiled(device, operator):
    """One graph, forward and backward."""
    run, inputs, grad = make(operator, QUICK[operator], device)
    graph = torch.compile(run, fullgraph=True)
    found = probe.results(graph, 'triton', inputs, grad)
    for name, right in probe.results(run, 'triton', inputs, grad).items():
        assert probe.error(found[name], right.double()) < 1e-5, name


# --- what only a GPU has


@ON_GPU
@pytest.mark.parametrize('operator', NAMES)
def test_on_another_stream(device, operator):
    case = make(operator, QUICK[operator], device)
    right = probe.results(case[0], 'triton', *case[1:])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Work before it, so that the default stream would be too early.
        large = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            large = (large @ large / 64).clamp(-1, 1)
        inputs = {n: t + 0 * large[0, 0] for n, t in case[1].items()}
        found = probe.results(case[0], 'triton', inputs, case[2])
    torch.cuda.current_stream().wait_stream(stream)
    for name in right:
        assert torch.equal(found[name] + 0, right[name] + 0), name


@ON_GPU
@pytest.mark.parametrize('operator', NAMES)
def test_on_a_second_device(operator):
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    assert torch.cuda.current_device() == 0
    case = make(operator, QUICK[operator], torch.device('cuda:1'))
    for what, (error, allowed) in probe.compare(case, 'float32').items():
        assert error <= allowed, what
    assert torch.cuda.current_device() == 0


@ON_GPU
@pytest.mark.parametrize('operator', NAMES)
def test_cuda_graph(device, operator):
    run, inputs, _ = make(operator, QUICK[operator], device)
    with torch.no_grad():
        run('triton', inputs)  # compile, and what is made once
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run('triton', inputs)
        for tensor in inputs.values():
            tensor.mul_(0.9)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run('triton', inputs))


def need_memory(gigabytes):
    torch.cuda.empty_cache()  # what earlier tests left
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f'needs {gigabytes} GB of free GPU memory, has {free:.0f}')


@ON_GPU
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_mixing_beyond_32_bits(device, dtype):
    """The last queries of 2^31 elements, forward and backward."""
    # In GB; on older cards, backward makes copies in float32 of half types.
    old = torch.cuda.get_device_capability() < FULL_CAPABILITY
    copies = 32 if old and dtype != torch.float32 else 0
    need_memory(12 * dtype.itemsize + copies)
    points, width, out_points = 32, 64, 128
    each = width**2 + points * out_points
    queries = 2**31 // each + 100
    shape = 1, queries, 1
    torch.manual_seed(0)
    x = torch.randn(*shape, points, width, device=device, dtype=dtype)
    weights = torch.randn(*shape, each, device=device, dtype=dtype)
    assert weights.numel() > 2**31
    last = slice(queries - 7, None)
    mix = probe.adaptive_mixing
    few = [t[:, last].clone().requires_grad_() for t in (x, weights)]
    many = [t.requires_grad_() for t in (x, weights)]
    out, wanted = (mix(*pair, backend='triton') for pair in (many, few))
    assert torch.equal(out[:, last], wanted)
    grad = torch.randn_like(wanted)
    whole = torch.zeros_like(out)
    whole[:, last] = grad
    right = torch.autograd.grad(wanted, few, grad)
    for a, b in zip(torch.autograd.grad(out, many, whole), right):
        assert torch.equal(a[:, last], b)
        assert not a[:, : queries - 7].count_nonzero()


@ON_GPU
def test_sampling_beyond_32_bits(device):
    """The last image of a table with more than 2^31 elements."""
    need_memory(30)
    side, channels = 512, 256
    batch = 2**31 // (side * side * channels) + 1
    level = torch.zeros(batch, channels, side, side, device=device)
    assert level.numel() > 2**31
    torch.manual_seed(0)
    level[-1].normal_()
    points = torch.rand(batch, 4, 2, 8, 3, device=device) * side * 4
    levels = share_levels([level], 'triton')
    found = probe.sampling_3d(levels, points, [4], backend='triton')
    wanted = probe.sampling_3d([level[-1:]], points[-1:], [4], 'triton')
    assert torch.equal(found[-1:], wanted)
    assert not found[:-1].count_nonzero()
