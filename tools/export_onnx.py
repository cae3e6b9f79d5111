"""Export a classifier or an AdaMixer or LORS-AdaMixer as an ONNX file.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx [--images *.jpg]

The file takes RGB images from 0 to 255 (normalising is part of it), any
number of them and, unless the model is a Swin, of any size. Before it is
written, ONNX Runtime runs it at other numbers and sizes than it was made
with, and the outputs are compared with PyTorch, on real images too where they
are given. Above the tolerance nothing is written and the exit code is 1; 2
means a mistake in the command or the config. docs/en/user_guides/export.md
describes inputs and outputs.
"""

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

import torch
from mmengine.config import DictAction

import lors_plugin  # noqa: F401 - first: it makes mmcv.ops importable
from lors_plugin.adamixer import AdaMixer
from lors_plugin.build import (
    build_model,
    image_channels,
    is_detector,
    load_config,
    padded_shape,
    test_pipeline,
    test_shape,
    without_pretrained,
)
from lors_plugin.checkpoints import load_checkpoint_file, weights_of
from lors_plugin.compat import read_safely
from lors_plugin.export import (
    ClassifierForExport,
    DetectorForExport,
    ExportError,
    check_file,
    export_file,
    for_export,
    takes_one_size,
    write_file,
)
from lors_plugin.export.cases import (
    classifier_case,
    detector_case,
    random_images,
)
from lors_plugin.export.grid_sample import SAMPLING
from lors_plugin.export.metadata import describe
from lors_plugin.export.models import INPUTS
from lors_plugin.utils import type_name

EXIT_DIFFERENT, EXIT_USER_ERROR = 1, 2
RANDOM = 'none'


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('config', help='config file; mmpretrain::... names a host package')
    add(
        'checkpoint',
        help=f'trained weights; {RANDOM} for random ones, to try speed',
    )
    add('out', help='the file to write')
    add(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='height and width of the images to export with, or one number '
        "for both (default: from the config's test pipeline)",
    )
    add(
        '--input',
        choices=INPUTS,
        default='float',
        help='float: RGB from 0 to 255 as float32 (default); uint8: the same '
        "as bytes; normalized: what the config's data preprocessor makes",
    )
    add('--opset', type=int, default=17, help='(default: %(default)s)')
    add(
        '--fixed-size',
        action='store_true',
        help='height and width are those of --shape; the number of images '
        'stays open',
    )
    add(
        '--static',
        action='store_true',
        help='one image of --shape and nothing else',
    )
    add(
        '--sampling',
        choices=SAMPLING,
        default='gather',
        help='how AdaMixer reads features (default: %(default)s); '
        'grid_sample needs a runtime that is right there, TensorRT was not',
    )
    add(
        '--check',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='compare with PyTorch in ONNX Runtime (default: yes)',
    )
    add(
        '--tolerance',
        type=float,
        default=1e-3,
        help='largest error, relative to the largest coordinate and the best '
        'score of detections, or to the largest logit (default: %(default)s)',
    )
    add(
        '--images',
        nargs='+',
        default=[],
        metavar='FILE',
        help='real images to compare on too',
    )
    add(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config',
    )
    add(
        '--trust',
        action='store_true',
        help='allow CHECKPOINT to run code of its own while it is read',
    )
    args = parser.parse_args(argv)
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error('--shape is one or two numbers of at least 1')
    if args.images and not args.check:
        parser.error('--images is for the comparison, which --no-check omits')
    return args


def load_model(cfg, args):
    """Build the model and load its weights, strictly.

    Returns:
        tuple: The model and the meta data of the checkpoint.
    """
    cfg.model = without_pretrained(cfg.model)
    model = build_model(cfg)
    if args.checkpoint == RANDOM:
        model.init_weights()
        return model.eval(), {}
    content = load_checkpoint_file(args.checkpoint, args.trust)
    weights = weights_of(content, path=args.checkpoint)
    why = ''
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).strip().split('\n')]
        why = ' '.join(lines[1:3])
    else:
        # Hosts take out of a checkpoint what they compute anew, as Swin V2.
        missing = [name for name in missing if name not in weights]
        if missing or unknown:
            kind = 'has no' if missing else 'has'
            why = f'it {kind} {(missing or unknown)[0]}'
    if why:
        raise ValueError(
            f'{args.checkpoint} does not fit {args.config}: {why}; adapters '
            'in files of their own: merge first by tools/reparam.py'
        )
    return model.eval(), content.get('meta') or {}


def wrap(model, kind):
    """Return the module to export, and a function that makes cases for it."""
    if isinstance(model, AdaMixer):
        module = DetectorForExport(for_export(model), kind)
        return module, lambda images: detector_case(model, images, kind)
    if is_detector(model) or not hasattr(model, 'head'):
        raise ValueError(
            f'{type(model).__name__} is neither a classifier nor an AdaMixer; '
            'other detectors of MMDetection are not exported by this tool'
        )
    module = ClassifierForExport(for_export(model), kind)
    return module, lambda images: classifier_case(
        model, images, kind, module.several
    )


