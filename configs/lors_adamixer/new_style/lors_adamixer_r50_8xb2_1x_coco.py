# LORS-AdaMixer R50 in MMEngine's new style. The same as
# ../lors-adamixer_r50_8xb2-1x_coco.py.
from mmengine.config import read_base

from lors_plugin.adamixer import LORSAdaMixerDecoder

with read_base():
    from .adamixer_r50_8xb2_1x_coco import *  # noqa: F403

model.update(  # noqa: F405
    dict(
        decoder=dict(
            type=LORSAdaMixerDecoder,
            num_groups=2,
            in_points=64,
            adaptive_ranks=16,
            static_ranks=8,
        )
    )
)
