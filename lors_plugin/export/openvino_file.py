"""Write a model as files of OpenVINO."""

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from lors_plugin.deploy.engines import (
    CHECKSUM,
    NO_CHECKSUM,
    SECTION,
    checksum,
)

from .check import ExportError


def openvino_files(
    model: Any, metadata: dict, half: bool = False
) -> dict[str, bytes]:
    """Convert an ONNX model.

    Args:
        model (onnx.ModelProto | openvino.Model): Its own metadata is left
            out.
        metadata (dict): Values that are no strings are written as JSON. A
            checksum is added.
        half (bool): Whether weights are stored as float16; computed is in
            float32 all the same.

    Returns:
        dict[str, bytes]: What belongs into the files, by ending: ``.xml``
        and ``.bin``.

    Raises:
        ExportError: If OpenVINO does not take the model.
    """
    openvino = imported_openvino()
    if hasattr(model, 'metadata_props'):
        plain = type(model).FromString(model.SerializeToString())
        del plain.metadata_props[:]
        try:
            model = openvino.Core().read_model(
                io.BytesIO(plain.SerializeToString())
            )
        except RuntimeError as error:
            text = str(error).strip().split('\n')[0]
            raise ExportError(
                f'OpenVINO does not take the model: {text}'
            ) from error
    for key, value in {**metadata, CHECKSUM: NO_CHECKSUM}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.set_rt_info(text, [SECTION, key])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'model.xml')
        openvino.save_model(model, path, compress_to_fp16=half)
        structure = path.read_bytes()
        weights = path.with_suffix('.bin').read_bytes()
    said = checksum(structure, weights)
    structure = structure.replace(NO_CHECKSUM.encode(), said.encode(), 1)
    return {'.bin': weights, '.xml': structure}


def imported_openvino() -> Any:
    """Return the package, or say how to install it."""
    try:
        import openvino
    except ImportError as error:
        raise ExportError(
            'openvino is missing: pip install openvino'
        ) from error
    return openvino
