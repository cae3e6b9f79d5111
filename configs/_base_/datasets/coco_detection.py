# MMDetection's COCO, evaluated several times as fast if faster-coco-eval is
# installed.
_base_ = 'mmdet::_base_/datasets/coco_detection.py'

val_evaluator = dict(type='lors_plugin.CocoMetric')
test_evaluator = dict(type='lors_plugin.CocoMetric')
