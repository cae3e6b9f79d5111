"""LORS in a small DeiT on Fashion-MNIST: what the private parts bring.

Twelve blocks with weights of their own, shared ones with parts of rank 4, 8
and 16, shared ones alone, and two plain networks with as many weights in their
blocks as rank 8 has: three blocks, and twelve of half the width.
"""

from study import Run, Study

PLAIN = 'configs/lors_vit/deit-mini_fashion-mnist.py'
LORS = 'configs/lors_vit/lors-deit-mini_fashion-mnist.py'
SHALLOW = {'model.backbone.arch.num_layers': 3}
NARROW = {
    'model.backbone.arch.embed_dims': 32,
    'model.backbone.arch.feedforward_channels': 128,
    'model.head.in_channels': 32,
}

STUDY = Study(
    title='LORS in a DeiT of twelve blocks, Fashion-MNIST',
    page='docs/en/benchmarks/parameternet_evidence.md',
    runs=[
        Run('shared-only', LORS, {'model.backbone.ranks': 0}),
        Run('full', PLAIN, against='shared-only'),
        *(
            Run(
                f'lors-r{rank}',
                LORS,
                {'model.backbone.ranks': rank},
                against='shared-only',
            )
            for rank in (4, 8, 16)
        ),
        Run('three-blocks', PLAIN, SHALLOW, against='lors-r8'),
        Run('half-width', PLAIN, NARROW, against='lors-r8'),
    ],
    metrics=dict(accuracy=('val/accuracy/top1', 1)),
    seeds=(0, 1, 2, 3, 4),
    digits=2,
    parts=dict(blocks='backbone.layers'),
)
