# MMSegmentation's own, in full: MMEngine finds `mmseg::` only where the
# package is installed as mmsegmentation.
default_scope = 'mmseg'

# MMSegmentation has the vision transformers of MMPretrain by their scope.
custom_imports = dict(
    imports=['lors_plugin', 'mmpretrain.models'], allow_failed_imports=False
)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # A resumed training goes on with the photos that are next.
    epoch_seed=dict(type='lors_plugin.EpochSeedHook'),
    # Neither a kill nor a full disk loses a run.
    checkpoint=dict(
        type='lors_plugin.CheckpointHook', by_epoch=False, interval=2000
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer'
)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
