"""Adapters against other ways to adapt a model.

A ViT-S/14 learns to classify solar cells (ELPV) and to segment road scenes
(CamVid), a MobileNetV2 to detect blood cells (BCCD).
"""

from study import RESUMABLE, Run, Study

CELLS = 'configs/rep_adapter/vit-small-p14_{}_elpv-70px.py'
BLOOD = 'configs/rep_adapter/lors-adamixer_mobilenetv2-{}_49-queries_bccd.py'
SCENES = 'configs/rep_adapter/setr_vit-small-p14-{}_camvid-168x126.py'
PROBE = 'cells/linear-probe'


def cells(name, config, options=None):
    """Describe a training on solar cells; chosen by val, tested once."""
    name = f'cells/{name}'
    against = None if name == PROBE else PROBE
    config = CELLS.format(config)
    return Run(name, config, options or {}, against, best=True, test=True)


STUDY = Study(
    title='Adapters against other ways to adapt a model',
    page='docs/en/benchmarks/rep_adapter.md',
    runs=[
        cells('linear-probe', 'linear-probe'),
        cells('full', 'full'),
        cells('full-lr-1e-5', 'full', {'optim_wrapper.optimizer.lr': 1e-5}),
        cells('lora', 'lora'),
        *(
            cells(
                f'rep-adapter-{placement}-scale-{scale}',
                'rep-adapter',
                {
                    'custom_hooks.RepAdapterHook.placement': placement,
                    'custom_hooks.RepAdapterHook.scale': scale,
                },
            )
            for placement in ('block', 'attn')
            for scale in (1, 5)
        ),
        *(
            Run(
                f'blood/{name}',
                BLOOD.format(name),
                RESUMABLE,
                against=None if name == 'frozen' else 'blood/frozen',
            )
            for name in ('frozen', 'full', 'rep-adapter')
        ),
        *(
            Run(
                f'scenes/{name}',
                SCENES.format(name),
                {'default_hooks.checkpoint.save_optimizer': True},
                against=None if name == 'frozen' else 'scenes/frozen',
            )
            for name in ('frozen', 'rep-adapter', 'full')
        ),
    ],
    metrics=dict(
        test=('test/accuracy/top1', 1),
        validation=('val/accuracy/top1', 1),
        AP=('val/coco/bbox_mAP', 100),
        AP50=('val/coco/bbox_mAP_50', 100),
        AP75=('val/coco/bbox_mAP_75', 100),
        mIoU=('val/mIoU', 1),
        accuracy=('val/aAcc', 1),
    ),
    parts=dict(backbone='backbone'),
)
