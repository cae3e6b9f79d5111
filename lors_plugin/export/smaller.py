"""Store or compute a model of ONNX in fewer bits."""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .check import ExportError

# Smaller ones are not worth a node each.
SMALLEST = 256


def with_half_weights(model: Any) -> Any:
    """Store weights as float16, which every engine turns back into float32.

    What is computed stays float32, but for the rounding of the weights.

    Args:
        model (onnx.ModelProto): Not changed.

    Returns:
        onnx.ModelProto: Of about half the size.

    Raises:
        ExportError: If a weight is too large for float16.
    """
    from onnx import TensorProto, helper, numpy_helper

    model = type(model).FromString(model.SerializeToString())
    graph, casts = model.graph, []
    for entry in graph.initializer:
        if entry.data_type != TensorProto.FLOAT:
            continue
        value = numpy_helper.to_array(entry)
        if value.size < SMALLEST:
            continue
        name, stored = entry.name, f'{entry.name}_half'
        with np.errstate(over='ignore'):
            half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise ExportError(
                f'the weight {name} is too large for float16: '
                f'{abs(value).max():.3g}'
            )
        entry.CopyFrom(numpy_helper.from_array(half, stored))
        casts.append(
            helper.make_node('Cast', [stored], [name], to=TensorProto.FLOAT)
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def quantize_convolutions(
    model: Any, inputs: Iterable[Mapping[str, np.ndarray]]
) -> Any:
    """Compute convolutions in INT8, by ONNX Runtime's static quantizer.

    Weights are scaled per channel and have seven bits, since products of
    eight overflow on processors without VNNI. Activations have eight bits.
    Linear layers and what is computed from queries stay float32.

    Args:
        model (onnx.ModelProto): Not changed.
        inputs (Iterable[dict]): Of the model, of images that are typical.

    Returns:
        onnx.ModelProto: With QuantizeLinear and DequantizeLinear around the
        convolutions.

    Raises:
        ExportError: If there is nothing to quantize, or no image.
    """
    import onnx

    try:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
    except ImportError as error:
        raise ExportError(
            f'{error}; --int8 needs it: pip install onnx onnxruntime'
        ) from error

    if not any(node.op_type == 'Conv' for node in model.graph.node):
        raise ExportError('the model has no convolutions to quantize')

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = iter(inputs)

        def get_next(self) -> Any:
            return next(self.inputs, None)

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'model.onnx')
            onnx.save(model, path)
            quantize_static(
                path,
                path.with_name('int8.onnx'),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=['Conv'],
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(path.with_name('int8.onnx'))
    finally:
        logging.root.setLevel(level)
