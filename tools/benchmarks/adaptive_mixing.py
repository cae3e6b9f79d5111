"""Benchmark of adaptive mixing.

All stages of a decoder together, from sampled features and queries to the
output projection: generating the matrices, mixing, projecting. 'bare' is the
four matrix products alone (generator, x M, S y, projection), which no
program can do without; 'torch-recompute' is the modules with
``recompute=True``, which generate the matrices again in backward;
'torch-plain' does without the package's compiled code for CPUs.

Example:
    python tools/benchmarks/adaptive_mixing.py --quick
    python tools/benchmarks/adaptive_mixing.py --device cuda
"""

import contextlib
import sys
from functools import partial

import original
import torch
import torch.nn.functional as F
from driver import make_parser, read_arguments, run
from harness import PLAIN, Lane
from models import build_decoder
from report import Case

EXTRA = ('bare', PLAIN, 'torch-recompute')


@contextlib.contextmanager
def recomputed(mixing):
    """Switch ``recompute`` on for a while."""
    modules = [m for m in mixing.modules() if hasattr(m, 'recompute')]
    for module in modules:
        module.recompute = True
    try:
        yield
    finally:
        for module in modules:
            module.recompute = False


def make_inputs(decoder, batch, queries, seed, device):
    """Sampled features and contents of all stages.

    Returns:
        list[tuple[Tensor]]: For each stage x (B, N, G, P, C) and the query
        (B, N, D), which get gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    width = decoder.feat_channels // decoder.num_groups[0]
    shape = decoder.num_groups[0], decoder.in_points[0], width

    def random(*size):
        values = torch.randn(*size, generator=generator)
        return values.to(device).requires_grad_()

    return [
        (
            random(batch, queries, *shape),
            random(batch, queries, decoder.embed_dims),
        )
        for _ in range(decoder.num_stages)
    ]


def bare_lane(decoder, inputs, dtype):
    """The four matrix products of each stage on tensors made before."""
    shape = getattr(decoder.mixing, 'shape', None) or decoder.mixing[0].shape
    groups, width = shape.groups, shape.width
    leaves, stages = {}, []
    for stage, (x, query) in enumerate(inputs):
        module = decoder.mixing
        if not hasattr(module, 'generator'):
            module = module[stage]
        projection = module.out_proj
        count = x.shape[0] * x.shape[1] * groups

        def random(*size, like=x):
            values = torch.randn(*size, device=like.device)
            return values.to(getattr(torch, dtype)).requires_grad_()

        tensors = dict(
            query=query,
            generator=module.generator.weight,
            x=x,
            channel=random(count, width, width),
            spatial=random(count, shape.out_points, shape.in_points),
            y=random(count, shape.in_points, width),
            mixed=random(*x.shape[:2], shape.num_mixed),
            projection=projection.weight,
        )
        leaves.update({f'{stage}.{k}': v for k, v in tensors.items()})
        stages.append(tensors)

    def products():
        outputs = []
        for t in stages:
            outputs += [
                F.linear(t['query'], t['generator']),
                torch.bmm(t['x'].view(-1, *t['x'].shape[-2:]), t['channel']),
                torch.bmm(t['spatial'], t['y']),
                F.linear(t['mixed'], t['projection']),
            ]
        return outputs

    return Lane('bare', products, leaves, dtype, exact=False)


def make_lanes(args, decoder, queries, batch):
    """All lanes of a case, the reference in float32 first."""
    mixing = decoder.mixing
    inputs = make_inputs(decoder, batch, queries, args.seed, args.device)
    leaves = dict(mixing.named_parameters())
    for stage, (x, query) in enumerate(inputs):
        leaves.update({f'x of {stage}': x, f'query of {stage}': query})

    def stages(function):
        return [function(*pair, i) for i, pair in enumerate(inputs)]

    def shared():
        return stages(mixing.one_pass())

    def recompute():
        with recomputed(mixing):
            return stages(mixing.one_pass())

    makers = [partial(Lane, 'reference', partial(stages, mixing), leaves)]
    if 'original' in args.providers:
        way = partial(original.mixing, mixing)
        makers.append(partial(Lane, 'original', partial(stages, way), leaves))
    for name in args.backends:
        if name != 'reference':
            makers.append(partial(Lane, name, shared, leaves, backend=name))
    if PLAIN in args.providers:
        makers.append(
            partial(Lane, PLAIN, shared, leaves, backend='torch', plain=True)
        )
    if 'torch-recompute' in args.providers:
        makers.append(
            partial(
                Lane,
                'torch-recompute',
                recompute,
                leaves,
                backend='torch',
            )
        )
    if 'bare' in args.providers:
        makers.append(partial(bare_lane, decoder, inputs))
    return [make(dtype=dtype) for dtype in args.dtypes for make in makers]


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
                    groups=decoder.num_groups[0],
                    in_points=decoder.in_points[0],
                    out_points=decoder.out_points[0],
                    width=decoder.feat_channels // decoder.num_groups[0],
                )
                build = partial(make_lanes, args, decoder, queries)
                label = f'{model}, batch {batch}, {queries} queries'
                cases.append(Case(label, config, build, batch))
    return run('adaptive_mixing', args, cases)


if __name__ == '__main__':
    sys.exit(main())
