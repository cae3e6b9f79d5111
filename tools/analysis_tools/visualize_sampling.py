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
from drawing_tool import DrawError, logger, read_config, run_tool

from lors_plugin.inference import TorchPredictor
from lors_plugin.inference.writers import as_rgb
from lors_plugin.visualization import picture_names
from lors_plugin.visualization.sampling_figure import sampling_figure
from lors_plugin.visualization.sampling_views import (
    choose_queries,
    record_sampling,
    stage_views,
)


def load_model(
    config: str, checkpoint: str, device: str, trust: bool = False
) -> TorchPredictor:
    """Build the detector of a config and load its weights."""
    for path in (config, checkpoint):
        if not Path(path).is_file():
            raise DrawError(f'{path} does not exist')
    cfg = read_config(config, trust)
    return TorchPredictor(cfg, checkpoint, device, trust)


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
    predictor = load_model(
        args.config, args.checkpoint, args.device, args.trust
    )
    classes = predictor.classes
    for path, name in zip(args.images, picture_names(args.images)):
        image = predictor.read(path)
        try:
            found = record_sampling(predictor, image)
        except DrawError as error:
            raise DrawError(f'{path}: {error}') from error
        records, factors = found.records, found.factors
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
            as_rgb(image),
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
