"""Write a model as an ONNX file, and compare such files with PyTorch."""

import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn

from lors_plugin.checkpoints.files import replace_file
from lors_plugin.deploy.engines import (
    CHECKSUM,
    NO_CHECKSUM,
    OnnxRuntimeEngine,
    checksum,
)

from .check import ExportError, check
from .sampling import sampled_by

OLDEST_OPSET, OPSET = 16, 17


def export_file(
    module: nn.Module,
    inputs: Sequence[Tensor],
    opset: int = OPSET,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    metadata: Optional[dict] = None,
    sampling: str = 'gather',
) -> bytes:
    """Export a module; nothing is written to a disk.

    By TorchScript, which PyTorch 2.4 to 2.14 do alike; the newer exporter
    took a minute and more for a decoder of six stages.

    Args:
        module (nn.Module): :class:`ClassifierForExport` or
            :class:`DetectorForExport`, in evaluation mode.
        inputs (Sequence[Tensor]): It is traced with these.
        opset (int): Of ONNX. Defaults to 17.
        dynamic_batch (bool): Whether the number of images stays open.
        dynamic_size (bool): Whether their height and width stay open.
        metadata (dict, optional): Written into the file; values that are no
            strings as JSON. A checksum is added.
        sampling (str): How AdaMixer reads features: 'gather' or
            'grid_sample'. Defaults to 'gather'.

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
        axes[name].update(getattr(module, 'open_sizes', {}).get(name, {}))
    if dynamic_size:
        axes['images'] = {**axes['images'], 2: 'height', 3: 'width'}
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings(), sampled_by(sampling):
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
    onnx.checker.check_model(content)
    return with_metadata(content, metadata or {})


def with_metadata(model: Any, metadata: dict) -> bytes:
    """Write metadata and the checksum into a model.

    Args:
        model (onnx.ModelProto): What it holds of these is replaced.
        metadata (dict): Values that are no strings are written as JSON.

    Returns:
        bytes: The file.
    """
    del model.metadata_props[:]
    for key, value in {**metadata, CHECKSUM: NO_CHECKSUM}.items():
        entry = model.metadata_props.add()
        entry.key = key
        entry.value = value if isinstance(value, str) else json.dumps(value)
    entry.value = checksum(model.SerializeToString())
    return model.SerializeToString()


def write_file(content: bytes, path: Union[str, Path]) -> None:
    """Write a file whole or not at all."""
    with replace_file(path) as beside:
        beside.write_bytes(content)


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
    _imported('onnxruntime')
    return OnnxRuntimeEngine(content, threads).session


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
        tolerance (float): Largest allowed error, as a share of the largest
            value of an output; of detections see
            :func:`lors_plugin.reparam.compare.detections_difference`.

    Returns:
        float: The largest error of all cases.

    Raises:
        ExportError: If one is larger, or ONNX Runtime cannot run a case.
    """
    _imported('onnxruntime')
    return check(OnnxRuntimeEngine(content), cases, tolerance)


def onnx_model(content: bytes) -> Any:
    """Read an ONNX file as ``onnx.ModelProto``."""
    return _imported('onnx').load_from_string(content)


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ExportError(
            f'{name} is missing: pip install onnx onnxruntime'
        ) from error
