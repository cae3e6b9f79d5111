"""The child process of the self-check: run kernels, compare them, time them.

    python -m lors_plugin.ops.self_check.probe DEVICE SECONDS GROUP ...

A group is an operator in a type, such as 'mixing float16'. Standard output
gets a line of JSON as a group begins, ``{group: null}``, and one at its end,
``{group: [{"size": name, "errors": {...}, "ms": {...}, "bandwidth": [...]},
...]}``. Errors are relative to the reference in float64; what is allowed is
twice the error of the PyTorch operators in the same type, and a little more,
since two right programs differ. Nothing is caught: whoever started this
process sees how it ended. SIGALRM ends it where a group takes longer than
SECONDS, wherever it hangs. The device 'cpu' tries it at tiny sizes.
"""

import functools
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from lors_plugin.ops import (
    LowRank,
    SharedLevels,
    adaptive_mixing,
    sampling_3d,
    share_levels,
)

# Of mixing: images, queries, groups, points, channels, mixed points,
# parameter groups of the channel and of the spatial side, rank. The papers'
# (two images and 100 queries per GPU), and one where nothing is a power of 2.
MIXING = dict(
    odd=(2, 3, 2, 36, 24, 40, 0, 0, 1),
    adamixer=(2, 100, 4, 32, 64, 128, 0, 0, 1),
)
LOW_RANK_MIXING = dict(
    odd=(2, 3, 2, 36, 24, 40, 3, 2, 3),
    lors=(2, 100, 2, 64, 128, 128, 3, 3, 16),
)
# Images, queries, groups, points, channels, cells of the finest level.
SAMPLING = dict(
    odd=(2, 3, 2, 5, 12, (19, 14)),
    adamixer=(1, 100, 4, 32, 64, (200, 336)),
    lors=(1, 100, 2, 64, 128, (200, 336)),
)
SIZES = dict(mixing=MIXING, low_rank_mixing=LOW_RANK_MIXING, sampling=SAMPLING)
QUICK = dict(
    mixing=dict(tiny=(1, 1, 1, 5, 8, 6, 0, 0, 1)),
    low_rank_mixing=dict(tiny=(1, 1, 1, 5, 8, 6, 2, 1, 2)),
    sampling=dict(tiny=(1, 1, 1, 3, 6, (6, 5))),
)
STRIDES = (4, 8, 16, 32)
# What rounding alone may do, relative to the root mean square. Gradients
# jump where a ReLU or a cell of a map begins.
FLOORS = dict(
    float32=(1e-5, 2e-3),
    tf32=(1e-3, 1e-2),
    float16=(1e-3, 1e-2),
    bfloat16=(1e-2, 3e-2),
)
MOST = 0.3  # is never allowed
ROUNDS, RUNS = 10, 5

Case = tuple[Callable, dict[str, Tensor], Tensor]


