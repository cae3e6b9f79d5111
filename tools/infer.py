"""Run a trained detector or classifier on images, folders and videos.

    python tools/infer.py CONFIG CHECKPOINT INPUT ... --out-dir DIR

INPUT is an image, a folder, a pattern in quotes ('photos/**/*.jpg'), a video,
the number of a webcam or a COCO file. CHECKPOINT holds a whole model or
adapters alone, or is an ONNX or OpenVINO file of tools/export.py.
DIR/pictures has drawings and annotated videos.
docs/en/user_guides/inference.md tells more.

Exit code 1 means that some inputs could not be read, and 2 a mistake in the
command; 130 that it was interrupted: what was done by then is written.
"""

import argparse
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import torch
from mmengine.config import DictAction
from tool_utils import EXIT_INTERRUPTED, user_errors
from tqdm import tqdm

import lors_plugin  # noqa: F401  (first: it makes mmcv.ops importable)
from lors_plugin.build import load_config
from lors_plugin.compat import filter_warnings, read_safely
from lors_plugin.inference import (
    InferenceError,
    TiledPredictor,
    find_sources,
    load_predictor,
    read_frames,
)
from lors_plugin.inference.inputs import read_coco
from lors_plugin.inference.predictor import EXPORTED
from lors_plugin.inference.writers import FORMATS, Results
from lors_plugin.visualization.painter import Painter

EXIT_FAILURES = 1
# Classes of a classifier that are told per image.
TOP_CLASSES = 5


def add_model_arguments(parser):
    """Add what loads a model; tools/demo.py has the same."""
    add = parser.add_argument
    add('config', help='config of the training, or of the merged model')
    add(
        'checkpoint',
        help='weights, an adapter file, or NAME.onnx or NAME.xml of '
        'tools/export.py',
    )
    add(
        '--base',
        metavar='FILE',
        help='weights that the adapters of an adapter file were trained on '
        '(default: those that the config or the file names)',
    )
    add(
        '--score-thr',
        type=float,
        help='show predictions from this score on (default: 0.3 for '
        'detectors, 0 for classifiers)',
    )
    add(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='cut images into square tiles of this size, for photos larger '
        'than the network sees (needs sahi)',
    )
    add(
        '--overlap',
        type=float,
        default=0.2,
        help='of neighbouring tiles, as a share of their size: objects up to '
        'that size are whole in one of them (default: 0.2)',
    )
    add(
        '--batch-size',
        type=int,
        default=1,
        help='images, or tiles, per run of the model (default: 1)',
    )
    add(
        '--device',
        help='cpu, cuda or cuda:1 (default: cuda if there is a GPU)',
    )
    add('--amp', action='store_true', help='compute in mixed precision')
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
        help='allow the checkpoint to run code of its own while it is read; '
        'only for files from people you trust',
    )
    add(
        '--debug',
        action='store_true',
        help='show the whole traceback of a mistake',
    )


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add('inputs', nargs='+', metavar='input', help='see above')
    add('--out-dir', required=True, metavar='DIR', help='for all results')
    add(
        '--format',
        nargs='+',
        choices=FORMATS,
        default=[],
        metavar='F',
        help='write the predictions as coco (predictions.json), csv, yolo '
        '(labels/NAME.txt) or labelme (labelme/NAME.json); default: none',
    )
    add(
        '--classes',
        nargs='+',
        metavar='NAME',
        help='show these classes, names or numbers (default: all)',
    )
    add(
        '--image-dir',
        metavar='DIR',
        help='folder of the images of a COCO file (default: that of the file)',
    )
    add(
        '--max-frames',
        type=int,
        metavar='N',
        help='stop each video and webcam after so many',
    )
    add(
        '--no-pictures',
        action='store_true',
        help='write no drawings and videos',
    )
    add(
        '--no-labels',
        action='store_true',
        help='draw boxes without class and score',
    )
    args = parser.parse_args(argv)
    check_numbers(parser, args, 'batch_size', 'tile', 'max_frames')
    if args.no_pictures and not args.format:
        parser.error('--no-pictures without --format would write nothing')
    return args


