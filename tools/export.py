"""Export a classifier or a detector for deployment.

    python tools/export.py CONFIG CHECKPOINT OUT.onnx [--images *.jpg]
    python tools/export.py CONFIG CHECKPOINT OUT.xml --half
    python tools/export.py CONFIG CHECKPOINT OUT.onnx --int8 \\
        --calibration DIR --evaluate

The ending says what is written: .onnx, .xml (OpenVINO) or .pt2
(torch.export). The file takes RGB images from 0 to 255 (normalising is part
of it), any number of them and, unless the model is a Swin, of any size; of
detectors of MMDetection one image of one size.
Before it is written, the engine that it is for runs it at other numbers and
sizes than it was made with, and the outputs are compared with PyTorch, on
real images too where they are given. Above the tolerance nothing is written
and the exit code is 1; 2 means a mistake in the command or the config.
docs/en/user_guides/export.md describes inputs and outputs, and deploy.md how
to run a file.
"""

import argparse
import contextlib
import io
import logging
import math
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from mmengine.config import DictAction

import lors_plugin.models  # noqa: F401 - before the hosts
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
from lors_plugin.deploy.engines import open_engine
from lors_plugin.deploy.runtime import Classifier, load
from lors_plugin.export import (
    ClassifierForExport,
    DetectorForExport,
    ExportError,
    export_file,
    for_export,
    takes_one_size,
    write_file,
)
from lors_plugin.export.accuracy import evaluate, main_metric
from lors_plugin.export.cases import (
    classifier_case,
    detector_case,
    random_images,
)
from lors_plugin.export.check import check, without_results
from lors_plugin.export.metadata import describe
from lors_plugin.export.models import INPUTS
from lors_plugin.export.onnx_file import onnx_model, with_metadata
from lors_plugin.export.openvino_file import openvino_files
from lors_plugin.export.sampling import SAMPLING
from lors_plugin.export.smaller import quantize_convolutions, with_half_weights
from lors_plugin.export.torch_file import TorchEngine, torch_file
from lors_plugin.utils import type_name

EXIT_DIFFERENT, EXIT_USER_ERROR = 1, 2
RANDOM = 'none'
FORMATS = dict(onnx='.onnx', openvino='.xml', torch='.pt2')
PHOTOS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff')


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
    add('out', help='the file to write: .onnx, .xml or .pt2')
    add(
        '--format',
        choices=FORMATS,
        help='(default: what the ending of OUT says)',
    )
    add(
        '--half',
        action='store_true',
        help='store weights as float16; computed is in float32 all the same',
    )
    add(
        '--int8',
        action='store_true',
        help='compute convolutions in INT8; needs --calibration',
    )
    add(
        '--calibration',
        metavar='DIR',
        help='folder of typical images, some of the training set, from which '
        'INT8 learns the range of activations',
    )
    add(
        '--calibration-images',
        type=int,
        default=100,
        metavar='N',
        help='how many of these to take (default: %(default)s)',
    )
    add(
        '--evaluate',
        nargs='?',
        type=int,
        const=0,
        metavar='N',
        help="evaluate the file on the config's test set, or its first N "
        'images; with --half or --int8 before and after',
    )
    add(
        '--max-drop',
        type=float,
        default=0.01,
        metavar='SHARE',
        help='with --half or --int8, refuse a file that loses more of the '
        'first metric, where --evaluate measures it (default: %(default)s, '
        'one point of AP or accuracy)',
    )
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
        'score of detections, or to the largest logit (default: %(default)s); '
        'of float32: what --half and --int8 change is told, and --evaluate '
        'decides',
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
    ending = Path(args.out).suffix
    if args.format is None:
        known = {suffix: name for name, suffix in FORMATS.items()}
        if ending not in known:
            parser.error(f'OUT ends with {", ".join(known)}, not {ending!r}')
        args.format = known[ending]
    elif ending != FORMATS[args.format]:
        parser.error(f'files of {args.format} end with {FORMATS[args.format]}')
    if args.int8 != bool(args.calibration):
        parser.error('--int8 and --calibration need each other')
    if args.int8 and args.half:
        parser.error('--int8 or --half, not both')
    if args.format == 'torch' and (args.int8 or args.half):
        parser.error('--int8 and --half are for .onnx and .xml')
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


def is_stock_detector(model):
    """Return whether a model is a detector of MMDetection itself."""
    return is_detector(model) and not isinstance(model, AdaMixer)