def random(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Draw normal numbers on the CPU, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * spread


def mixing_case(size: Sequence, dtype: torch.dtype, device: str) -> Case:
    """Return a function of the backend, its inputs, and the gradient."""
    b, n, g, p, c, q, k_c, k_s, r = size
    inputs = dict(
        x=random(b, n, g, p, c) + 0.5,
        weights=random(b, n, g, c * c + q * p, seed=1, spread=0.5),
    )
    for side, k, rows, cols in (('c', k_c, c, c), ('s', k_s, q, p)):
        if k:
            shapes = (g, k, rows, r), (b, n, g, k, r, r), (g, k, r, cols)
            for field, shape in zip(LowRank._fields, shapes):
                seed = len(inputs)
                inputs[f'{side} {field}'] = random(
                    *shape, seed=seed, spread=0.3
                )
    inputs = {n: t.to(device, dtype) for n, t in inputs.items()}
    grad = random(b, n, g, q, c, seed=9).to(device, dtype)

    def mix(backend: str, leaves: dict[str, Tensor]) -> Tensor:
        parts = [
            LowRank(*(leaves[f'{side} {f}'] for f in LowRank._fields))
            if f'{side} left' in leaves
            else None
            for side in 'cs'
        ]
        x, weights = leaves['x'], leaves['weights']
        return adaptive_mixing(x, weights, *parts, backend=backend)

    return mix, inputs, grad


def sampling_case(size: Sequence, dtype: torch.dtype, device: str) -> Case:
    """The same for sampling; the levels are laid out once before."""
    b, n, g, p, c, (height, width) = size
    shapes = [
        (max(height * STRIDES[0] // s, 1), max(width * STRIDES[0] // s, 1))
        for s in STRIDES
    ]
    feats = [
        random(b, g * c, *shape, seed=i).to(device, dtype)
        for i, shape in enumerate(shapes)
    ]
    levels = share_levels(feats, 'torch')
    scale = STRIDES[0] * torch.tensor([width, height, 0]) + torch.tensor(
        [0, 0, 3]
    )
    points = (0.5 + 0.4 * random(b, n, g, p, 3, seed=8)) * scale
    inputs = dict(table=levels.table, points=points.to(device, dtype))
    grad = random(b, n, g, p, c, seed=9).to(device, dtype)

    def sample(backend: str, leaves: dict[str, Tensor]) -> Tensor:
        here = SharedLevels(leaves['table'], b, levels.spatial_shapes)
        return sampling_3d(here, leaves['points'], STRIDES, backend=backend)

    return sample, inputs, grad


CASES = dict(
    mixing=mixing_case, low_rank_mixing=mixing_case, sampling=sampling_case
)


def results(
    run: Callable, backend: str, inputs: dict[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """Return output and gradients by name."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    out = run(backend, leaves)
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    named = {f'gradient of {n}': g for n, g in zip(leaves, found)}
    return {'output': out.detach(), **named}


def error(value: Tensor, truth: Tensor) -> float:
    """Root mean square of the error, relative to that of the truth."""
    value = value.double()
    if not value.isfinite().all():
        return float('inf')
    return float((value - truth).norm() / truth.norm().clamp_min(1e-12))


def compare(case: Case, kind: str) -> dict[str, tuple[float, float]]:
    """Return error and what is allowed, by name of the result."""
    run, inputs, grad = case
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    truth = results(run, 'reference', wide, grad.double())
    mine = results(run, 'triton', inputs, grad)
    plain = results(run, 'torch', inputs, grad)
    errors = {}
    for name, right in truth.items():
        floor = FLOORS[kind][name != 'output']
        allowed = min(2 * error(plain[name], right) + floor, MOST)
        errors[name] = error(mine[name], right), allowed
    return errors


def measure(
    case: Case, rounds: int, runs: int
) -> dict[str, tuple[float, float]]:
    """Return milliseconds of Triton and of PyTorch, by mode.

    They take turns, so that a GPU that slows down slows both down.
    """
    run, inputs, grad = case
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    # Not the table of the levels, whose gradient is PyTorch's in any case.
    wanted = [t for n, t in leaves.items() if n != 'table']

    def forward(backend):
        with torch.no_grad():
            run(backend, leaves)

    def full(backend):
        torch.autograd.grad(run(backend, leaves), wanted, grad)

    found = {}
    for mode, function in dict(forward=forward, full=full).items():
        seconds = dict(triton=[], torch=[])
        warm_up = rounds > 1
        for number in range(rounds + warm_up):
            for backend, taken in seconds.items():
                synchronize(grad.device)
                start = time.perf_counter()
                for _ in range(runs):
                    function(backend)
                synchronize(grad.device)
                if number or not warm_up:
                    taken.append((time.perf_counter() - start) / runs)
        found[mode] = tuple(
            1000 * statistics.median(taken) for taken in seconds.values()
        )
    return found


def traffic(case: Case, size: Sequence, operator: str) -> int:
    """Return the bytes that forward has to read and write at least.

    Every input and output of mixing once. Sampling reads four cells on each
    level for each point, not the whole levels.
    """
    _, inputs, grad = case
    tensors = [*inputs.values(), grad]  # the output is as large as its grad
    moved = sum(t.numel() * t.element_size() for t in tensors)
    if operator == 'sampling':
        table = inputs['table']
        b, n, g, p, c, _ = size
        moved -= table.numel() * table.element_size()
        moved += 4 * len(STRIDES) * b * n * g * p * c * table.element_size()
    return moved


@functools.cache
def copy_bandwidth(device: torch.device, elements: int = 2**26) -> float:
    """Return the GB/s of a large copy, read and written."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds[1:]) / 1e9


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def find(group: str, device: torch.device) -> list[dict]:
    """Compare and time an operator in a type, at all sizes."""
    operator, kind = group.split()
    torch.backends.cuda.matmul.allow_tf32 = kind == 'tf32'
    dtype = torch.float32 if kind == 'tf32' else getattr(torch, kind)
    tiny = device.type == 'cpu'
    found = []
    for name, size in (QUICK if tiny else SIZES)[operator].items():
        case = CASES[operator](size, dtype, str(device))
        entry = dict(size=name, errors=compare(case, kind), ms={})
        # Small sizes measure how fast Python is.
        if name != 'odd':
            ms = measure(case, *((1, 1) if tiny else (ROUNDS, RUNS)))
            reached = traffic(case, size, operator) / ms['forward'][0] / 1e6
            most = copy_bandwidth(device, 2**16 if tiny else 2**26)
            entry.update(ms=ms, bandwidth=(reached, most))
        found.append(entry)
    return found


def main(argv: Sequence[str]) -> None:
    """Check groups one after the other."""
    device, seconds = torch.device(argv[0]), int(argv[1])
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    for group in argv[2:]:
        tell(group, None)
        if hasattr(signal, 'alarm'):
            signal.alarm(seconds)
        tell(group, find(group, device))


def tell(group: str, sizes: Optional[list[dict]]) -> None:
    """Write a line for whoever started this process."""
    sys.stdout.write(json.dumps({group: sizes}) + '\n')
    sys.stdout.flush()


if __name__ == '__main__':
    if hasattr(signal, 'alarm'):
        signal.alarm(int(sys.argv[2]))  # for the start
    main(sys.argv[1:])