def check_numbers(parser, args, *names):
    """Refuse options that have to be positive, and are not."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} must be positive')


def load(args):
    """Load the model as the command line says; tools/demo.py does too."""
    filter_warnings()
    cv2.setLogLevel(0)  # what cannot be read is named at the end
    read_safely(args.trust)
    cfg = load_config(args.config, args.cfg_options)
    exported = Path(args.checkpoint).suffix.lower() in EXPORTED
    cuda = torch.cuda.is_available() and not exported
    device = args.device or ('cuda' if cuda else 'cpu')
    predictor = load_predictor(
        cfg, args.checkpoint, device, args.trust, args.amp, args.base
    )
    if args.score_thr is None:
        args.score_thr = 0.3 if predictor.detects else 0.0
    if args.tile is None:
        return predictor
    return TiledPredictor(predictor, args.tile, args.overlap, args.batch_size)


def predict(predictor, frames):
    """Predict for a batch; what fails is tried again one by one.

    Yields:
        tuple: The frame and its prediction, or None and ``frame.error``.
    """
    good = [frame for frame in frames if not frame.error]
    found = {}
    try:
        if good:
            results = predictor([frame.image for frame in good])
            found = dict(zip(map(id, good), results))
    except Exception as error:
        # Whatever a model raises for an image that it cannot take.
        if len(good) > 1:
            for frame in frames:
                yield from predict(predictor, [frame])
            return
        text = str(error)
        if not isinstance(error, InferenceError):
            first = text.strip().split('\n')[0]
            text = f'{type(error).__name__}: {first}'
        good[0].error = f'{good[0].source.path}: {text}'
    for frame in frames:
        yield frame, found.get(id(frame))


def run(predictor, sources, results, args):
    """Predict for all frames and write what was found.

    Returns:
        tuple: Number of images, number of predictions, and the errors.
    """
    labels = args.classes and predictor.labels_of(args.classes)
    number = None if predictor.detects else TOP_CLASSES
    counts = [source.count() for source in sources]
    total = None if None in counts or args.max_frames else sum(counts)
    frames = read_frames(sources, predictor.read, args.max_frames)
    batch = 1 if args.tile else args.batch_size
    images, boxes, errors = 0, 0, []
    with tqdm(total=total, unit=' images', dynamic_ncols=True) as bar:
        while some := list(islice(frames, batch)):
            for frame, found in predict(predictor, some):
                bar.update()
                if found is None:
                    errors.append(frame.error)
                    continue
                found = found.select(args.score_thr, labels, number)
                results.add(frame, found)
                images += 1
                boxes += len(found)
    return images, boxes, errors


def infer(args):
    """Do what the command line says and return the exit code."""
    sources = find_sources(args.inputs, args.image_dir, args.out_dir)
    predictor = load(args)
    painter = Painter(predictor.classes)
    coco = [path for path in args.inputs if path.lower().endswith('.json')]
    alone = len(coco) == len(args.inputs) == 1
    results = Results(
        args.out_dir,
        sources,
        predictor.classes,
        predictor.detects,
        args.format,
        None
        if args.no_pictures
        else partial(painter.prediction, labels=not args.no_labels),
        read_coco(Path(coco[0]))['categories'] if alone else (),
    )
    start = time.perf_counter()
    code = 0
    counts = None
    try:
        counts = run(predictor, sources, results, args)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        sys.stderr.write('\ninterrupted; writing what was done\n')
    except BaseException:
        results.discard()
        raise
    files = results.close()
    if counts is None:
        return code
    images, boxes, errors = counts
    seconds = time.perf_counter() - start
    what = 'boxes' if predictor.detects else 'classes'
    plural = 's' * (images != 1)
    print(
        f'{images} image{plural} in {seconds:.1f} s '
        f'({images / seconds:.1f} images/s), {boxes} {what} with a score of '
        f'at least {args.score_thr:g}'
    )
    for path in files:
        print(f'  {path}')
    if errors:
        plural = 's' * (len(errors) != 1)
        sys.stderr.write(f'{len(errors)} input{plural} failed:\n')
        sys.stderr.writelines(f'  {error}\n' for error in errors)
        code = EXIT_FAILURES
    return code


def main(argv=None):
    """Run the tool and return the exit code."""
    args = parse_args(argv)
    with user_errors('', args.debug, (ValueError, OSError)):
        return infer(args)


if __name__ == '__main__':
    sys.exit(main())
