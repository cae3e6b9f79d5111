"""ONNX Runtime and OpenVINO behind one interface, and what a file says."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np

ENGINES = ('onnxruntime', 'openvino')
CHECKSUM = 'checksum'
NO_CHECKSUM = '0' * 64
JSON_KEYS = (
    'classes',
    'mean',
    'pad_value',
    'pipeline',
    'shape',
    'size_divisor',
    'std',
    'test_cfg',
)
# The place of the metadata in a file of OpenVINO.
SECTION = 'lors_plugin'


class OnnxRuntimeEngine:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        path (str | Path | bytes): A file, or what is in it.
        threads (int, optional): By default one per core.
    """

    name = 'ONNX Runtime'

    def __init__(
        self, path: Union[str, Path, bytes], threads: Optional[int] = None
    ) -> None:
        content = path if isinstance(path, bytes) else str(path)
        onnxruntime = _imported('onnxruntime')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=['CPUExecutionProvider']
            )
        except Exception as error:
            # Errors of ONNX Runtime have no common base below Exception.
            raise _unreadable(path, error) from error
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        self.shapes = {
            entry.name: tuple(
                size if isinstance(size, int) else None for size in entry.shape
            )
            for entry in self.session.get_inputs()
        }
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs; any number of threads may call this."""
        return dict(
            zip(self.outputs, self.session.run(self.outputs, dict(inputs)))
        )


class OpenVINOEngine:
    """An ONNX file, or one of OpenVINO, in OpenVINO, on the CPU.

    It computes in float32 what is float32 in the file. Left to itself,
    OpenVINO takes bfloat16 where the processor has it.

    Args:
        path (Path): The file, ``.onnx`` or ``.xml``.
        threads (int, optional): By default one per core.
    """

    name = 'OpenVINO'

    def __init__(self, path: Path, threads: Optional[int] = None) -> None:
        openvino = _imported('openvino')
        core = openvino.Core()
        config = dict(INFERENCE_PRECISION_HINT='f32')
        if threads is not None:
            config['INFERENCE_NUM_THREADS'] = threads
        try:
            model = core.read_model(str(path))
            # OpenVINO gives the thread that compiles an alternate signal
            # stack, which goes with the model wherever that is released: the
            # next signal would end the process. So that thread ends here.
            with ThreadPoolExecutor(1) as pool:
                compile_model = pool.submit(
                    core.compile_model, model, 'CPU', config
                )
            self.compiled = compile_model.result()
        except Exception as error:
            # RuntimeError, or what the frontend of the format raises.
            raise _unreadable(path, error) from error
        section = SECTION if path.suffix == '.xml' else 'framework'
        self.metadata = {}
        if model.has_rt_info(section):
            self.metadata = {
                key: str(value)
                for key, value in model.get_rt_info(section).value.items()
            }
        self.shapes = {
            entry.any_name: tuple(
                None if size.is_dynamic else size.get_length()
                for size in entry.partial_shape
            )
            for entry in model.inputs
        }
        self.outputs = [entry.any_name for entry in model.outputs]
        self.local = threading.local()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs; any number of threads may call this."""
        if not hasattr(self.local, 'request'):
            self.local.request = self.compiled.create_infer_request()
        found = self.local.request.infer(dict(inputs))
        return {name: found[name].copy() for name in self.outputs}


def open_engine(
    path: Union[str, os.PathLike],
    engine: Optional[str] = None,
    threads: Optional[int] = None,
) -> Union[OnnxRuntimeEngine, OpenVINOEngine]:
    """Open a file.

    Args:
        path (str | Path): ``.onnx``, or ``.xml`` with its ``.bin``.
        engine (str, optional): 'onnxruntime' or 'openvino'. By default what
            the ending says.
        threads (int, optional): By default one per core.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the engine is not installed.
        ValueError: If the engine cannot read the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {path}')
    if engine is None:
        engine = 'openvino' if path.suffix == '.xml' else 'onnxruntime'
    if engine not in ENGINES:
        raise ValueError(f'engine={engine!r} must be one of {ENGINES}')
    if threads is not None and threads < 1:
        raise ValueError(f'threads={threads} must be at least 1')
    if engine == 'onnxruntime' and path.suffix == '.xml':
        raise ValueError(
            f'{path} is a file of OpenVINO: engine="openvino" opens it'
        )
    if path.suffix == '.pt2':
        raise ValueError(
            f'{path} is a package of torch.export: torch.export.load opens it'
        )
    kinds = dict(zip(ENGINES, (OnnxRuntimeEngine, OpenVINOEngine)))
    return kinds[engine](path, threads)


def checksum(*contents: bytes) -> str:
    """Compute the checksum of a file that holds it.

    SHA-256 of the content where the checksum itself is replaced by as many
    zeros.

    Args:
        contents (bytes): Of the files of a model, with :data:`NO_CHECKSUM`
            where the checksum belongs.
    """
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def verify(path: Union[str, os.PathLike], metadata: Mapping) -> None:
    """Check that a file is as it was when it was written.

    Args:
        path (str | Path): ``.onnx``, or ``.xml`` with its ``.bin``.
        metadata (Mapping): What the file says.

    Raises:
        ValueError: If it has changed.
    """
    path = Path(path)
    said = metadata[CHECKSUM]
    contents = [path.read_bytes()]
    if path.suffix == '.xml':
        contents.append(path.with_suffix('.bin').read_bytes())
    contents[0] = contents[0].replace(said.encode(), NO_CHECKSUM.encode())
    if checksum(*contents) != said:
        raise ValueError(
            f'{path} is not as it was exported: a damaged copy, or changed by '
            'another tool; verify=False opens it all the same'
        )


def read_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read what :mod:`lors_plugin.export` wrote.

    Args:
        metadata (Mapping): Texts, some of them JSON.
    """
    found = dict(metadata)
    for key in JSON_KEYS:
        # A pipeline that is not known here is a sentence about it.
        with contextlib.suppress(KeyError, ValueError, RecursionError):
            found[key] = json.loads(metadata[key])
    return found


def _imported(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f'{name} is missing: pip install {name}') from error


def _unreadable(path: Any, error: Exception) -> ValueError:
    text = str(error).strip().split('\n')[0]
    path = f'{len(path)} bytes' if isinstance(path, bytes) else path
    return ValueError(f'{path} cannot be opened: {text}')