def wrap(model, args, shape):
    """Return the module to export, and a function that makes cases for it."""
    kind, number = args.input, 1 if args.static else None
    if isinstance(model, AdaMixer):
        # PyTorch runs its own operator best.
        sampling = 'grid_sample' if args.format == 'torch' else args.sampling
        module = DetectorForExport(for_export(model, number, sampling), kind)
        return module, lambda images: detector_case(model, images, kind)
    if is_stock_detector(model):
        from lors_plugin.export.stock import stock_detector

        module = stock_detector(for_export(model, number), kind)

        def padded_case(images):
            return detector_case(model, images, kind, shape)

        return module, padded_case
    from mmpretrain.models.classifiers import BaseClassifier

    if not isinstance(model, BaseClassifier):
        name = type(model).__name__
        raise ValueError(f'{name} is neither a classifier nor a detector')
    module = ClassifierForExport(for_export(model, number), kind)
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
    if is_stock_detector(model):
        wanted.append((1, [(height - height // 5, width - width // 7)]))
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
        if is_stock_detector(model):
            refused = any(side > limit for side, limit in zip(size, shape))
        else:
            refused = args.fixed_size and size != shape
        if refused:
            raise ValueError(
                f'{path} becomes {size} by the test pipeline, but the file '
                f'is for {shape}; set --shape'
            )
        cases.append(run_case(make_case, [image]))
    return cases


def export(args):
    """Export as the arguments say; return a sentence about it."""
    read_safely(args.trust)
    cfg = load_config(args.config, args.cfg_options)
    model, meta = load_model(cfg, args)
    one_size = takes_one_size(model)
    args.static |= is_stock_detector(model)
    args.fixed_size |= args.static or one_size
    shape = tuple((args.shape * 2)[:2]) if args.shape else test_shape(cfg)
    shape = padded_shape(model, shape)
    module, make_case = wrap(model, args, shape)
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
    number, size = not args.static, not args.fixed_size
    if args.format == 'torch':
        content = torch_file(module.eval(), inputs, metadata, number, size)
        files = {'.pt2': content}
    else:
        content = export_file(
            module.eval(),
            inputs,
            args.opset,
            number,
            size,
            metadata,
            args.sampling,
        )
        files = files_of(content, args.format)
    text = 'not compared with PyTorch'
    if args.check:
        cases = make_cases(make_case, cfg, model, shape, args)
        with opened(files) as (_, engine):
            error = check(engine, cases, args.tolerance)
        text = f'largest error {error:.1e} in {len(cases)} comparisons'
        empty = without_results(cases)
        if empty:
            text += (
                f' ({empty} of images in which PyTorch found nothing, which '
                'show nothing: give --images with objects)'
            )
    versions = [files]
    if args.half or args.int8:
        versions.append(smaller_files(content, metadata, args))
        if args.check:
            with opened(versions[1]) as (_, engine):
                error = check(engine, cases, tolerance=math.inf)
            kind = 'float16' if args.half else 'INT8'
            text += f', {error:.1e} with {kind}'
    if args.evaluate is not None:
        text += evaluate_versions(versions, cfg, args)
    # Structure after weights: whoever sees it finds both.
    for suffix, content in versions[-1].items():
        write_file(content, Path(args.out).with_suffix(suffix))
    if is_stock_detector(model):
        text += f', for one image of up to {shape[0]} x {shape[1]}'
    elif one_size:
        text += (
            f', for images of {shape[0]} x {shape[1]} alone: the windows of '
            'Swin are exported for one size'
        )
    if isinstance(metadata['pipeline'], str):
        text += (
            '\nlors_plugin.deploy.runtime will refuse it: '
            + (metadata['pipeline'])
        )
    megabytes = sum(map(len, versions[-1].values())) / 1e6
    return f'{args.out}: {megabytes:.1f} MB, {text}'


def files_of(content, kind, metadata=None, half=False):
    """Return the files of a format from what ONNX files hold.

    Args:
        content (bytes): Of an ONNX file.
        kind (str): 'onnx' or 'openvino'.
        metadata (dict, optional): By default that of the file.
        half (bool): Whether weights are stored as float16.

    Returns:
        dict[str, bytes]: By ending.
    """
    if kind == 'onnx':
        if not half:
            return {'.onnx': content}
        model = with_half_weights(onnx_model(content))
        return {'.onnx': with_metadata(model, metadata)}
    model = onnx_model(content)
    if metadata is None:
        metadata = {p.key: p.value for p in model.metadata_props}
    return openvino_files(model, metadata, half)


def smaller_files(content, metadata, args):
    """Return the files with float16 weights or INT8 convolutions."""
    if args.half:
        metadata = dict(metadata, precision='float16 weights')
        return files_of(content, args.format, metadata, half=True)
    metadata = dict(metadata, precision='int8')
    photos = calibration_images(args.calibration, args.calibration_images)
    with opened({'.onnx': content}) as (path, engine):
        reader = load(path, engine=engine)
        inputs = (batch for batch, _ in reader.inputs(photos))
        model = quantize_convolutions(onnx_model(content), inputs)
    return files_of(with_metadata(model, metadata), args.format, metadata)


def calibration_images(folder, number):
    """List images of a folder, evenly over all names."""
    paths = sorted(
        path
        for path in Path(folder).rglob('*')
        if path.suffix.lower() in PHOTOS
    )
    if not paths:
        raise ValueError(f'--calibration: no images in {folder}')
    step = max(len(paths) / number, 1)
    return [paths[int(i * step)] for i in range(min(number, len(paths)))]


@contextlib.contextmanager
def opened(files):
    """Open files that are not written yet; yield a path and an engine."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix, content in files.items():
            path = Path(folder, f'model{suffix}')
            path.write_bytes(content)
        if path.suffix == '.pt2':
            yield path, TorchEngine(content)
        else:
            yield path, open_engine(path)


def evaluate_versions(versions, cfg, args):
    """Evaluate files; return a sentence, or refuse the last."""
    found = []
    for files in versions:
        with opened(files) as (path, engine):
            model = load(path, engine=engine, verify=False)
            model.top = None
            name, value = main_metric(evaluate(model, cfg, args.evaluate))
        found.append(value)
    if len(found) == 1:
        return f', {name} {found[0]:.4f}'
    # MMPretrain counts in percent.
    whole = 100 if isinstance(model, Classifier) else 1
    drop = (found[0] - found[1]) / whole
    if not drop <= args.max_drop:
        raise ExportError(
            f'{name} falls from {found[0]:.4f} to {found[1]:.4f}; '
            f'--max-drop {args.max_drop} allows less'
        )
    return f', {name} {found[0]:.4f} before, {found[1]:.4f} after'


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
