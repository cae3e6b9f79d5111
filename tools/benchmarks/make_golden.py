"""Make a golden of a whole R50 detector at full size.

    python tools/benchmarks/make_golden.py lors work_dirs/lors_r50.npz
    python tools/analysis_tools/check_golden.py work_dirs/lors_r50.npz

The original programs' formulation of the decoder runs on weights by rule and
one image of noise. The file holds its inputs, stages, losses, detections and
the norm of the gradient of each weight; the names of the weights lie beside
it in NAME.keys.json. `--formulation reference` takes the readable
implementation of this package instead. Gradients of float32 programs differ
by their noise, at this size by up to 1e-2; `--dtype float64` makes a file that
is compared in float64, to 1e-12.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from original import as_original

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.checkpoints import guess_source, to_original
from lors_plugin.checkpoints.key_map import CONSTANT_KEY
from lors_plugin.testing import Golden
from lors_plugin.testing.golden_detector import (
    build_detector,
    data_samples,
    run_detector,
)

GOLDENS = Path(__file__).resolve().parents[2] / 'tests' / 'data' / 'goldens'
R50 = dict(depth=50, inc=[256, 512, 1024, 2048], D=256, F=256, ff=2048)
R50.update(S=6, N=100, C=80, Pout=128, heads=8)
CONFIGS = dict(
    adamixer=dict(R50, G=4, Pin=32),
    lors=dict(
        R50,
        G=2,
        Pin=64,
        ranks=[16] * 6,
        groups=[1, 1, 2, 2, 3, 3],
        mr=[8] * 6,
    ),
)


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('model', choices=sorted(CONFIGS))
    parser.add_argument('out', type=Path, metavar='FILE.npz')
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        default=(800, 1344),
        help='of the image, multiples of 32 (default: 800 1344)',
    )
    parser.add_argument(
        '--formulation', choices=('original', 'reference'), default='original'
    )
    parser.add_argument(
        '--dtype', choices=('float32', 'float64'), default='float32'
    )
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args(argv)


def make_inputs(config, size, seed, boxes=7):
    """An image of noise, in a padded frame, with boxes of each size."""
    rng = np.random.default_rng(seed)
    height, width = size
    shape = np.array([[height - height // 16, width - width // 16, 3]])
    frame = shape[0, [1, 0]]
    sizes = rng.uniform(0.05, 0.6, (boxes, 2)) * frame
    corners = rng.uniform(0, 1, (boxes, 2)) * (frame - sizes)
    return dict(
        img=rng.standard_normal((1, 3, height, width)).astype(np.float32),
        img_shapes=shape,
        gt_boxes0=np.hstack([corners, corners + sizes]).astype(np.float32),
        gt_labels0=rng.integers(config['C'], size=boxes),
        seed=np.array(seed),
        config=np.array(json.dumps(dict(config, hw=list(size)))),
    )


def make_golden(out, config, keys, size, formulation, dtype, seed):
    """Run a detector and write what it computes.

    Args:
        out (Path): The file to write.
        config (dict): As in the goldens of detectors.
        keys (dict): Shape, kind and scale of each original weight.
        size (Sequence[int]): Height and width of the image.
        formulation (str): 'original' or 'reference'.
        dtype (torch.dtype): To compute in.
        seed (int): Of weights and inputs.
    """
    os.environ['LORS_PLUGIN_BACKEND'] = 'reference'
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix('.keys.json').write_text(json.dumps(keys))
    inputs = make_inputs(config, size, seed)
    np.savez(out, **inputs, total_loss=0)  # a detector, to be built
    golden = Golden(out)
    model = build_detector(golden).to(dtype)
    replaced = formulation == 'original'
    with as_original(model.decoder) if replaced else contextlib.nullcontext():
        found = run_detector(
            model,
            golden.tensor('img').to(dtype),
            data_samples(golden, dtype),
        )
    # Neither frozen weights nor the positions of queries have a gradient.
    trained = {
        key: weight.grad
        for key, weight in model.named_parameters()
        if weight.grad is not None
    }
    grads = to_original(trained, guess_source(keys), check_backbone=False)
    norms = {
        key: grad.double().norm().item()
        for key, grad in grads.items()
        if key != CONSTANT_KEY
    }
    values = {
        name: value.numpy() if value.dim() else np.float64(value.item())
        for name, value in found.items()
    }
    np.savez(out, **inputs, **values, grad_norms=json.dumps(norms))


def main(argv=None):
    """Make a file."""
    args = parse_args(argv)
    keys = GOLDENS / f'keys_{args.model}_r50_100q.json'
    make_golden(
        args.out,
        CONFIGS[args.model],
        json.loads(keys.read_text()),
        args.size,
        args.formulation,
        getattr(torch, args.dtype),
        args.seed,
    )


if __name__ == '__main__':
    main()
