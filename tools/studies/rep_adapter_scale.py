"""Search the scale of adapters on the validation data; nothing is tested.

``--config CONFIG`` searches it for another config with a RepAdapterHook.
"""

from study import Run, Study

STUDY = Study(
    title='Scale of the adapters',
    page='docs/en/benchmarks/rep_adapter.md',
    runs=[
        Run(
            f'scale-{scale}',
            'configs/rep_adapter/vit-small-p14_rep-adapter_elpv-70px.py',
            {'custom_hooks.RepAdapterHook.scale': scale},
            best=True,
        )
        for scale in (0.1, 0.5, 1, 5, 10)
    ],
    metrics=dict(
        validation=('val/accuracy/top1', 1),
        AP=('val/coco/bbox_mAP', 100),
    ),
    seeds=(0,),
)
