_base_ = [
    '../_base_/models/adamixer_r50.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamixer_1x.py',
    '../_base_/default_runtime.py',
]
