# One mixing module for all stages, without anything of their own.
_base_ = './lors-adamixer_mobilenetv2-g2-p32_49-queries_bccd.py'

model = dict(decoder=dict(adaptive_ranks=0, static_ranks=0))