def read_image(path, cfg):
    """Read an image by the test pipeline: BGR, uint8, (channels, H, W)."""
    from mmcv.transforms import Compose
    from mmengine.registry import DefaultScope

    if not Path(path).is_file():
        raise FileNotFoundError(f'the image {path} does not exist')
    steps = [
        step
        for step in test_pipeline(cfg)
        if 'Annotations' not in type_name(step['type'])
    ]
    if not steps:
        raise ValueError('--images: the config has no test pipeline')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        packed = Compose(steps)(dict(img_path=str(path), img_id=0))
    return packed['inputs'].to(torch.uint8)


def run_case(make_case, images):
    """Make a case; explain why the model does not take the images."""
    try:
        return make_case(images)
    except (AssertionError, RuntimeError) as error:
        height, width = images[0].shape[-2:]
        text = str(error).strip().split('\n')[0] or type(error).__name__
        raise ValueError(
            f'PyTorch cannot run the model on images of {height} x {width}: '
            f'{text}'
        ) from error


def random_case(make_case, number, shapes, channels):
    """Make a case of the first size that the model takes in PyTorch."""
    for shape in shapes:
        images = random_images(number, shape, number, channels)
        try:
            return run_case(make_case, images)
        except ValueError:
            if shape == shapes[-1]:
                raise


def make_cases(make_case, cfg, model, shape, args):
    """Make what to compare: other numbers, other sizes, real images."""
    height, width = shape
    wanted = [(1, [shape])]
    if not args.static:
        wanted.append((3, [shape]))
    if not args.fixed_size:
        # Odd ones, unless the model itself takes only round ones.
        wanted += [
            (2, [(height + 33, width + 95), (height + 32, width + 96)]),
            (3, [(width + 63, height + 1), (width + 64, height)]),
        ]
    channels = image_channels(model)
    try:
        cases = [random_case(make_case, *case, channels) for case in wanted]
    except ValueError as error:
        raise ValueError(
            f'{error}; --fixed-size makes a file for {height} x {width} alone'
        ) from error
    for path in args.images:
        image = read_image(path, cfg)
        size = padded_shape(model, tuple(image.shape[1:]))
        if size != shape and args.fixed_size:
            raise ValueError(
                f'{path} becomes {size} by the test pipeline, but the file '
                f'is for {shape}; set --shape'
            )
        cases.append(run_case(make_case, [image]))
    return cases


def export(args):
    """Export as the arguments say; return a sentence about it."""
    cfg = load_config(args.config, args.cfg_options)
    read_safely(args.trust)
    model, meta = load_model(cfg, args)
    one_size = takes_one_size(model)
    args.fixed_size |= args.static or one_size
    module, make_case = wrap(model, args.input)
    shape = tuple((args.shape * 2)[:2]) if args.shape else test_shape(cfg)
    shape = padded_shape(model, shape)
    number = 1 if args.static else 2
    channels = image_channels(model)
    inputs, _ = random_case(make_case, number, [shape], channels)
    metadata = describe(
        cfg,
        module,
        args.config,
        None if args.checkpoint == RANDOM else args.checkpoint,
        meta.get('dataset_meta'),
        shape=list(shape),
        sampling=args.sampling if 'boxes' in module.outputs else '',
    )
    content = export_file(
        module.eval(),
        inputs,
        args.opset,
        not args.static,
        not args.fixed_size,
        metadata,
        args.sampling,
    )
    text = 'not compared with PyTorch'
    if args.check:
        cases = make_cases(make_case, cfg, model, shape, args)
        error = check_file(content, cases, args.tolerance)
        text = f'largest error {error:.1e} in {len(cases)} comparisons'
    write_file(content, args.out)
    if one_size:
        text += (
            f', for images of {shape[0]} x {shape[1]} alone: the windows of '
            'Swin are exported for one size'
        )
    if isinstance(metadata['pipeline'], str):
        text += (
            '\nlors_plugin.deploy.runtime will refuse it: '
            + (metadata['pipeline'])
        )
    return f'{args.out}: {len(content) / 1e6:.1f} MB, {text}'


def main(argv=None):
    """Export; after an error nothing is written."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    try:
        # PyTorch prints the whole program where it cannot go on.
        with contextlib.redirect_stdout(io.StringIO()):
            text = export(args)
        print(text)
    except ExportError as error:
        hint = ''
        if args.checkpoint == RANDOM and 'differ' in str(error):
            hint = (
                '\nrandom weights can make much of rounding: compare with '
                'trained ones, or raise --tolerance'
            )
        elif not args.static and 'missing' not in str(error):
            hint = (
                '\nsome models write the size or the number of images into '
                'their program: try --fixed-size, then --static'
            )
        sys.stderr.write(f'error: {error}{hint}\nnothing was written\n')
        return EXIT_DIFFERENT
    except (ValueError, TypeError, KeyError, OSError, ImportError) as error:
        sys.stderr.write(f'error: {error}\nnothing was written\n')
        return EXIT_USER_ERROR
    return 0


if __name__ == '__main__':
    sys.exit(main())
