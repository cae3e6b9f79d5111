"""Check implementations against the reference, then time them in turns.

All implementations of a case get the same inputs and weights. Nothing is
timed that computes something else than the reference. Timings are
interleaved, in a new random order each round, so that a machine that slows
down slows all of them down.
"""

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Optional
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CLOCKS = dict(wall=time.perf_counter, process=time.process_time)
MODES = ('forward', 'backward', 'full')
SHORT = dict(float32='', bfloat16=' bf16', float16=' fp16')


class GateError(RuntimeError):
    """An implementation computes something else than the reference."""


@dataclasses.dataclass
class Implementation:
    """One way to compute a case, in one type.

    Attributes:
        name (str): As on the command line.
        run (Callable): Takes nothing and returns the outputs, a list of
            tensors.
        leaves (dict[str, Tensor]): What gets gradients, by name.
        dtype (str): Type of autocast; 'float32' for none.
        backend (str): Value of LORS_PLUGIN_BACKEND while it runs.
        exact (bool): Whether it must agree with the reference.
        trains (bool): Whether it has a backward pass.
        finish (Callable, optional): Called after the backward pass and
            timed with it.
        joint (bool): Whether all gradients are compared as one vector.
        facts (dict[str, tuple]): Value and unit of what is known without
            measuring, by name.
    """

    name: str
    run: Callable[[], list[Tensor]]
    leaves: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    dtype: str = 'float32'
    backend: str = 'auto'
    exact: bool = True
    trains: bool = True
    finish: Optional[Callable[[], None]] = None
    joint: bool = False
    facts: dict = dataclasses.field(default_factory=dict)
    gradients: Optional[list[Tensor]] = None

    @property
    def label(self) -> str:
        return self.name + SHORT[self.dtype]

    @property
    def device(self) -> torch.device:
        for leaf in self.leaves.values():
            return leaf.device
        return torch.device('cpu')

    def forward(self, training: bool) -> list[Tensor]:
        """Run once, with a graph (training) or without (inference)."""
        cast = contextlib.nullcontext()
        if self.dtype != 'float32':
            cast = torch.autocast(self.device.type, getattr(torch, self.dtype))
        with torch.set_grad_enabled(training), self._selected(), cast:
            return self.run()

    def backward(self, outputs: list[Tensor]) -> None:
        """Run back from the outputs that have a graph."""
        self._prepare(outputs)
        pairs = [p for p in zip(outputs, self.gradients) if p[0].requires_grad]
        with self._selected():  # recomputation selects again
            torch.autograd.backward(*map(list, zip(*pairs)))
            if self.finish is not None:
                self.finish()

    def forget(self) -> None:
        """Drop all gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def results(self) -> dict[str, Tensor]:
        """Outputs and gradients, by name."""
        self.forget()
        outputs = self.forward(self.trains)
        found = {}
        if self.trains:
            self.backward(outputs)
            found = {
                f'gradient of {name}': leaf.grad
                for name, leaf in self.leaves.items()
                if leaf.grad is not None
            }
            self.forget()
        if self.joint and found:
            flat = [gradient.flatten() for gradient in found.values()]
            found = {'gradient of all': torch.cat(flat)}
        for index, out in enumerate(outputs):
            found[f'output {index}'] = out.detach()
        return found

    def time(self, modes: Sequence[str], clock: str) -> dict[str, float]:
        """Time one run.

        Args:
            modes (Sequence[str]): 'forward' is inference; 'full' is a
                forward pass that keeps what backward needs, and the backward
                pass, whose share is 'backward'.
            clock (str): 'wall' or 'process'.

        Returns:
            dict[str, float]: Seconds of each mode that it has.
        """

        def now():
            self._synchronize()
            return CLOCKS[clock]()

        seconds = {}
        if 'forward' in modes:
            start = now()
            self.forward(training=False)
            seconds['forward'] = now() - start
        if self.trains and {'backward', 'full'} & set(modes):
            self.forget()
            start = now()
            outputs = self.forward(training=True)
            ahead = now() - start
            self._prepare(outputs)
            start = now()
            self.backward(outputs)
            seconds['backward'] = now() - start
            seconds['full'] = ahead + seconds['backward']
            self.forget()
        return {mode: seconds[mode] for mode in modes if mode in seconds}

    def memory(self, modes: Sequence[str]) -> list[tuple[str, str, int]]:
        """Measure memory.

        Returns:
            list[tuple]: Mode, 'peak memory' or 'kept for backward', bytes.
        """

        def step():
            self.backward(self.forward(training=True))

        found = []
        if 'forward' in modes:
            peak = peak_memory(lambda: self.forward(False), self.device)
            found.append(('forward', 'peak memory', peak))
        if self.trains and 'full' in modes:
            self.forget()
            kept = self.saved_bytes()
            peak = peak_memory(step, self.device)
            self.forget()
            found.append(('full', 'peak memory', peak))
            found.append(('full', 'kept for backward', kept))
        return found

    def saved_bytes(self) -> int:
        """Bytes kept for backward: storages, once each, no parameters."""
        parameters = {
            leaf.untyped_storage().data_ptr()
            for leaf in self.leaves.values()
            if isinstance(leaf, torch.nn.Parameter)
        }
        kept = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                # The tensor is held so that no address is used twice.
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            outputs = self.forward(training=True)
        del outputs
        return sum(size for size, _ in kept.values())

    def profile(self, rows: int = 25) -> str:
        """Profile a training step (inference where there is none)."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == 'cuda':
            activities.append(ProfilerActivity.CUDA)
        for _ in range(2):  # the first is a warm-up
            with profile(activities=activities) as record:
                outputs = self.forward(self.trains)
                if self.trains:
                    self.backward(outputs)
                self._synchronize()
            self.forget()
        key = f'self_{self.device.type}_time_total'
        return record.key_averages().table(sort_by=key, row_limit=rows)

    def _selected(self) -> contextlib.AbstractContextManager:
        return mock.patch.dict(os.environ, LORS_PLUGIN_BACKEND=self.backend)

    def _prepare(self, outputs: list[Tensor]) -> None:
        """Draw gradients of the outputs, the same for all implementations."""
        if self.gradients is None:
            generator = torch.Generator().manual_seed(0)
            self.gradients = [
                torch.randn(out.shape, generator=generator).to(out)
                for out in outputs
            ]

    def _synchronize(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error, relative to that of what is wanted."""
    error = (found.double() - wanted.double()).square().mean().sqrt()
    scale = wanted.double().square().mean().sqrt()
    if not torch.isfinite(error):
        return float('inf')
    return float(error / scale) if scale > 0 else float(error)


def check(
    implementations: Sequence[Implementation],
    tolerance: float,
    gradient_tolerance: float,
) -> dict[str, float]:
    """Compare implementations with the first, the reference in float32.

    In half precision an error may be twice that of the reference in that
    precision at its worst, outputs and gradients apart. A result that only
    one of the two has is an infinite error. One that does not train is
    compared in inference. TF32 is off meanwhile.

    Args:
        implementations (Sequence[Implementation]): In half precision, the
            reference comes before the others.
        tolerance (float): Largest relative error of outputs in float32.
        gradient_tolerance (float): Largest relative error of gradients.

    Returns:
        dict[str, float]: The largest error of each implementation.

    Raises:
        GateError: If one is wrong; the worst results are named.
    """
    reference, wanted = implementations[0], {}
    noise, largest, wrong = {}, {reference.label: 0.0}, []
    for other in implementations[1:]:
        if not other.exact:
            continue
        with torch.backends.cudnn.flags(allow_tf32=False):
            if other.trains not in wanted:
                same = dataclasses.replace(reference, trains=other.trains)
                wanted[other.trains] = same.results()
            results = other.results()
        right = wanted[other.trains]
        errors = {
            name: difference(results[name], right[name])
            if name in results and name in right
            else float('inf')
            for name in {**right, **results}
        }
        largest[other.label] = max(errors.values())
        for name, error in errors.items():
            kind = name.split()[0]
            if other.name == reference.name:
                known = noise.get((other.dtype, kind), 0.0)
                noise[other.dtype, kind] = max(known, error)
        for name, error in errors.items():
            kind = name.split()[0]
            limit = tolerance if kind == 'output' else gradient_tolerance
            limit += 2 * noise.get((other.dtype, kind), 0.0)
            if not error <= limit:
                wrong.append((error, f'{other.label}, {name}', limit))
    if wrong:
        wrong = sorted(wrong, reverse=True)
        lines = [f'{n}: {e:.1e}, allowed {m:.1e}' for e, n, m in wrong[:10]]
        raise GateError(
            f'no timings, since {len(wrong)} results differ from the '
            'reference, the worst first:\n  ' + '\n  '.join(lines)
        )
    return largest


def time_in_turns(
    implementations: Sequence,
    modes: Sequence[str],
    repeats: int,
    budget: float = float('inf'),
    clock: str = 'wall',
    pause: float = 0.0,
) -> dict[str, dict[str, list[float]]]:
    """Time implementations in turns, in a random order each round.

    Args:
        implementations (Sequence): With ``label`` and ``time(modes, clock)``.
        modes (Sequence[str]): See :meth:`Implementation.time`.
        repeats (int): Rounds that count, after a warm-up round.
        budget (float): Seconds after which no further round is begun, once
            three count. Defaults to no limit.
        clock (str): 'wall' or 'process'. Defaults to 'wall'.
        pause (float): Seconds before each turn, in which idle threads of
            other processes stop spinning. Defaults to 0.

    Returns:
        dict[str, dict[str, list[float]]]: By label and mode the seconds of
        all rounds that count.
    """
    order, shuffle = list(implementations), random.Random(0).shuffle
    seconds = {each.label: {} for each in implementations}
    start = time.perf_counter()
    for number in range(repeats + 1):
        shuffle(order)
        for each in order:
            time.sleep(pause)
            for mode, value in each.time(modes, clock).items():
                if number:
                    seconds[each.label].setdefault(mode, []).append(value)
        if number >= 3 and time.perf_counter() - start > budget:
            break
    return seconds


def peak_memory(function: Callable, device: torch.device) -> int:
    """Bytes that a call allocates at its worst moment.

    On a CPU these are PyTorch's allocations, without the work space of the
    libraries below it.
    """
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as record:
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


def free_memory(device: torch.device) -> float:
    """Free bytes of a device; infinite where that is unknown."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open('/proc/meminfo') as file:
        for line in file:
            if line.startswith('MemAvailable'):
                return 1024 * int(line.split()[1])
    return float('inf')
