"""Benchmark of a whole detector: images per second, training and inference.

Backbone, neck, queries and decoder of a config on random images of 800x1333
(padded to 800x1344) with random weights. Training is a step with losses,
backward and AdamW; inference goes up to the final boxes. 'original' runs
the same detector, sampling and mixing as in the original programs.

Example:
    python tools/benchmarks/detector.py --quick
    python tools/benchmarks/detector.py --device cuda --batch-sizes 1 2 16
"""

import contextlib
import sys
from functools import partial

import original
import torch
from driver import make_parser, read_arguments, run
from harness import Lane
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from models import IMAGE, model_config, spread
from report import Case

from lors_plugin.registry import MODELS
from lors_plugin.testing.weights import randomize


@contextlib.contextmanager
def replaced(decoder):
    """Let a decoder compute as the original for a while."""
    decoder.forward = partial(original.run_decoder, decoder)
    try:
        yield
    finally:
        del decoder.forward


def build_detector(args, model, queries):
    """A detector with random weights, in training mode."""
    init_default_scope('mmdet')
    config = model_config(model, args.size)
    config.query_generator.num_queries = queries
    detector = MODELS.build(config)
    randomize(detector, args.seed)
    spread(detector.decoder, args.seed)
    return detector.to(args.device).train()


def make_samples(batch, image, classes):
    """Annotations: a few boxes an image.

    Args:
        batch (int): Images.
        image (tuple[int]): Padded height and width.
        classes (int): Number of classes.

    Returns:
        list[:obj:`DetDataSample`]: With ``gt_instances``.
    """
    from mmdet.structures import DetDataSample

    height, width = image
    shape = height, width - 11 if width > 1000 else width
    samples = []
    for _ in range(batch):
        first = torch.rand(7, 2) * torch.tensor([width, height]) * 0.7
        size = torch.rand(7, 2) * torch.tensor([width, height]) * 0.25 + 4
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape,
                ori_shape=shape,
                batch_input_shape=image,
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([first, first + size], dim=1),
            labels=torch.randint(classes, (7,)),
        )
        samples.append(sample)
    return samples


def make_lanes(args, detector, batch):
    """All lanes of a case, the reference in float32 first."""
    torch.manual_seed(args.seed)
    image, device = IMAGE[args.size], args.device
    images = torch.randn(batch, 3, *image).to(device)
    classes = detector.decoder.num_classes
    samples = [
        sample.to(device) for sample in make_samples(batch, image, classes)
    ]
    leaves = {
        name: parameter
        for name, parameter in detector.named_parameters()
        if parameter.requires_grad
    }
    # Takes the time of a step and changes nothing.
    optimizer = torch.optim.AdamW(leaves.values(), lr=0.0, weight_decay=0.0)

    def ours():
        if torch.is_grad_enabled():
            losses = detector.loss(images, samples)
            return [sum(losses.values())]
        results = detector.predict(images, samples)
        return [result.pred_instances.scores for result in results]

    def theirs():
        with replaced(detector.decoder):
            return ours()

    makers = [partial(Lane, 'reference', ours, leaves)]
    if 'original' in args.providers:
        makers.append(partial(Lane, 'original', theirs, leaves))
    for name in args.backends:
        if name != 'reference':
            makers.append(partial(Lane, name, ours, leaves, backend=name))
    return [
        make(dtype=dtype, finish=optimizer.step, joint=True)
        for dtype in args.dtypes
        for make in makers
    ]


def main(argv=None):
    """Run the benchmark and return the exit code."""
    parser = make_parser(__doc__)
    # The loss depends on which query is matched to which box, and early
    # gradients differ as in decoder.py.
    parser.set_defaults(tolerance=1e-2, gradient_tolerance=0.1, queries=[100])
    args = read_arguments(parser, argv)
    cases = []
    for model in args.models:
        for queries in args.queries:
            detector = build_detector(args, model, queries)
            for batch in args.batch_sizes:
                config = dict(
                    model=model,
                    size=args.size,
                    batch=batch,
                    queries=queries,
                    image=IMAGE[args.size],
                )
                build = partial(make_lanes, args, detector)
                label = f'{model}, batch {batch}, {queries} queries'
                cases.append(Case(label, config, build, batch, rate=True))
    return run('detector', args, cases)


if __name__ == '__main__':
    sys.exit(main())
