"""Benchmark of the whole decoder, all stages.

From feature levels and queries to classes, boxes and contents of all
stages. 'original' computes sampling, mixing and attention as the original
programs do, with the same weights; 'torch-recompute' is the decoder with
``with_cp=True``. ``detector.py`` measures the same end to end.

Example:
    python tools/benchmarks/decoder.py --quick
    python tools/benchmarks/decoder.py --device cuda
"""

import contextlib
import sys
from functools import partial

import original
import torch
from driver import make_parser, read_arguments, run
from harness import Lane
from models import IMAGE, build_decoder, feature_maps, random_boxes
from report import Case

EXTRA = ('torch-recompute',)


@contextlib.contextmanager
def checkpointed(decoder):
    """Switch ``with_cp`` on for a while."""
    decoder.with_cp = True
    try:
        yield
    finally:
        decoder.with_cp = False


def make_lanes(args, decoder, queries, batch):
    """All lanes of a case, the reference in float32 first."""
    torch.manual_seed(args.seed)
    image, device = IMAGE[args.size], args.device
    feats = [
        feat.to(device).requires_grad_()
        for feat in feature_maps(
            batch, decoder.feat_channels, image, decoder.strides
        )
    ]
    content = torch.randn(batch, queries, decoder.embed_dims)
    content = content.to(device).requires_grad_()
    boxes = random_boxes(batch, queries, image).to(device)
    leaves = {f'level {i}': feat for i, feat in enumerate(feats)}
    leaves.update(decoder.named_parameters(), content=content)

    def ours():
        return list(decoder(feats, content, boxes))

    def theirs():
        return list(original.run_decoder(decoder, feats, content, boxes))

    def recompute():
        with checkpointed(decoder):
            return ours()

    makers = [partial(Lane, 'reference', ours, leaves)]
    if 'original' in args.providers:
        makers.append(partial(Lane, 'original', theirs, leaves))
    for name in args.backends:
        if name != 'reference':
            makers.append(partial(Lane, name, ours, leaves, backend=name))
    if 'torch-recompute' in args.providers:
        makers.append(
            partial(
                Lane, 'torch-recompute', recompute, leaves, backend='torch'
            )
        )
    return [make(dtype=dtype) for dtype in args.dtypes for make in makers]


def main(argv=None):
    """Run the benchmark and return the exit code."""
    parser = make_parser(__doc__, EXTRA)
    # Six stages of points that step from cell to cell: the gradients of the
    # first ones differ by some per cent between two right ways to compute.
    parser.set_defaults(gradient_tolerance=0.1)
    args = read_arguments(parser, argv)
    cases = []
    for model in args.models:
        decoder = build_decoder(model, args.size, args.seed).to(args.device)
        for queries in args.queries:
            for batch in args.batch_sizes:
                config = dict(
                    model=model,
                    size=args.size,
                    batch=batch,
                    queries=queries,
                    stages=decoder.num_stages,
                    image=IMAGE[args.size],
                    strides=decoder.strides,
                )
                build = partial(make_lanes, args, decoder, queries)
                label = f'{model}, batch {batch}, {queries} queries'
                cases.append(Case(label, config, build, batch))
    return run('decoder', args, cases)


if __name__ == '__main__':
    sys.exit(main())
