"""Benchmark of ParameterNet: inference and training steps of a classifier.

Backbone, pooling and the head of the 600M model with random weights on random
images of 224x224. A training step has losses, backward and AdamW; inference
goes up to the scores. 'original' runs the same model with every dynamic
convolution as one grouped convolution of all images; 'plain' is the same
network with one kernel a layer, GhostNet at the same width, whose difference
is what dynamic convolution costs.

Example:
    python tools/benchmarks/parameternet.py --quick
    python tools/benchmarks/parameternet.py --threads 2 --batch-sizes 1 8
"""

import sys
from functools import partial

import original_parameternet as original
import torch
import torch.nn.functional as F
from driver import make_parser, read_arguments, run
from harness import Lane
from report import Case
from torch import nn

from lors_plugin.parameternet.backbone import ParameterNet
from lors_plugin.testing.weights import randomize

IMAGE = dict(full=224, tiny=32)
TINY = dict(
    width=1.0,
    rows=(((3, 16, 16, 0, 1),), ((5, 24, 16, 0.25, 2), (3, 24, 16, 0, 1))),
)
CLASSES = 1000
# Images that norms see before anything is compared: how often, and their side.
PASSES, SETTLING = 4, 96


class Classifier(nn.Module):
    """The model of the paper up to its scores."""

    def __init__(self, arch, **options):
        super().__init__()
        self.backbone = ParameterNet(arch, **options)
        self.hidden = nn.Conv2d(self.backbone.out_channels[0], 1280, 1)
        self.act = nn.Hardswish()
        self.fc = nn.Linear(1280, CLASSES)

    def forward(self, images):
        """Scores of shape (B, CLASSES)."""
        x = F.adaptive_avg_pool2d(self.backbone(images)[-1], 1)
        return self.fc(self.act(self.hidden(x)).flatten(1))


def build(args, model, dtype=torch.float32, **options):
    """A model with random weights, whose scores depend on the image."""
    arch = TINY if args.size == 'tiny' else model
    routing = args.routing
    net = Classifier(arch, routing=routing, **options)
    net = randomize(net, args.seed).to(args.device, dtype)
    settle(net, args, dtype)
    return net


def settle(net, args, dtype):
    """Let norms see images: with random statistics all images look alike."""
    torch.manual_seed(args.seed)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _ in range(PASSES):
            images = torch.randn(4, 3, SETTLING, SETTLING, dtype=dtype)
            net.train()(images.to(args.device))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def make_lanes(args, nets, dtype, batch):
    """All lanes of a case, the reference in float32 first.

    Args:
        args (argparse.Namespace): Arguments of the command.
        nets (dict): The 'dynamic' and perhaps a 'plain' model.
        dtype (torch.dtype): Of images and weights.
        batch (int): Images.
    """
    torch.manual_seed(args.seed)
    size = IMAGE[args.size]
    images = torch.randn(batch, 3, size, size, dtype=dtype).to(args.device)
    labels = torch.randint(CLASSES, (batch,)).to(args.device)

    def ours(net):
        training = torch.is_grad_enabled()
        scores = net.train(training)(images)
        return [F.cross_entropy(scores, labels) if training else scores]

    def theirs(net):
        with original.replaced():
            return ours(net)

    def make(provider, run, net, backend='reference', **kwargs):
        leaves = dict(net.named_parameters())
        # Takes the time of a step and changes nothing.
        optimizer = torch.optim.AdamW(leaves.values(), lr=0, weight_decay=0)
        return partial(
            Lane,
            provider,
            partial(run, net),
            leaves,
            backend=backend,
            finish=optimizer.step,
            joint=True,
            **kwargs,
        )

    makers = [make('reference', ours, nets['dynamic'])]
    if 'original' in args.providers:
        makers.append(make('original', theirs, nets['dynamic']))
    if 'torch' in args.backends:
        makers.append(make('torch', ours, nets['dynamic'], 'torch'))
    if 'plain' in nets:
        makers.append(make('plain', ours, nets['plain'], exact=False))
    kinds = args.dtypes if dtype == torch.float32 else ['float32']
    return [make(dtype=kind) for kind in kinds for make in makers]


def main(argv=None):
    """Run the benchmark and return the exit code."""
    parser = make_parser(
        __doc__, ('plain',), ('600m', '300m'), ('full', '224x224')
    )
    add = parser.add_argument
    add(
        '--routing',
        choices=['sigmoid_linear', 'softmax_mlp'],
        default='sigmoid_linear',
        help='as released or as in the paper (default: %(default)s)',
    )
    parser.set_defaults(
        models=['600m'],
        batch_sizes=[1, 32],
        dtypes=['float32'],
        modes=['forward', 'full'],
    )
    args = read_arguments(parser, argv)
    cases = []
    for model in args.models:
        nets = dict(dynamic=build(args, model))
        if 'plain' in args.providers:
            nets['plain'] = build(args, model, num_experts=1)
        # Gradients of a deep network tell little in float32.
        wide = dict(dynamic=build(args, model, torch.float64))
        for batch in args.batch_sizes:
            config = dict(
                model=model,
                size=args.size,
                batch=batch,
                image=IMAGE[args.size],
                routing=args.routing,
            )
            cases.append(
                Case(
                    f'{model}, batch {batch}',
                    config,
                    partial(make_lanes, args, nets, torch.float32),
                    batch,
                    rate=True,
                    double=partial(make_lanes, args, wide, torch.float64),
                )
            )
    return run('parameternet', args, cases)


if __name__ == '__main__':
    sys.exit(main())
