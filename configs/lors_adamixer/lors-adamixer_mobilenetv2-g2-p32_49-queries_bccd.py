# Differs from AdaMixer of two groups in nothing but the shared mixing.
_base_ = '../adamixer/adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

model = dict(
    decoder=dict(
        type='lors_plugin.LORSAdaMixerDecoder',
        adaptive_ranks=6,
        static_ranks=3,
    )
)
