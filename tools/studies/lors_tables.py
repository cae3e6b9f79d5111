"""Tables 4 to 8 of LORS: which parts, how large, over how many stages.

The default config is that of the paper, on COCO with eight GPUs' batches; any
other one with a LORSAdaMixerDecoder is trained in its place by --config:

    python tools/studies/run.py lors_tables --runs 'parts/*' --config \
        configs/lors_adamixer/lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py
"""

from bccd import METRICS
from study import RESUMABLE, Run, Study

CONFIG = 'configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py'
LORS = 'parts/both'
PRIVATE, FULL = 'private', 'full'
TABLES = {
    # Table 4: LORS for the generated matrices, for the output projection; with
    # neither it is AdaMixer of as many groups.
    'parts': {
        'both': {},
        'none': dict(adaptive_weights=FULL, static_weights=FULL),
        'adaptive': dict(static_weights=FULL),
        'static': dict(adaptive_weights=FULL),
    },
    # Table 5: shared and private weights.
    'weights': {
        'shared': dict(adaptive_ranks=0, static_ranks=0),
        'private': dict(adaptive_weights=PRIVATE, static_weights=PRIVATE),
        'shared-adaptive': dict(static_ranks=0),
        'shared-static': dict(adaptive_ranks=0),
    },
    # Table 6: parameter groups and rank of the adaptive part.
    'adaptive': {
        f'K{k}-r{r}': dict(adaptive_groups=k, adaptive_ranks=r)
        for k in (1, 2, 3)
        for r in (8, 16, 32)
    },
    # Table 7: of the static part.
    'static': {
        f'K{k}-r{r}': dict(static_groups=k, static_ranks=r)
        for k in (1, 2)
        for r in (4, 8, 16)
    },
    # Table 8; the groups of the adaptive part grow from 1 to 3 in each.
    'stages': {str(n): dict(num_stages=n) for n in (3, 6, 9, 12)},
}

STUDY = Study(
    title='LORS: its parts, their sizes, the number of stages',
    page='docs/en/user_guides/own_data.md',
    runs=[
        Run(
            f'{table}/{name}',
            CONFIG,
            {**RESUMABLE, **{f'model.decoder.{k}': v for k, v in row.items()}},
            against=None if f'{table}/{name}' == LORS else LORS,
        )
        for table, rows in TABLES.items()
        for name, row in rows.items()
    ],
    metrics=METRICS,
    parts=dict(decoder='decoder', mixing='decoder.mixing'),
)
