"""Write a model as an ONNX file, and compare such files with PyTorch."""

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor, nn

OLDEST_OPSET, OPSET = 16, 17
FLOOR = 1e-6  # of pixels and scores
FLOAT_FLOOR, TINY = 1e-3, 1e-30


class ExportError(RuntimeError):
    """A model that cannot be exported, or not rightly."""


def export_file(
    module: nn.Module,
    inputs: Sequence[Tensor],
    opset: int = OPSET,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    metadata: Optional[dict] = None,
) -> bytes:
    """Export a module; nothing is written to a disk.

    By TorchScript, which is what PyTorch 2.4 to 2.14 do alike; the newer
    exporter took a minute and more for a decoder of six stages.

    Args:
        module (nn.Module): :class:`ClassifierForExport` or
            :class:`DetectorForExport`, in evaluation mode.
        inputs (Sequence[Tensor]): What it is traced with.
        opset (int): Of ONNX. Defaults to 17.
        dynamic_batch (bool): Whether the number of images stays open.
        dynamic_size (bool): Whether their height and width stay open.
        metadata (dict, optional): Written into the file; values that are no
            strings as JSON.

    Returns:
        bytes: The file.

    Raises:
        ExportError: If PyTorch cannot express the model in ONNX.
    """
    onnx = _imported('onnx')
    if opset < OLDEST_OPSET:
        raise ExportError(f'opset {opset}: at least {OLDEST_OPSET} is needed')
    axes = {}
    for name in (*module.inputs, *module.outputs):
        axes[name] = {0: 'batch'} if dynamic_batch else {}
    if dynamic_size:
        axes['images'] = {**axes['images'], 2: 'height', 3: 'width'}
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # Of the checks of shapes, which hold for all images or for none.
        warnings.simplefilter('ignore')
        try:
            torch.onnx.export(
                module,
                tuple(inputs),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=list(module.inputs),
                output_names=list(module.outputs),
                dynamic_axes={k: v for k, v in axes.items() if v},
            )
        except (RuntimeError, ValueError, TypeError) as error:
            text = str(error).strip().split('\n')[0]
            raise ExportError(
                f'PyTorch cannot export the model: {text}'
            ) from error
    content = onnx.load_from_string(file.getvalue())
    sizes = getattr(module, 'known_sizes', {})
    for entry in content.graph.output:
        for index, size in sizes.get(entry.name, {}).items():
            entry.type.tensor_type.shape.dim[index].dim_value = size
    for key, value in (metadata or {}).items():
        entry = content.metadata_props.add()
        entry.key = key
        entry.value = value if isinstance(value, str) else json.dumps(value)
    onnx.checker.check_model(content)
    return content.SerializeToString()


def write_file(content: bytes, path: Union[str, Path]) -> None:
    """Write beside the place, then rename; a crash leaves what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def new_session(
    content: Union[bytes, str, Path], threads: Optional[int] = None
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        content (bytes | str | Path): A file or what is in it.
        threads (int, optional): By default ONNX Runtime's choice.

    Returns:
        onnxruntime.InferenceSession: The session.
    """
    runtime = _imported('onnxruntime')
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    if not isinstance(content, bytes):
        content = str(content)
    return runtime.InferenceSession(
        content, options, providers=['CPUExecutionProvider']
    )


def run(session: Any, inputs: Sequence[Tensor]) -> list[np.ndarray]:
    """Run a session on tensors, in the order of its inputs."""
    names = [entry.name for entry in session.get_inputs()]
    values = [tensor.numpy() for tensor in inputs]
    return session.run(None, dict(zip(names, values)))


def check_file(
    content: Union[bytes, str, Path],
    cases: Sequence[tuple],
    tolerance: float,
) -> float:
    """Compare what ONNX Runtime computes with what PyTorch did.

    Args:
        content (bytes | str | Path): A file or what is in it.
        cases (Sequence[tuple]): Inputs and wanted outputs, two sequences of
            tensors each.
        tolerance (float): Largest allowed error, see :func:`compare`.

    Returns:
        float: The largest error of all cases.

    Raises:
        ExportError: If one is larger, or ONNX Runtime cannot run a case.
    """
    session = new_session(content)
    names = [entry.name for entry in session.get_outputs()]
    worst = 0.0
    for inputs, wanted in cases:
        shape = ' x '.join(map(str, inputs[0].shape))
        try:
            found = run(session, inputs)
        except Exception as error:
            # Errors of ONNX Runtime have no common base below Exception.
            text = str(error).strip().split('\n')[0]
            raise ExportError(
                f'ONNX Runtime cannot run images {shape}: {text}'
            ) from error
        wanted = [tensor.numpy() for tensor in wanted]
        error = compare(dict(zip(names, found)), dict(zip(names, wanted)))
        if not error <= tolerance:
            raise ExportError(
                f'images {shape}: results differ from PyTorch by {error:.1e}, '
                f'{tolerance:.1e} is allowed'
            )
        worst = max(worst, error)
    return worst


def compare(found: dict, wanted: dict) -> float:
    """The largest error of any output, infinite where it is of another kind.

    Detections are compared as sets, since those of the same score have no
    order: errors of boxes are relative to the largest coordinate, those of
    scores to the best score. The last detection may be another one, if its
    score is the same. Other outputs are
    compared relative to how much they differ among themselves.

    Args:
        found, wanted (dict[str, np.ndarray]): Outputs by name.

    Returns:
        float: The error.
    """
    for name, value in wanted.items():
        if name not in found or found[name].shape != value.shape:
            return float('inf')
        if not np.isfinite(found[name]).all():
            return float('inf')
    if 'boxes' in wanted:
        images = range(len(wanted['boxes']))
        return max(
            (
                _detections(
                    {k: v[i] for k, v in found.items()},
                    {k: v[i] for k, v in wanted.items()},
                )
                for i in images
            ),
            default=0.0,
        )
    return max(_spread(found[name], value) for name, value in wanted.items())


def _spread(found: np.ndarray, wanted: np.ndarray) -> float:
    wanted = wanted.astype(np.float64)
    scale = np.abs(wanted - wanted.mean()).max(initial=0.0)
    # Values that are nearly alike differ by rounding, however little.
    scale += FLOAT_FLOOR * np.abs(wanted).max(initial=0.0) + TINY
    return float(np.abs(found - wanted).max(initial=0.0) / scale)


def _detections(found: dict, wanted: dict) -> float:
    """Match each detection with the nearest of its label, both ways."""
    if not len(wanted['scores']):
        return 0.0
    scale = np.abs(wanted['boxes']).max() + FLOOR
    best = wanted['scores'].max() + FLOOR
    boxes = np.abs(found['boxes'][:, None] - wanted['boxes'][None]).max(-1)
    scores = np.abs(found['scores'][:, None] - wanted['scores'][None])
    errors = np.maximum(boxes / scale, scores / best)
    errors[found['labels'][:, None] != wanted['labels'][None]] = np.inf
    worst = 0.0
    for axis, side in ((0, wanted), (1, found)):
        nearest = errors.min(axis=axis)
        # Which of two with nearly the same score came last is nobody's
        # choice: there the difference of scores counts.
        last = side['scores'].argmin()
        lowest = min(found['scores'].min(), wanted['scores'].min())
        excess = (side['scores'][last] - lowest) / best
        nearest[last] = min(nearest[last], excess)
        worst = max(worst, nearest.max())
    return float(worst)


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ExportError(
            f'{name} is missing: pip install onnx onnxruntime'
        ) from error
