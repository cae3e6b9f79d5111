"""Draw where the queries of an AdaMixer look: one panel per stage.

Each panel shows the boxes of a few queries at the start and the end of a
stage and the points that the stage samples, in the colour of the feature
level that counts most.

Example:
    python tools/analysis_tools/visualize_sampling.py CONFIG CHECKPOINT \
        image.jpg --out pictures
    python tools/analysis_tools/visualize_sampling.py CONFIG CHECKPOINT \
        image.jpg --out pictures --queries 17 --zoom 2 --groups
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from sampling_figure import StageView, sampling_figure
from torch import nn
from trained_detector import (
    DrawError,
    load_config,
    load_detector,
    logger,
    predict,
    run_tool,
)

# isort: split
from mmdet.structures.bbox import bbox_overlaps

from lors_plugin.visualization import SamplingRecorder, picture_names

# Queries that found the same object would hide each other.
SAME_OBJECT_IOU = 0.5


def load_model(
    config: str, checkpoint: str, device: str, trust: bool = False
) -> nn.Module:
    """Build the detector of a config and load its weights."""
    for path in (config, checkpoint):
        if not Path(path).is_file():
            raise DrawError(f'{path} does not exist')
    return load_detector(load_config(config, trust), checkpoint, device, trust)


def record(model: nn.Module, path: str) -> tuple[list, np.ndarray]:
    """Run the detector on an image and record its stages.

    Returns:
        tuple: One :class:`StageRecord` per stage, and the factors of width
        and height from the image to the network's input, shape (2, ).
    """
    try:
        recorder = SamplingRecorder(model)
    except TypeError as error:
        raise DrawError(str(error)) from error
    with recorder:
        sample = predict(model, path)
    if sample.get('flip'):
        raise DrawError('the test pipeline mirrors images; take that out')
    return recorder.records, np.array(sample.get('scale_factor', (1.0, 1.0)))


def choose_queries(
    boxes: np.ndarray, scores: np.ndarray, top_k: int, score_thr: float
) -> list[int]:
    """Choose the queries with the best scores, one per object.

    Args:
        boxes (np.ndarray): Corners after the last stage, shape (N, 4).
        scores (np.ndarray): The best of each query, shape (N, ).
        top_k (int): How many to choose.
        score_thr (float): Smallest score.

    Returns:
        list[int]: Indices of queries, best first.
    """
    boxes = torch.as_tensor(boxes)
    ious = bbox_overlaps(boxes, boxes).numpy()
    chosen: list[int] = []
    for query in np.argsort(-scores, kind='stable').tolist():
        if len(chosen) == top_k or scores[query] < score_thr:
            break
        if not (ious[query, chosen] > SAME_OBJECT_IOU).any():
            chosen.append(query)
    if not chosen:
        raise DrawError(
            f'no query has a score of {score_thr}, the best has '
            f'{scores.max():.3f}; choose a smaller --score-thr'
        )
    return chosen


def stage_views(
    records: Sequence,
    factors: np.ndarray,
    stages: Sequence[int],
    queries: Sequence[int],
    classes: Sequence[str],
) -> list[StageView]:
    """Bring the records of some stages into pixels of the original image.

    Args:
        records (Sequence[StageRecord]): All stages.
        factors (np.ndarray): See :func:`record`.
        stages (Sequence[int]): Indices of the stages to show.
        queries (Sequence[int]): Indices of the queries to show.
        classes (Sequence[str]): Class names.

    Returns:
        list[StageView]: The stages.
    """
    queries = list(queries)
    labels = records[-1].scores[0, queries].argmax(-1).tolist()
    views = []
    for stage in stages:
        found = records[stage]
        scores = found.scores[0, queries, labels].tolist()
        corners = np.tile(factors, 2)
        views.append(
            StageView(
                stage=stage,
                boxes_in=found.boxes_in[0, queries].numpy() / corners,
                boxes_out=found.boxes_out[0, queries].numpy() / corners,
                texts=[
                    f'#{query} {classes[label]} {score:.2f}'
                    for query, label, score in zip(queries, labels, scores)
                ],
                points=found.points[0, queries].numpy() / factors,
                weights=found.weights[0, queries].numpy(),
            )
        )
    return views


def check_indices(what: str, indices: Sequence[int], count: int) -> None:
    """Refuse indices of queries or stages that the model does not have."""
    wrong = [index for index in indices if not 0 <= index < count]
    if wrong:
        raise DrawError(
            f'--{what} {" ".join(map(str, wrong))}: the model has {count} '
            f'{what}, 0 to {count - 1}'
        )


def draw(args: argparse.Namespace) -> None:
    """Draw all pictures, as the command line says."""
    model = load_model(args.config, args.checkpoint, args.device, args.trust)
    classes = model.dataset_meta['classes']
    for path, name in zip(args.images, picture_names(args.images)):
        records, factors = record(model, path)
        last = records[-1]
        count = last.scores.shape[1]
        if len(classes) < last.scores.shape[-1]:
            raise DrawError(
                f'there are names of {len(classes)} classes, and the model '
                f'has {last.scores.shape[-1]}: metainfo of the test set'
            )
        stages = range(len(records)) if args.stages is None else args.stages
        check_indices('stages', stages, len(records))
        queries = args.queries
        if queries is None:
            queries = choose_queries(
                last.boxes_out[0].numpy(),
                last.scores[0].amax(-1).numpy(),
                args.top_k,
                args.score_thr,
            )
        check_indices('queries', queries, count)
        figure = sampling_figure(
            mmcv.imread(path, channel_order='rgb'),
            stage_views(records, factors, stages, queries, classes),
            last.strides,
            f'{Path(path).name}: sampling points of {len(queries)} of '
            f'{count} queries',
            groups=args.groups,
            zoom=args.zoom,
            columns=args.columns,
        )
        out = Path(args.out, f'{name}_sampling.{args.format}')
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out)
        plt.close(figure)
        logger.info('%s: queries %s', out, ' '.join(map(str, queries)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description='Draw boxes and sampling points of each stage'
    )
    parser.add_argument('config', help='config of an (LORS-)AdaMixer')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('images', nargs='+', metavar='image')
    parser.add_argument(
        '--out', required=True, metavar='DIR', help='for the pictures'
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        '--top-k',
        type=int,
        default=3,
        metavar='K',
        help='show the queries with the best scores after the last stage, '
        'one per object (default: 3)',
    )
    which.add_argument(
        '--queries',
        type=int,
        nargs='+',
        metavar='N',
        help='show these, counted from 0',
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.0,
        help='smallest score of a query that is chosen (default: 0)',
    )
    parser.add_argument(
        '--stages',
        type=int,
        nargs='+',
        metavar='N',
        help='show these, counted from 0 as in the log (default: all)',
    )
    parser.add_argument(
        '--zoom',
        type=float,
        metavar='FACTOR',
        help='show the surroundings of the last boxes only, so many times as '
        'large (default: the whole image)',
    )
    parser.add_argument(
        '--groups', action='store_true', help='a marker for each group'
    )
    parser.add_argument(
        '--columns', type=int, help='panels per row (default: 3 at most)'
    )
    parser.add_argument(
        '--format', choices=('png', 'jpg', 'pdf', 'svg'), default='png'
    )
    parser.add_argument('--device', default='cpu', help='(default: cpu)')
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow the checkpoint to run code of its own while it is read; '
        'only for files from people you trust',
    )
    args = parser.parse_args(argv)
    for name in ('top_k', 'columns', 'zoom'):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f'--{name.replace("_", "-")} must be positive')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return the exit code."""
    return run_tool(draw, parse_args(argv))


if __name__ == '__main__':
    sys.exit(main())
