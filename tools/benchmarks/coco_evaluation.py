"""Time COCO evaluation by faster-coco-eval and by pycocotools.

Synthetic boxes of the size of COCO val: 5000 images, 7 boxes and 100
detections each, 80 classes. Both take turns on the same detections, and
nothing is reported unless their numbers agree.
"""

import argparse
import contextlib
import io
import sys
import time
from statistics import median

import numpy as np

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable

TOLERANCE = 1e-6


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ('images', 5000),
        ('boxes', 7),
        ('detections', 100),
        ('classes', 80),
        ('repeats', 3),
    ):
        parser.add_argument(
            f'--{name}',
            type=int,
            default=default,
            metavar='N',
            help='default: %(default)s',
        )
    return parser.parse_args(argv)


def make_boxes(rng, number):
    """Boxes (x, y, w, h) of all of COCO's sizes."""
    sides = np.exp(rng.uniform(np.log(8), np.log(300), (number, 2)))
    return np.concatenate([rng.uniform(0, 640 - sides), sides], axis=1)


def make_data(args):
    """Ground truth and detections, half of which are near a box."""
    rng = np.random.default_rng(0)
    annotations, detections = [], []
    for image in range(args.images):
        boxes = make_boxes(rng, args.boxes)
        labels = rng.integers(0, args.classes, args.boxes)
        for box, label in zip(boxes, labels):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(label),
                    bbox=box.tolist(),
                    area=float(box[2] * box[3]),
                    iscrowd=0,
                )
            )
        found = make_boxes(rng, args.detections)
        kinds = rng.integers(0, args.classes, args.detections)
        near = np.flatnonzero(rng.random(args.detections) < 0.5)
        source = rng.integers(0, args.boxes, len(near))
        noise = rng.normal(0, 0.1, (len(near), 4))
        found[near] = boxes[source] * (1 + noise)
        kinds[near] = labels[source]
        scores = rng.random(args.detections)
        detections += [
            dict(
                image_id=image,
                category_id=int(kind),
                bbox=box.tolist(),
                score=float(score),
            )
            for kind, box, score in zip(kinds, found, scores)
        ]
    dataset = dict(
        images=[dict(id=i, width=640, height=640) for i in range(args.images)],
        categories=[dict(id=i, name=str(i)) for i in range(args.classes)],
        annotations=annotations,
    )
    return dataset, detections


def evaluate(kind, truth, found):
    """Seconds and the twelve numbers of one evaluation."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = kind(truth, found, 'bbox')
        evaluator.params.maxDets = [100, 300, 1000]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return time.perf_counter() - start, np.asarray(evaluator.stats)


def main(argv=None):
    """Run both in turns."""
    args = parse_args(argv)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from lors_plugin.evaluation import FasterCOCOeval

    dataset, detections = make_data(args)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        found = truth.loadRes(detections)
    seconds = {COCOeval: [], FasterCOCOeval: []}
    stats = {}
    for _ in range(args.repeats):
        for kind, times in seconds.items():
            taken, stats[kind] = evaluate(kind, truth, found)
            times.append(taken)
    difference = np.abs(stats[COCOeval] - stats[FasterCOCOeval]).max()
    print(f'largest difference of the twelve numbers: {difference:.1e}')
    if not difference <= TOLERANCE:
        sys.stderr.write('error: the numbers differ; no times\n')
        return 1
    slow, fast = (median(times) for times in seconds.values())
    print(
        f'{args.images} images, {len(detections)} detections, median of '
        f'{args.repeats}: pycocotools {slow:.1f} s, faster-coco-eval '
        f'{fast:.1f} s, {slow / fast:.1f} times as fast'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
