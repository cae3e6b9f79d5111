"""Metadata of exported files, for a runtime without a config."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, Union

from torch import nn

from lors_plugin.build import test_pipeline
from lors_plugin.deploy.images import IGNORED, Pipeline
from lors_plugin.utils import type_name
from lors_plugin.version import __version__


def describe(
    cfg: Mapping,
    module: nn.Module,
    config: Union[str, Path],
    checkpoint: Optional[Union[str, Path]] = None,
    dataset_meta: Optional[Mapping] = None,
    **more: Any,
) -> dict[str, Any]:
    """Collect the metadata of a file.

    Args:
        cfg (Config | dict): The whole config.
        module (nn.Module): What is exported.
        config (str | Path): The file of the config.
        checkpoint (str | Path, optional): That of the weights.
        dataset_meta (Mapping, optional): Of the checkpoint; its classes come
            first.
        **more: Further entries.

    Returns:
        dict: Texts, numbers and lists.
    """
    said = dataset_meta or cfg.get('metainfo') or {}
    normalize = module.normalize
    flat = {
        name: None if value is None else value.flatten().tolist()
        for name, value in normalize.named_buffers()
    }
    preprocessor = module.model.data_preprocessor
    raw = normalize.kind != 'normalized'
    return dict(
        producer=f'lors_plugin {__version__}',
        version=__version__,
        config=Path(config).name,
        checkpoint='' if checkpoint is None else Path(checkpoint).name,
        checkpoint_sha256='' if checkpoint is None else _sha256(checkpoint),
        classes=list(said.get('classes') or said.get('CLASSES') or ()),
        pipeline=describe_pipeline(test_pipeline(cfg)),
        test_cfg=_plain(cfg['model'].get('test_cfg') or {}),
        input=normalize.kind,
        channel_order='RGB' if raw else normalize.order,
        normalized_in_file='yes' if raw else 'no',
        mean=flat.get('mean'),
        std=flat.get('std'),
        size_divisor=getattr(preprocessor, 'pad_size_divisor', 1),
        pad_value=float(getattr(preprocessor, 'pad_value', 0) or 0),
        **more,
    )


def describe_pipeline(steps: Sequence[Mapping]) -> Union[list[dict], str]:
    """Describe how images are read and resized.

    Args:
        steps (Sequence[dict]): A test pipeline.

    Returns:
        list[dict] | str: The steps for
        :class:`lors_plugin.deploy.images.Pipeline`, or why it cannot do
        what they say.
    """
    if not steps:
        return 'the config has no test pipeline, so no size for images'
    plain = []
    for step in steps:
        kind = type_name(step['type'])
        if kind in IGNORED:
            continue
        options = {k: v for k, v in step.items() if k != 'backend_args'}
        plain.append(_plain({**options, 'type': kind}))
    try:
        Pipeline(plain)
    except ValueError as error:
        return (
            f'{error} to lors_plugin.deploy.runtime; prepare images by the '
            "config's test pipeline, and run the file by ONNX Runtime or "
            'OpenVINO itself'
        )
    return plain


def _plain(value: Any) -> Any:
    """Turn parts of a config into what JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return type_name(value)


def _sha256(path: Union[str, Path]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
