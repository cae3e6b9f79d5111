"""Export a classifier or an AdaMixer or LORS-AdaMixer as an ONNX file.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx [--images *.jpg]

The file takes RGB images from 0 to 255 (normalising is part of it) and any
number of them, of any size. Before it is written, ONNX Runtime runs it at
other numbers and sizes than it was made with, and what comes out is compared
with PyTorch, on real images too where they are given. Above the tolerance
nothing is written and the exit code is 1; 2 means a mistake in the command or
the config. docs/en/user_guides/export.md describes inputs and outputs.
"""

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path

from mmengine.config import Config, DictAction

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.export.models import INPUTS
from lors_plugin.export.sampling import KINDS

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
        choices=KINDS,
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
        help='largest error, relative to the longest side and the best score '
        'of detections, or to the spread of logits (default: %(default)s)',
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


def unfit(args, why):
    """An error that names what does not fit what."""
    return ValueError(
        f'{args.checkpoint} does not fit {args.config}: {why}; adapters: '
        'merge first by tools/reparam.py'
    )


def load_model(args):
    """Build the model and load its weights, strictly.

    Returns:
        tuple: The config, the model and the meta data of the checkpoint.
    """
    from lors_plugin.build import build_model
    from lors_plugin.checkpoints import load_checkpoint_file, weights_of
    from lors_plugin.compat import read_safely

    if '::' in args.config:
        from mmengine.hub import get_config

        cfg = get_config(args.config)
    else:
        cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    read_safely(args.trust)
    if cfg.get('model') is None:
        raise ValueError(f'{args.config} has no model')
    if 'data_preprocessor' in cfg:  # as the Runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if 'pretrained' in cfg.model:
        cfg.model.pretrained = None
    backbone = cfg.model.get('backbone') or {}
    backbone['init_cfg'] = None
    model = build_model(cfg)
    if args.checkpoint == RANDOM:
        model.init_weights()
        return cfg, model.eval(), {}
    content = load_checkpoint_file(args.checkpoint, args.trust)
    weights = weights_of(content, path=args.checkpoint)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).strip().split('\n')]
        raise unfit(args, ' '.join(lines[1:3])) from error
    # Hosts take out of a checkpoint what they compute anew, as Swin V2 does.
    missing = [name for name in missing if name not in weights]
    if missing or unknown:
        kind, name = ('has no', missing) if missing else ('has', unknown)
        raise unfit(args, f'it {kind} {name[0]}')
    return cfg, model.eval(), content.get('meta') or {}


def wrap(model, args):
    """The module to export, and what makes cases for it."""
    from lors_plugin.adamixer.detector import AdaMixer
    from lors_plugin.build import is_detector
    from lors_plugin.export import (
        ClassifierForExport,
        DetectorForExport,
        for_export,
    )
    from lors_plugin.export.cases import classifier_case, detector_case

    name = type(model).__name__
    if isinstance(model, AdaMixer):
        module = DetectorForExport(
            for_export(model, args.sampling), args.input
        )
        return module, lambda images: detector_case(model, images, args.input)
    if is_detector(model) or not hasattr(model, 'head'):
        raise ValueError(
            f'{name} is neither a classifier nor an AdaMixer; other detectors '
            'of MMDetection are not exported by this tool'
        )
    module = ClassifierForExport(for_export(model), args.input)
    return module, lambda images: classifier_case(
        model, images, args.input, module.several
    )


def channels_of(model):
    """Channels of the images: 1 for gray ones."""
    for module in model.backbone.modules():
        if hasattr(module, 'in_channels') and hasattr(module, 'kernel_size'):
            return module.in_channels
    return 3


def read_image(path, cfg):
    """An image as the test pipeline makes it: BGR, uint8, (3, H, W)."""
    import torch
    from mmcv.transforms import Compose
    from mmengine.registry import DefaultScope

    from lors_plugin.utils import type_name

    if not Path(path).is_file():
        raise FileNotFoundError(f'the image {path} does not exist')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    steps = [
        step
        for step in dataset.pipeline
        if 'Annotations' not in type_name(step['type'])
    ]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        packed = Compose(steps)(dict(img_path=str(path), img_id=0))
    return packed['inputs'].to(torch.uint8)


def run_case(make_case, images):
    """A case, or what the model has against the images in PyTorch."""
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
    """A case of the first size that the model takes in PyTorch."""
    from lors_plugin.export.cases import random_images

    for shape in shapes:
        images = random_images(number, shape, number, channels)
        try:
            return run_case(make_case, images)
        except ValueError:
            if shape == shapes[-1]:
                raise


