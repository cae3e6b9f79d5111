"""Benchmark of 3D sampling.

From feature levels and points to sampled features, for all stages of a
decoder (``--calls``), which read the same levels. Boxes are of all sizes and
places, as late stages have them.

Example:
    python tools/benchmarks/sampling_3d.py --quick
    python tools/benchmarks/sampling_3d.py --device cuda
"""

import sys
from functools import partial

import original
import torch
from driver import make_parser, read_arguments, run
from harness import Lane
from models import IMAGE, build_decoder, feature_maps, random_boxes
from report import Case

from lors_plugin.ops import sampling_3d, share_levels

FORMATS = dict(nchw=torch.contiguous_format, channels_last=torch.channels_last)


def make_lanes(args, decoder, queries, batch):
    """All lanes of a case, the reference in float32 first."""
    torch.manual_seed(args.seed)
    image, strides = IMAGE[args.size], decoder.strides
    feats = [
        feat.to(args.device, memory_format=FORMATS[args.memory_format])
        for feat in feature_maps(batch, decoder.feat_channels, image, strides)
    ]
    stage = decoder.stages[0].sampling
    points = []
    for _ in range(args.calls):
        content = torch.randn(batch, queries, decoder.embed_dims)
        boxes = random_boxes(batch, queries, image)
        with torch.no_grad():
            made = original.sampling_points(stage, content, boxes)
        points.append(made.to(args.device))
    leaves = {f'level {i}': feat for i, feat in enumerate(feats)}
    leaves.update({f'points {i}': made for i, made in enumerate(points)})
    for leaf in leaves.values():
        leaf.requires_grad_()

    def ours():
        levels = share_levels(feats)
        return [sampling_3d(levels, made, strides) for made in points]

    def theirs():
        return [original.sampling(feats, made, strides) for made in points]

    makers = [partial(Lane, 'reference', ours, leaves)]
    if 'original' in args.providers:
        makers.append(partial(Lane, 'original', theirs, leaves))
    for name in args.backends:
        if name != 'reference':
            makers.append(partial(Lane, name, ours, leaves, backend=name))
    return [make(dtype=dtype) for dtype in args.dtypes for make in makers]


def main(argv=None):
    """Run the benchmark and return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument(
        '--memory-format',
        choices=FORMATS,
        default='nchw',
        help='of the feature levels (default: %(default)s)',
    )
    parser.add_argument(
        '--calls',
        type=int,
        default=6,
        help='how often the levels are sampled (default: %(default)s)',
    )
    args = read_arguments(parser, argv)
    cases = []
    for model in args.models:
        decoder = build_decoder(model, args.size, args.seed)
        for queries in args.queries:
            for batch in args.batch_sizes:
                config = dict(
                    model=model,
                    size=args.size,
                    batch=batch,
                    queries=queries,
                    groups=decoder.num_groups[0],
                    points=decoder.in_points[0],
                    channels=decoder.feat_channels,
                    image=IMAGE[args.size],
                    strides=decoder.strides,
                    calls=args.calls,
                    memory_format=args.memory_format,
                )
                build = partial(make_lanes, args, decoder, queries)
                label = f'{model}, batch {batch}, {queries} queries'
                cases.append(Case(label, config, build, batch))
    return run('sampling_3d', args, cases)


if __name__ == '__main__':
    sys.exit(main())
