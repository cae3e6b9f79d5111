"""Draw where the queries of an AdaMixer look: one panel a stage.

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
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from drawing import DrawError, box_iou
from sampling_figure import StageView, sampling_figure

logger = logging.getLogger('visualize_sampling')

# Queries that found the same object would hide each other.
SAME_OBJECT_IOU = 0.5


def load_model(config: str, checkpoint: str, device: str, trust: bool = False):
    """Build a detector and load its weights.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path of the weights.
        device (str): Where to run.
        trust (bool): Allow files to run code of their own while they are
            read. Defaults to False.

    Returns:
        nn.Module: The detector, ready for ``inference_detector``.
    """
    from lors_plugin.compat import install_mmcv_ext_fallback, read_safely

    install_mmcv_ext_fallback()
    from mmengine.config import Config
    from trained_detector import load_detector

    for path in (config, checkpoint):
        if not Path(path).is_file():
            raise DrawError(f'{path} does not exist')
    cfg = Config.fromfile(config)
    read_safely(trust)
    return load_detector(cfg, checkpoint, device, trust)


def record(model, image: np.ndarray) -> tuple[list, np.ndarray]:
    """Run the detector on an image and record its stages.

    Args:
        model (nn.Module): The detector.
        image (np.ndarray): BGR, shape (H, W, 3).

    Returns:
        tuple: One :class:`StageRecord` a stage, and the factors of width
        and height from the image to the network's input, shape (2, ).
    """
    from mmdet.apis import inference_detector

    from lors_plugin.visualization import SamplingRecorder

    try:
        recorder = SamplingRecorder(model)
    except TypeError as error:
        raise DrawError(str(error)) from error
    with recorder:
        sample = inference_detector(model, image)
    if sample.get('flip'):
        raise DrawError('the test pipeline mirrors images; take that out')
    return recorder.records, np.array(sample.get('scale_factor', (1.0, 1.0)))


def choose_queries(
    boxes: np.ndarray,
    scores: np.ndarray,
    top_k: int,
    score_thr: float,
) -> list[int]:
    """Choose the queries with the best scores, one an object.

    Args:
        boxes (np.ndarray): Corners after the last stage, shape (N, 4).
        scores (np.ndarray): The best of each query, shape (N, ).
        top_k (int): How many to choose.
        score_thr (float): Smallest score.

    Returns:
        list[int]: Numbers of queries, best first.
    """
    ious = box_iou(boxes, boxes)
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
    """Bring records into pixels of the original image.

    Args:
        records (Sequence[StageRecord]): All stages.
        factors (np.ndarray): Of :func:`record`.
        stages (Sequence[int]): Numbers of the stages to show.
        queries (Sequence[int]): Numbers of the queries to show.
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
        views.append(
            StageView(
                stage=stage,
                boxes_in=found.boxes_in[0, queries].numpy()
                / np.tile(factors, 2),
                boxes_out=found.boxes_out[0, queries].numpy()
                / np.tile(factors, 2),
                texts=[
                    f'#{query} {classes[label]} {score:.2f}'
                    for query, label, score in zip(queries, labels, scores)
                ],
                points=found.points[0, queries].numpy() / factors,
                weights=found.weights[0, queries].numpy(),
            )
        )
    return views


def check_numbers(what: str, numbers: Sequence[int], count: int) -> None:
    """Refuse numbers of queries or stages that the model does not have.

    Args:
        what (str): 'queries' or 'stages'.
        numbers (Sequence[int]): What is wanted.
        count (int): How many there are.
    """
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise DrawError(
            f'--{what} {" ".join(map(str, wrong))}: the model has {count} '
            f'{what}, 0 to {count - 1}'
        )


def draw(args: argparse.Namespace) -> None:
    """Draw all pictures, as the command line says.

    Args:
        args (argparse.Namespace): The options.
    """
    import mmcv

    model = load_model(args.config, args.checkpoint, args.device, args.trust)
    classes = model.dataset_meta['classes']
    out_dir = Path(args.out)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = mmcv.imread(path)
        if image is None:
            raise DrawError(f'cannot read image {path}')
        records, factors = record(model, image)
        last = records[-1]
        if len(classes) < last.scores.shape[-1]:
            raise DrawError(
                f'there are names of {len(classes)} classes, and the model '
                f'has {last.scores.shape[-1]}: metainfo of the test set'
            )
        stages = range(len(records)) if args.stages is None else args.stages
        check_numbers('stages', stages, len(records))
        if args.queries is None:
            queries = choose_queries(
                last.boxes_out[0].numpy(),
                last.scores[0].amax(-1).numpy(),
                args.top_k,
                args.score_thr,
            )
        else:
            queries = args.queries
            check_numbers('queries', queries, last.scores.shape[1])
        figure = sampling_figure(
            image[..., ::-1],
            stage_views(records, factors, stages, queries, classes),
            last.strides,
            f'{Path(path).name}: sampling points of {len(queries)} of '
            f'{last.scores.shape[1]} queries',
            groups=args.groups,
            zoom=args.zoom,
            columns=args.columns,
        )
        out = out_dir / f'{Path(path).stem}_sampling.{args.format}'
        figure.savefig(out)
        plt.close(figure)
        logger.info('%s: queries %s', out, ' '.join(map(str, queries)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None, which
            means the ones of the process.

    Returns:
        argparse.Namespace: The options.
    """
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
        'one an object (default: 3)',
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
        '--columns', type=int, help='panels a row (default: 3 at most)'
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
    """Run the tool.

    Args:
        argv (Sequence[str], optional): Arguments. Defaults to None.

    Returns:
        int: Exit code.
    """
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        draw(args)
    except (DrawError, ValueError, OSError) as error:
        logger.error('error: %s', error)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