def make_cases(make_case, cfg, model, shape, smallest, args):
    """What to compare: other numbers, other sizes, real images."""
    from lors_plugin.build import padded_shape

    height, width = shape
    wanted = [(1, [shape])]
    if not args.static:
        wanted.append((3, [shape]))
    if not (args.static or args.fixed_size):
        # Odd ones, unless the model itself takes only round ones.
        wanted += [
            (2, [(height + 33, width + 95), (height + 32, width + 96)]),
            (3, [(width + 63, height + 1), (width + 64, height)]),
        ]
        if smallest is not None:
            wanted.append((2, [smallest]))
    channels = channels_of(model)
    try:
        cases = [random_case(make_case, *case, channels) for case in wanted]
    except ValueError as error:
        raise ValueError(
            f'{error}; --fixed-size makes a file for {height} x {width} alone'
        ) from error
    for path in args.images:
        image = read_image(path, cfg)
        size = padded_shape(model, tuple(image.shape[1:]))
        if size != shape and (args.static or args.fixed_size):
            raise ValueError(
                f'{path} becomes {size} by the test pipeline, but the file '
                f'is for {shape}; set --shape'
            )
        cases.append(run_case(make_case, [image]))
    return cases


def describe(cfg, module, meta, shape, smallest, args):
    """What the file says about itself."""
    dataset_meta = meta.get('dataset_meta') or cfg.get('metainfo') or {}
    normalize = module.normalize
    flat = {
        name: None if value is None else value.flatten().tolist()
        for name, value in normalize.named_buffers()
    }
    preprocessor = module.model.data_preprocessor
    raw = normalize.kind != 'normalized'
    return dict(
        producer=f'lors_plugin {lors_plugin.__version__}',
        config=Path(args.config).name,
        classes=list(dataset_meta.get('classes') or ()),
        input=normalize.kind,
        channel_order='RGB' if raw else normalize.order,
        normalized_in_file='yes' if raw else 'no',
        mean=flat.get('mean'),
        std=flat.get('std'),
        shape=list(shape),
        smallest_shape=list(smallest or ()),
        size_divisor=getattr(preprocessor, 'pad_size_divisor', 1),
        sampling=args.sampling if 'boxes' in module.outputs else '',
    )


def export(args):
    """Do what the arguments say; return a sentence about it."""
    from lors_plugin.build import padded_shape, test_shape
    from lors_plugin.export import (
        check_file,
        export_file,
        smallest_shape,
        write_file,
    )

    cfg, model, meta = load_model(args)
    module, make_case = wrap(model, args)
    shape = tuple(args.shape or test_shape(cfg))
    shape = padded_shape(model, shape * 2 if len(shape) == 1 else shape)
    smallest = smallest_shape(module)
    if smallest and (shape[0] < smallest[0] or shape[1] < smallest[1]):
        raise ValueError(
            f'images of {shape[0]} x {shape[1]} are too small for the '
            f'windows of the model, which take {smallest[0]} x {smallest[1]} '
            'and larger; set --shape'
        )
    open_size = not (args.static or args.fixed_size)
    smallest = smallest if open_size else None
    number = 1 if args.static else 2
    inputs, _ = random_case(make_case, number, [shape], channels_of(model))
    content = export_file(
        module.eval(),
        inputs,
        args.opset,
        not args.static,
        open_size,
        describe(cfg, module, meta, shape, smallest, args),
    )
    text = 'not compared with PyTorch'
    if args.check:
        cases = make_cases(make_case, cfg, model, shape, smallest, args)
        error = check_file(content, cases, args.tolerance)
        text = f'largest error {error:.1e} in {len(cases)} comparisons'
    write_file(content, args.out)
    if smallest and max(smallest) > 1:
        text += f', for images of {smallest[0]} x {smallest[1]} and larger'
    return f'{args.out}: {len(content) / 1e6:.1f} MB, {text}'


def main(argv=None):
    """Export; say what is wrong, and write nothing then."""
    args = parse_args(argv)
    warnings.filterwarnings('ignore')
    logging.disable(logging.WARNING)
    from lors_plugin.checkpoints import ConversionError
    from lors_plugin.export import ExportError

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
    except (
        ConversionError, ValueError, TypeError, KeyError, OSError, ImportError
    ) as error:  # fmt: skip
        sys.stderr.write(f'error: {error}\nnothing was written\n')
        return EXIT_USER_ERROR
    return 0


if __name__ == '__main__':
    sys.exit(main())
