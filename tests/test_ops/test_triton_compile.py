"""The Triton kernels compile for GPUs that are not here, within limits.

A part of what ``tools/benchmarks/compile_kernels.py`` does: the largest
shapes, each kernel once with tensor cores and once without. The tool does
all of them.
"""

import pytest

from lors_plugin.ops.backend import OLDEST_TRITON, triton_version

pytest.importorskip('triton')
if triton_version() < OLDEST_TRITON:
    pytest.skip(
        'the package does not use this Triton', allow_module_level=True
    )

GATED = [
    ('mix-fwd', 'lors-k3', 'float16', 70),
    ('sample-bwd', 'lors-k3', 'float32', 70),
]
# Less of the same.
GATED_TOO = [
    ('mix-fwd', 'lors-k3', 'float16', 80),
    ('mix-fwd', 'lors-k3', 'float32', 80),
    ('mix-bwd', 'lors-k3', 'float16', 80),
    ('mix-bwd', 'lors-k3', 'float32', 70),
    ('sample-fwd', 'lors-k3', 'float16', 80),
    ('mix-fwd', 'lors-k3', 'bfloat16', 90),
    ('mix-bwd', 'adamixer', 'bfloat16', 90),
    ('mix-bwd', 'adamixer', 'float32', 70),
    ('sample-bwd', 'adamixer', 'bfloat16', 90),
]


@pytest.fixture
def gate(monkeypatch, tmp_path):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    import compile_kernels

    return compile_kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kernel', 'size', 'dtype', 'capability'),
    GATED
    + [pytest.param(*case, marks=pytest.mark.thorough) for case in GATED_TOO],
)
def test_kernel_is_within_limits(gate, kernel, size, dtype, capability):
    row = gate.measure(kernel, size, dtype, capability)
    assert row['problems'] == []
    assert row['registers'] > 0


def test_gate_sees_spills_and_missing_tensor_cores(gate, monkeypatch):
    monkeypatch.setattr(gate, 'resources', lambda cubin: (255, 40))
    monkeypatch.setattr(gate, 'SHARED_LIMIT', {80: 1})
    problems = gate.measure('mix-fwd', 'adamixer', 'float16', 80)['problems']
    assert problems[0] == 'spills 40 bytes'
    assert 'shared memory' in problems[1]


@pytest.mark.parametrize(
    ('version', 'dtype', 'wanted'),
    [
        ((3, 7, 1), 'float16', dict(maxnreg=255)),
        ((3, 7, 1), 'float32', {}),
        ((3, 8, 0), 'float16', {}),
    ],
)
def test_registers_of_sampling(gate, monkeypatch, version, dtype, wanted):
    """Where the assembler would choose too few, before Triton 3.8."""
    monkeypatch.setattr(gate.sampling, 'triton_version', lambda: version)
    launch = gate.prepare('sample-bwd', 'lors-k3', dtype, 80)[3]
    assert launch == dict(num_warps=4, num_stages=1, **wanted)


def test_table_is_written_between_the_marks(gate, tmp_path):
    path = tmp_path / 'kernels.md'
    path.write_text('a\n<!-- kernels -->\nold\n<!-- end -->\nb\n')
    gate.write(path, ['| new |'])
    assert path.read_text() == (
        'a\n<!-- kernels -->\n\n| new |\n\n<!-- end -->\nb\n'
    )
    path.write_text('no marks')
    with pytest.raises(ValueError, match='has no lines'):
        gate.write(path, [])


def test_traffic_counts_every_input_and_output(gate):
    moved, work = gate.traffic('mix-fwd', 'adamixer', 2)
    assert moved == 2 * (32 * 64 + 64 * 64 + 128 * 32 + 128 * 64) + 16
    assert work == 2 * (32 * 64 * 64 + 128 * 32 * 64)


def test_tables_that_are_wider_than_a_tile_are_refused(gate):
    import torch

    size = dict(G=1, P=64, C=512, Q=128, KC=0, RC=1, KS=0, RS=1)
    with pytest.raises(ValueError, match="backend='torch'"):
        gate.mixing.config(size, torch.float16, 80, 'forward')
    with pytest.raises(TypeError, match='float64'):
        gate.mixing.config(dict(size, C=64), torch.float64, 80, 'forward')


@pytest.mark.parametrize(
    'allowed, cap, want',
    [(False, 80, 'ieee'), (True, 80, 'tf32'), (True, 70, 'ieee')],
)
def test_exact_float32_unless_pytorch_may_use_tf32(gate, allowed, cap, want):
    import torch

    size = dict(G=1, P=64, C=64, Q=128, KC=0, RC=1, KS=0, RS=1)
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        tiles = gate.mixing.config(size, torch.float32, cap, 'steps')
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept
    assert tiles['PRECISION'] == want


def test_no_kernel_is_specialised_for_a_number_of_queries(gate):
    """Else 1 and multiples of 16 compile again, ungated kernels."""
    mixing, sampling = gate.mixing, gate.sampling
    for kernel in (
        mixing.adaptive_mixing_bwd_kernel,
        mixing.adaptive_mixing_fwd_kernel_steps,
        sampling.sampling_3d_fwd_kernel,
        sampling.sampling_3d_bwd_kernel,
    ):
        numbers = [p for p in kernel.params if p.name.startswith('num')]
        assert numbers
        assert all(p.do_not_specialize for p in numbers)


@pytest.mark.parametrize(
    ('short', 'depth', 'side'), [(True, 8, 16), (False, 16, 64)]
)
def test_backward_below_8_0(gate, monkeypatch, short, depth, side):
    """It is float32, and fits into registers before Triton 3.8 too."""
    monkeypatch.setattr(gate.mixing, 'SHORT_SLICES', short)
    _, tiles, types, _ = gate.prepare('mix-bwd', 'lors-k1', 'float16', 70)
    assert set(types.values()) == {'*fp32', '*i32', 'i32'}
    assert tiles['BK'] == depth
    assert tiles['BKC'] == tiles['BKS'] == side
    assert tiles['FRESH'] is not short
    _, tiles, types, _ = gate.prepare('mix-bwd', 'lors-k1', 'float16', 80)
    assert types['p_x'] == '*fp16'
    assert tiles['BK'] == 32
    assert tiles['BKC'] == 16
    assert tiles['FRESH'] is False
