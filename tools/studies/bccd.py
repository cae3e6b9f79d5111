"""AdaMixer against LORS-AdaMixer on photos of blood cells (BCCD)."""

from study import RESUMABLE, Run, Study

METRICS = {
    label: (f'val/coco/bbox_mAP{suffix}', 100)
    for label, suffix in dict(
        AP='', AP50='_50', AP75='_75', AP_s='_s', AP_m='_m', AP_l='_l'
    ).items()
}
BASELINE = 'adamixer-g2-p32'
CONFIGS = {
    'adamixer-g4-p16': 'adamixer/adamixer_mobilenetv2-g4-p16',
    BASELINE: 'adamixer/adamixer_mobilenetv2-g2-p32',
    'lors-g2-p32': 'lors_adamixer/lors-adamixer_mobilenetv2-g2-p32',
    'shared-only-g2-p32': (
        'lors_adamixer/lors-adamixer_mobilenetv2-g2-p32-shared-only'
    ),
}

STUDY = Study(
    title='BCCD: does LORS keep the accuracy?',
    page='docs/en/benchmarks/bccd.md',
    runs=[
        Run(
            name,
            f'configs/{path}_49-queries_bccd.py',
            RESUMABLE,
            against=None if name == BASELINE else BASELINE,
        )
        for name, path in CONFIGS.items()
    ],
    metrics=METRICS,
    parts=dict(decoder='decoder', mixing='decoder.mixing'),
)
