"""What the benchmarks share: lanes, the correctness gate, measuring.

A lane is one way to compute a case: a provider ('original', 'reference',
'torch', 'triton', ...) in one type. All lanes of a case get the same inputs
and weights, are checked against the reference in float32 first, and are then
timed in turns, in a new random order each round, so that a machine that
slows down slows all of them down.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable
from typing import Optional
from unittest import mock

os.environ.setdefault('KINETO_LOG_LEVEL', '99')

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from lors_plugin.ops import backend as choice  # noqa: E402
from lors_plugin.ops import compiled_library  # noqa: E402

BACKENDS = ('reference', 'torch', 'triton')
PLAIN = 'torch-plain'
DTYPES = ('float32', 'bfloat16', 'float16')
MODES = ('forward', 'backward', 'full')


class GateError(RuntimeError):
    """A lane computes something else than the reference."""


@dataclasses.dataclass
class Lane:
    """One way to compute a case.

    Attributes:
        provider (str): Who computes.
        run (Callable): Takes nothing, returns the outputs.
        leaves (dict[str, Tensor]): What gets gradients.
        dtype (str): Type of autocast; 'float32' for none.
        backend (str): What LORS_PLUGIN_BACKEND is set to meanwhile.
        exact (bool): Whether it must agree with the reference.
        trains (bool): Whether backward is measured.
        gradients (list[Tensor], optional): Of the outputs; random ones are
            made at the first backward.
        finish (Callable, optional): Called after backward, as a part of it.
        plain (bool): Whether the package's compiled code for CPUs is off.
        joint (bool): Whether the gradients are checked as one vector.
    """

    provider: str
    run: Callable[[], list[Tensor]]
    leaves: dict[str, Tensor]
    dtype: str = 'float32'
    backend: str = 'reference'
    exact: bool = True
    trains: bool = True
    gradients: Optional[list[Tensor]] = None
    finish: Optional[Callable[[], None]] = None
    plain: bool = False
    joint: bool = False

    @property
    def name(self) -> str:
        short = dict(float32='', bfloat16=' bf16', float16=' fp16')
        return self.provider + short[self.dtype]

    def chosen(self) -> contextlib.AbstractContextManager:
        """The program of this lane, also where backward computes again."""
        variables = {choice.ENV_NAME: self.backend}
        if self.plain:
            variables[compiled_library.ENV_NAME] = compiled_library.OFF
        return mock.patch.dict(os.environ, variables)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Autocast in the type of this lane."""
        if self.dtype == 'float32':
            return contextlib.nullcontext()
        device = next(iter(self.leaves.values())).device.type
        return torch.autocast(device, getattr(torch, self.dtype))

    def forward(self, training: bool) -> list[Tensor]:
        """Run once, as in training (up to the outputs) or in inference."""
        grad = torch.set_grad_enabled(training)
        with grad, self.chosen(), self.autocast():
            return self.run()

    def prepare(self, outputs: list) -> None:
        """Make random gradients, the same for all lanes."""
        if self.gradients is None:
            self.gradients = upstream(outputs)

    def backward(self, outputs: list) -> None:
        """Run back from the outputs that have a graph."""
        self.prepare(outputs)
        pairs = [p for p in zip(outputs, self.gradients) if p[0].requires_grad]
        with self.chosen():
            torch.autograd.backward(*map(list, zip(*pairs)))
            if self.finish is not None:
                self.finish()

    def forget(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None


def available_backends(device: torch.device, dtypes: list) -> list[str]:
    """The backends that run here in all of the types, reference first."""
    found = ['reference', 'torch']
    verdicts = [
        choice.device_verdict(device.type, device.index, getattr(torch, name))
        for name in dtypes
    ]
    interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    if all(possible for possible, _ in verdicts) and not interpreted:
        found.append('triton')
    return found


def synchronize(device: torch.device) -> None:
    """Wait for a device to finish."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def upstream(outputs: list, seed: int = 0) -> list[Tensor]:
    """Random gradients of outputs of any shapes, the same at each call."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(out.shape, generator=generator).to(out) for out in outputs
    ]


# --- the gate ------------------------------------------------------------


