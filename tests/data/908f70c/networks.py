"""What ``make.py`` records: small networks, and trainings of them."""

SIDE = 64  # of images


def detector(kind='AdaMixer', levels=4, **decoder):
    """A detector of three stages, 16 wide."""
    indices = list(range(levels))
    return dict(
        type='lors_plugin.AdaMixer',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[120.0, 115.0, 100.0],
            std=[58.0, 57.0, 56.0],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=2,
            num_stages=levels,
            strides=[1, 2, 2, 2][:levels],
            dilations=[1] * levels,
            out_indices=indices,
            norm_eval=True,
        ),
        neck=dict(
            type='lors_plugin.SharedNormChannelMapping',
            in_channels=[2 * 2**i for i in indices],
            out_channels=16,
            num_norm_groups=4,
        ),
        query_generator=dict(
            type='lors_plugin.InitialQueryGenerator',
            num_queries=5,
            embed_dims=16,
        ),
        decoder=dict(
            type=f'lors_plugin.{kind}Decoder',
            num_classes=2,
            num_stages=3,
            strides=[4 * 2**i for i in indices],
            embed_dims=16,
            num_groups=2,
            in_points=4,
            out_points=6,
            num_heads=2,
            feedforward_channels=24,
            **decoder,
        ),
    )


def lors_detector(levels=1, **decoder):
    """The same with shared mixing, and fewer levels for small files."""
    ranks = dict(adaptive_ranks=[1, 2, 3], static_ranks=[2, 1, 3])
    groups = dict(adaptive_groups=[1, 2, 3])
    return detector('LORSAdaMixer', levels, **{**ranks, **groups, **decoder})


def classifier(backbone, head, neck=None):
    """A classifier of two classes."""
    return dict(
        type='ImageClassifier',
        data_preprocessor=dict(
            mean=[120.0, 115.0, 100.0],
            std=[58.0, 57.0, 56.0],
            num_classes=2,
        ),
        backbone=backbone,
        neck=neck,
        head=dict(num_classes=2, **head),
    )


def parameternet(**options):
    """A ParameterNet of three stages, with squeeze-and-excitation."""
    rows = [[(3, 16, 16, 0, 1)], [(5, 24, 20, 0.25, 2)]]
    return classifier(
        dict(
            type='lors_plugin.ParameterNet',
            arch=dict(width=0.5, rows=rows),
            **options,
        ),
        dict(
            type='StackedLinearClsHead',
            in_channels=12,
            mid_channels=[16],
            act_cfg=dict(type='HSwish'),
        ),
        dict(type='GlobalAveragePooling'),
    )


def vit(**options):
    """The backbone of a small vision transformer."""
    return dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=12, num_layers=3, num_heads=3, feedforward_channels=24
        ),
        img_size=SIDE,
        patch_size=16,
        **options,
    )


