"""Write a model as a package of ``torch.export``."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Optional

import numpy as np
import torch
from torch import Tensor, nn

from lors_plugin.deploy.engines import CHECKSUM

from .check import ExportError

METADATA = 'metadata.json'


def torch_file(
    module: nn.Module,
    inputs: Sequence[Tensor],
    metadata: Optional[dict] = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
) -> bytes:
    """Export a module by ``torch.export``; nothing is written to a disk.

    Args:
        module (nn.Module): :class:`ClassifierForExport` or
            :class:`DetectorForExport`, in evaluation mode.
        inputs (Sequence[Tensor]): It is traced with these.
        metadata (dict, optional): Becomes the extra file ``metadata.json``.
        dynamic_batch (bool): Whether the number of images stays open.
        dynamic_size (bool): Whether their height and width stay open.

    Returns:
        bytes: A file for ``torch.export.load``.

    Raises:
        ExportError: If ``torch.export`` cannot follow the model.
    """
    auto = torch.export.Dim.AUTO
    axes = [{0: auto} if dynamic_batch else {} for _ in inputs]
    if dynamic_size:
        axes[0].update({2: auto, 3: auto})
    file = io.BytesIO()
    try:
        with torch.no_grad():
            program = torch.export.export(
                module,
                tuple(inputs),
                dynamic_shapes=dict(zip(module.inputs, axes)),
                strict=False,
            )
    except Exception as error:
        # Errors of PyTorch's compiler have no common base below Exception.
        text = str(error).strip().split('\n')[0]
        raise ExportError(
            f'torch.export cannot follow the model: {text}'
        ) from error
    said = {**(metadata or {}), 'outputs': list(module.outputs)}
    torch.export.save(program, file, extra_files={METADATA: json.dumps(said)})
    return file.getvalue()


class TorchEngine:
    """A package of ``torch.export``, with the interface of other engines.

    Args:
        content (bytes): What is in the file.
    """

    name = 'PyTorch'

    def __init__(self, content: bytes) -> None:
        extra = {METADATA: ''}
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        said = json.loads(extra[METADATA])
        self.outputs = said.pop('outputs')
        # Files of PyTorch have checksums of their own.
        self.metadata = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in {**said, CHECKSUM: ''}.items()
        }
        self.module = program.module()
        names = program.graph_signature.user_inputs
        shapes = [
            node.meta['val'].shape
            for node in program.graph.nodes
            if node.op == 'placeholder' and node.name in names
        ]
        self.shapes = {
            name: tuple(n if isinstance(n, int) else None for n in shape)
            for name, shape in zip(names, shapes)
        }

    @torch.no_grad()
    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute all outputs."""
        found = self.module(*map(torch.from_numpy, inputs.values()))
        return {
            name: value.numpy() for name, value in zip(self.outputs, found)
        }
