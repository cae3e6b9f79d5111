"""Compare what an engine computes with what PyTorch did."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lors_plugin.reparam.compare import detections_difference, difference


class ExportError(RuntimeError):
    """A model that cannot be exported, or not rightly."""


def check(engine: Any, cases: Sequence[tuple], tolerance: float) -> float:
    """Compare, and refuse what differs.

    Args:
        engine (OnnxRuntimeEngine | OpenVINOEngine | TorchEngine): With a
            model in it.
        cases (Sequence[tuple]): Inputs and wanted outputs, two sequences of
            tensors each, in the order of the model's.
        tolerance (float): Largest allowed error, as a share of the largest
            value of an output; of detections see
            :func:`lors_plugin.reparam.compare.detections_difference`.

    Returns:
        float: The largest error of all cases.

    Raises:
        ExportError: If one is larger, or the engine cannot run a case.
    """
    worst = 0.0
    for case in cases:
        error = _errors(engine, case)
        if not error <= tolerance:
            raise ExportError(
                f'images {_shape(case)}: results differ from PyTorch by '
                f'{error:.1e}, {tolerance:.1e} is allowed'
            )
        worst = max(worst, error)
    return worst


def without_results(cases: Sequence[tuple]) -> int:
    """Count cases whose wanted outputs are empty, which compare nothing."""
    return sum(
        not any(tensor.numel() for tensor in wanted) for _, wanted in cases
    )


def _errors(engine: Any, case: tuple) -> float:
    inputs, wanted = case
    named = zip(engine.shapes, (tensor.numpy() for tensor in inputs))
    try:
        found = engine.run(dict(named))
    except Exception as error:
        # Errors of engines have no common base below Exception.
        text = str(error).strip().split('\n')[0]
        raise ExportError(
            f'{engine.name} cannot run images {_shape(case)}: {text}'
        ) from error
    found = {name: torch.from_numpy(value) for name, value in found.items()}
    return _error(found, dict(zip(engine.outputs, wanted)))


def _shape(case: tuple) -> str:
    return ' x '.join(map(str, case[0][0].shape))


def _error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Measure the largest error of any output."""
    if 'boxes' in wanted:
        pair = [
            [dict(zip(side, image)) for image in zip(*side.values())]
            for side in (wanted, found)
        ]
        return detections_difference(*pair).relative
    return max(
        difference(name, value, found.get(name)).relative
        for name, value in wanted.items()
    )