VIT_HEAD = dict(type='VisionTransformerClsHead', in_channels=12)
STACK = dict(
    targets=[
        r'layers\.(\d+)\.attn\.qkv',
        dict(pattern=r'layers\.(\d+)\.ffn\.layers\.0\.0', ranks=[3, 0, 2]),
        r'layers\.(\d+)\.ffn\.layers\.1',
    ],
    ranks=2,
    groups=[1, 2, 1],
)
SWIN = dict(
    type='lors_plugin.DynamicSwinTransformer',
    arch=dict(embed_dims=4, depths=[1, 2], num_heads=[1, 2]),
    img_size=SIDE,
    window_size=4,
    out_indices=(1,),
    num_experts=3,
)
LINEAR_STACK = dict(
    type='lors_plugin.LowRankLinearStack',
    in_features=7,
    out_features=5,
    num_layers=3,
)
CASES = {
    'adamixer': ('mmdet', detector()),
    'lors_adamixer': ('mmdet', lors_detector(2)),
    'lors_adamixer_shared_only': (
        'mmdet',
        lors_detector(adaptive_ranks=[0, 2, 0], static_ranks=[0, 0, 2]),
    ),
    'lors_adamixer_private': (
        'mmdet',
        lors_detector(adaptive_weights='private', static_weights='private'),
    ),
    'lors_adamixer_full': (
        'mmdet',
        lors_detector(adaptive_weights='full', static_weights='full'),
    ),
    'parameternet': ('mmpretrain', parameternet()),
    'parameternet_softmax': (
        'mmpretrain',
        parameternet(routing='softmax_mlp', num_experts=3),
    ),
    'ghostnet_rep': (
        'mmpretrain',
        parameternet(conv='rep', num_branches=2),
    ),
    'dynamic_swin': (
        'mmpretrain',
        classifier(
            SWIN,
            dict(type='LinearClsHead', in_channels=8),
            dict(type='GlobalAveragePooling'),
        ),
    ),
    'low_rank_linear_stack': (
        'mmpretrain',
        dict(LINEAR_STACK, ranks=[2, 0, 1], groups=[2, 1, 1]),
    ),
    'low_rank_linear_stack_private': (
        'mmpretrain',
        dict(LINEAR_STACK, ranks=[2, 3, 1], with_shared=False, bias=False),
    ),
    'lors_stack': (
        'mmpretrain',
        classifier(
            dict(type='lors_plugin.LORSStack', module=vit(), **STACK),
            VIT_HEAD,
        ),
    ),
    'vit': ('mmpretrain', classifier(vit(), VIT_HEAD)),
}


def run(scope, model, dataset, evaluator, hooks=(), **options):
    """Config of a training of two epochs."""
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dataset,
    )
    return dict(
        default_scope=scope,
        model=model,
        train_dataloader=loader,
        test_dataloader=loader,
        test_evaluator=evaluator,
        train_cfg=dict(by_epoch=True, max_epochs=2),
        test_cfg=dict(),
        # Momentum has to meet the same weights when a run is resumed.
        optim_wrapper=dict(
            optimizer=dict(
                type='SGD', lr=0.02, momentum=0.9, weight_decay=0.01
            ),
            paramwise_cfg=dict(norm_decay_mult=0.0),
            clip_grad=dict(max_norm=1.0),
        ),
        custom_hooks=list(hooks),
        randomness=dict(seed=0),
        log_level='WARNING',
        **options,
    )


def runs():
    """Configs of all trainings by name."""
    load = dict(type='LoadImageFromFile')
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    boxes = dict(
        type='CocoDataset',
        ann_file='annotations.json',
        data_prefix=dict(img='images'),
        metainfo=dict(classes=('a', 'b')),
        pipeline=[
            load,
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(SIDE, SIDE)),
            dict(type='PackDetInputs', meta_keys=meta),
        ],
    )
    classes = dict(
        type='CustomDataset',
        data_root='images',
        pipeline=[load, dict(type='PackInputs')],
    )
    average = dict(type='EMAHook', momentum=0.25)
    adapter = dict(
        type='lors_plugin.RepAdapterHook',
        hidden_dims=4,
        groups=2,
        scale=0.5,
        dropout=0.0,
        trainable=[r'layers\.\d\.ln2'],
    )
    stack = dict(type='lors_plugin.LORSHook', module='backbone', **STACK)
    plain = ('mmpretrain', CASES['vit'][1], classes, dict(type='Accuracy'))
    small = dict(adapter, adapter_only=True, base='vit.pt')
    return {
        'lors_adamixer_run': run(
            *CASES['lors_adamixer'],
            boxes,
            dict(
                type='lors_plugin.CocoMetric',
                ann_file='annotations.json',
                metric='bbox',
            ),
            load_from='lors_adamixer.pt',
        ),
        'adapters': run(*plain, [adapter, average], load_from='vit.pt'),
        'adapters_only': run(*plain, [small]),
        'lors_hook': run(*plain, [stack, average], load_from='vit.pt'),
    }
