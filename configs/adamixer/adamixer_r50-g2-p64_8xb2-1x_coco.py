# The fair baseline of LORS: the groups and sampled points that it has.
_base_ = './adamixer_r50_8xb2-1x_coco.py'

model = dict(decoder=dict(num_groups=2, in_points=64))
