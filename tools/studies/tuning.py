"""Ways to tune a backbone, side by side: blood cells (BCCD).

LORS-AdaMixer on a MobileNetV2 and on a plain ViT, and MMDetection's RetinaNet
on the ViT; the backbone is frozen, adapted by each method of RepAdapterHook or
tuned as a whole.
"""

from study import RESUMABLE, Run, Study

CONFIG = 'configs/rep_adapter/{}_bccd{}.py'
MOBILENET = 'lors-adamixer_mobilenetv2-{}_49-queries'
VIT = 'lors-adamixer_vit-small-p14-{}_49-queries'
RETINANET = 'retinanet_vit-small-p14-rep-adapter'
METHODS = ('rep_adapter', 'lora', 'bitfit', 'norm')
METHOD = 'custom_hooks.RepAdapterHook.method'
PROBE = 'linear_probe'


def tuning(group, name, config, size='', options=None):
    """Describe a training; compared with the frozen backbone's."""
    return Run(
        f'{group}/{name}',
        CONFIG.format(config, size),
        {**RESUMABLE, **(options or {})},
        against=None if name == PROBE else f'{group}/{PROBE}',
    )


def vit(group, config, method):
    """Describe a training of the ViT by a method of the hook."""
    return tuning(group, method, config, '-168x126', {METHOD: method})


STUDY = Study(
    title='Ways to tune, side by side',
    page='docs/en/benchmarks/rep_adapter.md',
    runs=[
        *(
            vit('vit', VIT.format('rep-adapter'), method)
            for method in (PROBE, *METHODS)
        ),
        tuning('vit', 'full', VIT.format('full'), '-168x126'),
        *(
            vit('retinanet-vit', RETINANET, method)
            for method in (PROBE, 'rep_adapter')
        ),
        tuning('mobilenetv2', PROBE, MOBILENET.format('frozen')),
        *(
            tuning(
                'mobilenetv2',
                method,
                MOBILENET.format(method.replace('_', '-')),
            )
            for method in (*METHODS, 'full')
        ),
    ],
    metrics=dict(
        AP=('val/coco/bbox_mAP', 100),
        AP50=('val/coco/bbox_mAP_50', 100),
        AP75=('val/coco/bbox_mAP_75', 100),
    ),
    parts=dict(backbone='backbone'),
)