def difference(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error, relative to that of what is wanted."""
    error = (found.double() - wanted.double()).square().mean().sqrt()
    scale = wanted.double().square().mean().sqrt()
    if not torch.isfinite(error):
        return float('inf')
    return float(error / scale) if scale > 0 else float(error)


def results_of(lane: Lane) -> dict[str, Tensor]:
    """Outputs and gradients of a lane, by name."""
    lane.forget()
    found = {}
    if not lane.trains:
        outputs = lane.forward(training=False)
    else:
        outputs = lane.forward(training=True)
        lane.backward(outputs)
        found = {
            f'gradient of {name}': leaf.grad
            for name, leaf in lane.leaves.items()
            if leaf.grad is not None
        }
        lane.forget()
    if lane.joint and found:
        found = {
            'gradient of all': torch.cat([g.flatten() for g in found.values()])
        }
    for index, out in enumerate(outputs):
        found[f'output {index}'] = out.detach()
    return found


def errors_of(found: dict, wanted: dict) -> dict[str, float]:
    """Compare two results; what only one of them has is an infinite error."""
    return {
        name: difference(found[name], wanted[name])
        if name in found and name in wanted
        else float('inf')
        for name in {**wanted, **found}
    }


def check_lanes(
    lanes: list[Lane], tolerance: float, of_gradients: float
) -> dict[str, float]:
    """Compare all lanes with the reference in float32.

    In half precision a lane may be twice as far off as the reference is at
    its worst in that precision, outputs and gradients apart.

    Args:
        lanes (list[Lane]): The first is the reference in float32.
        tolerance (float): Largest allowed error of outputs in float32.
        of_gradients (float): Largest allowed error of gradients.

    Returns:
        dict[str, float]: The largest error of each lane.

    Raises:
        GateError: If a lane is wrong; the worst results are named.
    """
    wanted = results_of(lanes[0])
    allowed, largest, wrong = {}, {lanes[0].name: 0.0}, []
    for lane in lanes[1:]:
        if not lane.exact:
            continue
        errors = errors_of(results_of(lane), wanted)
        largest[lane.name] = max(errors.values())
        if lane.dtype != 'float32' and lane.provider == 'reference':
            for kind in ('output', 'gradient'):
                allowed[lane.dtype, kind] = max(
                    (e for n, e in errors.items() if n.startswith(kind)),
                    default=0.0,
                )
        for name, error in errors.items():
            kind = name.split()[0]
            limit = tolerance if kind == 'output' else of_gradients
            limit += 2 * allowed.get((lane.dtype, kind), 0.0)
            if not error <= limit:
                wrong.append((error, f'{lane.name}, {name}', limit))
    if wrong:
        wrong = sorted(wrong, reverse=True)
        lines = [f'{n}: {e:.1e}, allowed {m:.1e}' for e, n, m in wrong[:10]]
        raise GateError(
            f'no timings, since {len(wrong)} results differ from the '
            'reference, the worst first:\n  ' + '\n  '.join(lines)
        )
    return largest


# --- measuring -----------------------------------------------------------


def peak_memory(function: Callable, device: torch.device) -> int:
    """Bytes that a call allocates at its worst moment.

    On the CPU this is what PyTorch allocates, without the work space of the
    libraries below it.
    """
    if device.type == 'cuda':
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as record:
        function()
    events = [
        event
        for event in record.profiler.kineto_results.events()
        if event.name() == '[memory]'
    ]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(lane: Lane) -> int:
    """Bytes kept for backward: storages, each once, without parameters."""
    parameters = {
        leaf.untyped_storage().data_ptr()
        for leaf in lane.leaves.values()
        if isinstance(leaf, torch.nn.Parameter)
    }
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # Held on to, so that no address is given out a second time.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs = lane.forward(training=True)
    del outputs
    return sum(size for size, _ in kept.values())


def training_memory(lane: Lane, device: torch.device) -> dict[str, int]:
    """Bytes that training with a lane needs.

    Returns:
        dict[str, int]: 'saved' for backward and 'peak' of both ways.
    """

    def step():
        outputs = lane.forward(training=True)
        lane.backward(outputs)

    lane.forget()
    found = dict(saved=saved_bytes(lane))
    found['peak'] = peak_memory(step, device)
    lane.forget()
    return found


def time_once(
    lane: Lane,
    modes: list,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Time a lane once.

    Returns:
        dict[str, float]: Seconds of each mode. 'forward' is inference;
        'full' is a forward pass that keeps what backward needs, and
        backward, whose share is 'backward'.
    """

    def now():
        synchronize(device)
        return clock()

    seconds = {}
    if 'forward' in modes:
        start = now()
        lane.forward(training=False)
        seconds['forward'] = now() - start
    if lane.trains and {'backward', 'full'} & set(modes):
        lane.forget()
        start = now()
        outputs = lane.forward(training=True)
        ahead = now() - start
        lane.prepare(outputs)
        start = now()
        lane.backward(outputs)
        seconds['backward'] = now() - start
        seconds['full'] = ahead + seconds['backward']
        lane.forget()
    return {mode: seconds[mode] for mode in modes if mode in seconds}


def time_lanes(
    lanes: list[Lane],
    modes: list[str],
    device: torch.device,
    repeats: int,
    budget: Optional[float] = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, list[float]]]:
    """Time all lanes in turns, in a random order each round.

    Args:
        lanes (list[Lane]): What to time.
        modes (list[str]): Of 'forward', 'backward' and 'full'.
        device (torch.device): Where they run.
        repeats (int): Rounds that count, after one that does not.
        budget (float, optional): Seconds after which no further round is
            begun, once three count. Defaults to None.
        seed (int): Of the order. Defaults to 0.
        clock (Callable): Gives seconds. Defaults to the wall clock.

    Returns:
        dict[str, dict[str, list[float]]]: For each lane and mode the
        seconds of all rounds.
    """
    order = list(lanes)
    shuffle = random.Random(seed).shuffle
    seconds = {lane.name: {} for lane in lanes}
    start = time.perf_counter()
    for number in range(repeats + 1):
        shuffle(order)
        for lane in order:
            found = time_once(lane, modes, device, clock)
            for mode, value in found.items():
                if number:
                    seconds[lane.name].setdefault(mode, []).append(value)
        spent = time.perf_counter() - start
        if budget is not None and number >= 3 and spent > budget:
            break
    return seconds


def profile_table(lane: Lane, device: torch.device, rows: int = 25) -> str:
    """Where the time of a training step goes, the costliest first."""
    activities = [ProfilerActivity.CPU]
    if device.type == 'cuda':
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):  # the first is for warming up
        with profile(activities=activities) as record:
            outputs = lane.forward(training=True)
            if lane.trains:
                lane.backward(outputs)
            synchronize(device)
        lane.forget()
    key = f'self_{device.type}_time_total'
    return record.key_averages().table(sort_by=key, row_limit=rows)
