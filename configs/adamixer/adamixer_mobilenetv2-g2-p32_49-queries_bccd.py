# AdaMixer with the two groups of 32 points that LORS-AdaMixer has.
_base_ = './adamixer_mobilenetv2-g4-p16_49-queries_bccd.py'

model = dict(decoder=dict(num_groups=2, in_points=32))
