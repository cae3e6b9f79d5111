"""Benchmark of the whole decoder, all stages.

From feature levels and queries to classes, boxes and contents of all
stages. 'original' computes sampling, mixing and attention as the original
programs do, with the same weights; 'torch-recompute' is the decoder with
``with_cp=True``; 'torch-plain' does without the package's compiled code for
CPUs. ``detector.py`` measures the same end to end.

Example:
    python tools/benchmarks/decoder.py --quick
    python tools/benchmarks/decoder.py --device cuda
"""

import contextlib
import sys
from copy import deepcopy
from functools import partial

import original
import torch
from driver import make_parser, read_arguments, run
from harness import PLAIN, Lane
from models import IMAGE, build_decoder, feature_maps, random_boxes
from report import Case

EXTRA = (PLAIN, 'torch-recompute')


@contextlib.contextmanager
def checkpointed(decoder):
    """Switch ``with_cp`` on for a while."""
    decoder.with_cp = True
    try:
        yield
    finally:
        decoder.with_cp = False


def make_lanes(args, decoder, queries, batch, dtype=torch.float32):
    """All lanes of a case, the reference in float32 first.

    In float64 there is no autocast, and no Triton.
    """
    torch.manual_seed(args.seed)
    image, device = IMAGE[args.size], args.device
    feats = [
        feat.to(device, dtype).requires_grad_()
        for feat in feature_maps(
            batch, decoder.feat_channels, image, decoder.strides
        )
    ]
    content = torch.randn(batch, queries, decoder.embed_dims)
    content = content.to(device, dtype).requires_grad_()
    boxes = random_boxes(batch, queries, image).to(device, dtype)
    if dtype == torch.float64:
        decoder = deepcopy(decoder).double()
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
        if name != 'reference' and (name, dtype) != ('triton', torch.float64):
            makers.append(partial(Lane, name, ours, leaves, backend=name))
    if PLAIN in args.providers:
        makers.append(
            partial(Lane, PLAIN, ours, leaves, backend='torch', plain=True)
        )
    if 'torch-recompute' in args.providers:
        makers.append(
            partial(
                Lane, 'torch-recompute', recompute, leaves, backend='torch'
            )
        )
    names = args.dtypes if dtype == torch.float32 else ['float32']
    return [make(dtype=name) for name in names for make in makers]


def main(argv=None):
    """Run the benchmark and return the exit code."""
    args = read_arguments(make_parser(__doc__, EXTRA), argv)
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
                # Points step from cell to cell, so that in float32 gradients
                # of the first stages differ by several per cent between two
                # right ways to compute them.
                double = partial(build, dtype=torch.float64)
                cases.append(Case(label, config, build, batch, double=double))
    return run('decoder', args, cases)


if __name__ == '__main__':
    sys.exit(main())
