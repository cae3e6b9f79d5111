"""Draw ground truth and predictions side by side, and one contact sheet.

Ground truth is yellow, dashed where no prediction found it. Predictions are
green when they meet a box of their class with an IoU of 0.5, else magenta.

Example:
    python tools/test.py CONFIG CHECKPOINT --out predictions.pkl
    python tools/analysis_tools/draw_predictions.py CONFIG \
        --pkl predictions.pkl --out-dir pictures
    python tools/analysis_tools/draw_predictions.py CONFIG --truth \
        --split train --out-dir pictures
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
import torch
from drawing_tool import DrawError, logger, read_config, run_tool

# First: it makes mmcv.ops importable.
from lors_plugin.checkpoints import load_pickle_file
from lors_plugin.engine.data_check import check_data
from lors_plugin.inference import InferenceError, TorchPredictor
from lors_plugin.visualization import picture_names
from lors_plugin.visualization.painter import WHITE, Painter

# isort: split
from mmdet.registry import DATASETS
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import Config

# RGB
YELLOW, GREEN, MAGENTA = (255, 230, 0), (60, 220, 70), (255, 60, 220)
GAP = 6  # pixels
IOU = 0.5
SHEET = 'contact_sheet'


@dataclass
class Sample:
    """One image with its boxes, all in pixels of the original image.

    Attributes:
        path (str): The image.
        gt_boxes (np.ndarray): Corners, has shape (G, 4).
        gt_labels (np.ndarray): Has shape (G, ).
        boxes (np.ndarray): Predicted corners, best score first, has shape
            (N, 4).
        scores (np.ndarray): Has shape (N, ).
        labels (np.ndarray): Has shape (N, ).
    """

    path: str
    gt_boxes: np.ndarray
    gt_labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray

    def match(self) -> np.ndarray:
        """Assign predictions to ground truth, best score first.

        Returns:
            np.ndarray: Index of the ground truth of the same class with the
            largest IoU, or -1, for each prediction; has shape (N, ).
        """
        pair = (torch.as_tensor(b) for b in (self.boxes, self.gt_boxes))
        ious = bbox_overlaps(*pair).numpy().copy()
        ious[self.labels[:, None] != self.gt_labels[None]] = 0
        hits = np.full(len(ious), -1)
        for i, row in enumerate(ious if ious.size else ()):
            best = int(row.argmax())
            if row[best] >= IOU:
                hits[i] = best
                ious[:, best] = 0
        return hits


def best_threshold(samples: Sequence[Sample]) -> float:
    """Find the score threshold with the best F1 over all images.

    It is 0.3 when no prediction is right.
    """
    scores = np.concatenate([s.scores for s in samples])
    right = np.concatenate([s.match() >= 0 for s in samples])
    if not right.any():
        return 0.3
    order = np.argsort(-scores, kind='stable')
    hits = np.cumsum(right[order])
    total = sum(len(s.gt_boxes) for s in samples)
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + total)
    return float(scores[order][f1.argmax()])


# From files to samples


def read_pickle(path: str, trust: bool = False) -> dict[object, Mapping]:
    """Read predictions of ``tools/test.py --out`` by the ids of images."""
    try:
        results = load_pickle_file(path, trust)
        found = {r['img_id']: r['pred_instances'] for r in results}
        good = all(_are_detections(item) for item in found.values())
    except (KeyError, TypeError):
        good = False
    if not good:
        raise DrawError(
            f'{path} does not hold detections of tools/test.py --out'
        )
    return found


def _are_detections(item: Mapping) -> bool:
    parts = [item[key] for key in ('bboxes', 'scores', 'labels')]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return False
    boxes, scores, labels = (tuple(part.shape) for part in parts)
    return len(scores) == 1 and labels == scores and boxes == (*scores, 4)


def infer(
    cfg: Config, infos: Sequence[Mapping], args: argparse.Namespace
) -> dict[object, Mapping]:
    """Run the detector of a config, as :func:`read_pickle`."""
    predictor = TorchPredictor(cfg, args.checkpoint, args.device, args.trust)
    if not predictor.detects:
        raise DrawError(f'{args.config} is a classifier and has no boxes')
    found = {}
    for info in infos:
        path = info['img_path']
        try:
            (sample,) = predictor.run([predictor.read(path)])
        except InferenceError as error:  # knows pixels, and not the file
            raise DrawError(f'{path}: {error}') from error
        found[info['img_id']] = sample.pred_instances
    return found


def make_sample(info: Mapping, prediction: Mapping | None) -> Sample:
    """Bring ground truth and predictions of an image together."""
    truth = [i for i in info['instances'] if not i['ignore_flag']]
    empty = dict(bboxes=torch.zeros(0, 4), scores=torch.zeros(0))
    found = prediction or dict(empty, labels=torch.zeros(0))
    scores = found['scores'].cpu().double().numpy()
    order = np.argsort(-scores, kind='stable')
    return Sample(
        path=info['img_path'],
        gt_boxes=np.array([i['bbox'] for i in truth], float).reshape(-1, 4),
        gt_labels=np.array([i['bbox_label'] for i in truth], int),
        boxes=found['bboxes'].cpu().double().numpy()[order],
        scores=scores[order],
        labels=found['labels'].cpu().long().numpy()[order],
    )


def collect_samples(args: argparse.Namespace) -> tuple[list[Sample], tuple]:
    """Get images with ground truth and predictions, and class names."""
    cfg = read_config(args.config, args.trust)
    loader = cfg.get(f'{args.split}_dataloader')
    if loader is None:
        raise DrawError(f'{args.config} has no {args.split}_dataloader')
    if not args.no_checks:
        scope = cfg.get('default_scope', 'mmdet')
        only = {'default_scope': scope, f'{args.split}_dataloader': loader}
        check_data(only, [args.split])
    dataset = DATASETS.build(loader.dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    if not infos:
        raise DrawError(f'the {args.split} data set is empty')
    if not args.truth and len({i['img_id'] for i in infos}) < len(infos):
        raise DrawError(
            'images of several files have the same ids, so that predictions '
            'do not tell which is meant; draw one file at a time'
        )
    # Without a threshold all images are needed to choose one.
    if args.truth or (args.checkpoint and args.score_thr is not None):
        infos = spread(infos, args.num)
    if args.truth:
        predictions = dict.fromkeys(i['img_id'] for i in infos)
    elif args.pkl:
        predictions = read_pickle(args.pkl, args.trust)
    else:
        predictions = infer(cfg, infos, args)
    missing = [i for i in infos if i['img_id'] not in predictions]
    if missing:
        raise DrawError(
            f'{args.pkl} lacks {len(missing)} images of the test set of '
            f'{args.config}: it belongs to other data'
        )
    samples = [make_sample(i, predictions[i['img_id']]) for i in infos]
    return samples, dataset.metainfo['classes']


def spread(items: Sequence, number: int) -> list:
    """Choose a number of items at even distances, all if there are fewer."""
    indices = np.linspace(0, len(items) - 1, min(number, len(items)))
    return [items[i] for i in indices.round().astype(int)]


# Drawing


class TruthPainter(Painter):
    """Draw samples; pictures are RGB.

    Args:
        classes (Sequence[str]): Class names.
        score_thr (float): Predictions below are not drawn. Defaults to 0.
    """

    def __init__(self, classes: Sequence[str], score_thr: float = 0) -> None:
        super().__init__(classes)
        self.score_thr = score_thr

    def load(self, path: str, side: int) -> tuple[np.ndarray, float]:
        """Load an image with a longer side of that length, and its scale."""
        try:
            image = mmcv.imread(path, channel_order='rgb')
        except Exception as error:  # whatever OpenCV makes of no image
            raise DrawError(f'cannot read image {path}: {error}') from error
        if image is None:
            raise DrawError(f'cannot read image {path}')
        scale = side / max(image.shape[:2])
        size = [max(round(n * scale), 1) for n in image.shape[1::-1]]
        way = 'bicubic' if scale > 1 else 'area'
        return mmcv.imresize(image, size, interpolation=way), scale

    def truth(
        self, sample: Sample, side: int = 720, texts: bool = True
    ) -> np.ndarray:
        """Draw ground truth alone, a colour per class.

        ``side`` is the longer side of the image in pixels; ``texts`` adds
        labels and a header.
        """
        image, scale = self.load(sample.path, side)
        names = [self.classes[i] for i in sample.gt_labels] if texts else ()
        colors = [self.colors[i] for i in sample.gt_labels]
        image = self.boxes(image, sample.gt_boxes * scale, colors, names)
        if not texts:
            return image
        counts = np.bincount(sample.gt_labels, minlength=len(self.classes))
        found = zip(counts, self.classes, self.colors)
        parts = [(f'{n} {name}', color) for n, name, color in found if n]
        parts = parts or [('no boxes', WHITE)]
        return np.vstack([self.header(image.shape[1], parts), image])

    def pair(
        self, sample: Sample, side: int = 720, texts: bool = True
    ) -> np.ndarray:
        """Draw ground truth and predictions beside it, as :meth:`truth`."""
        image, scale = self.load(sample.path, side)
        shown = sample.scores >= self.score_thr
        hits = np.where(shown, sample.match(), -1)
        single = len(self.classes) == 1
        number = len(sample.gt_boxes)
        names = [self.classes[i] for i in sample.gt_labels]
        left = self.boxes(
            image,
            sample.gt_boxes * scale,
            [YELLOW] * number,
            names if texts and not single else (),
            [i not in hits for i in range(number)],
        )
        order = np.flatnonzero(shown)[::-1]
        names = [
            '' if single else f'{self.classes[sample.labels[i]]} '
            for i in order
        ]
        scores = [f'{sample.scores[i]:.2f}' for i in order]
        right = self.boxes(
            image,
            sample.boxes[order] * scale,
            [GREEN if hits[i] >= 0 else MAGENTA for i in order],
            [a + b for a, b in zip(names, scores)] if texts else (),
        )
        if texts:
            found = int((hits >= 0).sum())
            kind = self.classes[0] if single else 'object'
            left_parts = [
                (f'{number} {kind} boxes by hand', YELLOW),
                (f'dashed: {number - found} missed', YELLOW),
            ]
            right_parts = [
                (f'predictions, score >= {self.score_thr:.2f}:', WHITE),
                (f'{found} right (IoU {IOU})', GREEN),
                (f'{len(order) - found} wrong', MAGENTA),
            ]
            width = image.shape[1]
            left = np.vstack([self.header(width, left_parts), left])
            right = np.vstack([self.header(width, right_parts), right])
        gap = np.full((left.shape[0], GAP, 3), WHITE, np.uint8)
        return np.hstack([left, gap, right])

    def sheet(self, samples: Sequence[Sample], truth: bool) -> np.ndarray:
        """Draw all images small on one sheet, with or without predictions."""
        if truth:
            parts = list(zip(self.classes, self.colors))
        else:
            parts = [
                ('left of each pair: boxes by hand', YELLOW),
                ('(dashed: missed)', YELLOW),
                (f'right: predictions, score >= {self.score_thr:.2f}:', WHITE),
                ('right', GREEN),
                ('wrong', MAGENTA),
            ]
        draw = self.truth if truth else self.pair
        pictures = [draw(sample, 400, False) for sample in samples]
        height = max(p.shape[0] for p in pictures) + 2 * GAP
        width = max(p.shape[1] for p in pictures) + 3 * GAP
        columns = min(4 if truth else 2, len(pictures))
        rows = math.ceil(len(pictures) / columns)
        sheet = np.full((rows * height, columns * width, 3), WHITE, np.uint8)
        for i, picture in enumerate(pictures):
            y, x = i // columns * height + GAP, i % columns * width + GAP
            sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
        return np.vstack([self.header(sheet.shape[1], parts), sheet])


def draw(args: argparse.Namespace) -> None:
    """Draw all pictures, as the command line says."""
    samples, classes = collect_samples(args)
    score_thr = args.score_thr or 0
    if args.score_thr is None and not args.truth:
        score_thr = best_threshold(samples)
        logger.info('score threshold with the best F1: %.2f', score_thr)
    samples = spread(samples, args.num)
    painter = TruthPainter(classes, score_thr)
    names = picture_names([s.path for s in samples], [SHEET])
    one = painter.truth if args.truth else painter.pair
    pictures = {name: one(sample) for name, sample in zip(names, samples)}
    pictures[SHEET] = painter.sheet(samples, args.truth)
    for name, picture in pictures.items():
        path = Path(args.out_dir, f'{name}.png')
        if not mmcv.imwrite(picture[..., ::-1], str(path)):
            raise DrawError(f'cannot write {path}')
    logger.info('%d pictures: %s', len(pictures), args.out_dir)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Draw ground truth and predictions side by side'
    )
    parser.add_argument('config', help='config with a test_dataloader')
    parser.add_argument('checkpoint', nargs='?', help='weights')
    parser.add_argument(
        '--pkl', help='predictions of tools/test.py --out, saves inference'
    )
    parser.add_argument(
        '--truth',
        action='store_true',
        help='draw the ground truth alone, to check the data before a '
        'training',
    )
    parser.add_argument(
        '--split',
        choices=('train', 'val', 'test'),
        default='test',
        help='of which data set, with --truth (default: test)',
    )
    parser.add_argument('--out-dir', required=True, help='for the pictures')
    parser.add_argument(
        '--num', type=int, default=8, help='number of images (default: 8)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        help='draw predictions from this score on (default: the threshold '
        'with the best F1)',
    )
    parser.add_argument('--device', default='cpu', help='(default: cpu)')
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow the checkpoint or pickle to run code of its own while it '
        'is read; only for files from people you trust',
    )
    parser.add_argument(
        '--no-checks',
        action='store_true',
        help='do not check classes and annotation file',
    )
    args = parser.parse_args(argv)
    given = (args.checkpoint is not None, args.pkl is not None, args.truth)
    if sum(given) != 1:
        parser.error('give either a checkpoint or --pkl or --truth')
    if args.split != 'test' and not args.truth:
        parser.error('--split goes with --truth')
    if args.num < 1:
        parser.error('--num must be positive')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(draw, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
