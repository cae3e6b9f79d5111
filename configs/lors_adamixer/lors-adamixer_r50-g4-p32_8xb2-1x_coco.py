# The groups and points of AdaMixer's published checkpoints, which
# tools/convert_checkpoint.py --to-lors takes.
_base_ = './lors-adamixer_r50_8xb2-1x_coco.py'

model = dict(decoder=dict(num_groups=4, in_points=32))
