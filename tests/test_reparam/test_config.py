"""The config that is written builds what was merged, and nothing else."""

from mmengine.config import Config

from lors_plugin.reparam.config import deployed_config

STACK = dict(
    type='lors_plugin.LORSStack',
    module=dict(type='VisionTransformer', arch='deit-tiny'),
    targets=['a'],
)
PRETRAINED = dict(type='Pretrained', checkpoint='a.pth')


def deployed(model, **rest):
    cfg = Config(dict(default_scope='mmpretrain', model=model, **rest))
    before = cfg.pretty_text
    new, notes = deployed_config(cfg)
    assert cfg.pretty_text == before
    return new, notes


def test_structure_that_merged_is_gone():
    model = dict(
        type='ImageClassifier',
        backbone=STACK,
        neck=[dict(type='Neck', conv_cfg=dict(type='lors_plugin.RepConv2d'))],
        head=dict(type='Head', conv_cfg=dict(type='Conv2d')),
    )
    hooks = [dict(type='lors_plugin.LORSHook'), dict(type='EMAHook')]
    new, notes = deployed(model, custom_hooks=hooks)
    assert new.model == dict(
        type='ImageClassifier',
        backbone=STACK['module'],
        neck=[dict(type='Neck', conv_cfg=None)],
        head=dict(type='Head', conv_cfg=dict(type='Conv2d')),
    )
    assert new.custom_hooks == [dict(type='EMAHook')]
    assert not notes


def test_no_file_of_pretrained_weights_is_named():
    trunc = dict(type='TruncNormal', layer='Linear', std=0.02)
    model = dict(
        type='ImageClassifier',
        pretrained='a.pth',
        backbone=dict(type='A', init_cfg=PRETRAINED, pretrained=True),
        head=dict(type='B', init_cfg=[trunc, PRETRAINED]),
    )
    new, _ = deployed(model, load_from='a.pth', resume=True, work_dir='w')
    assert new.to_dict() == dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            backbone=dict(type='A', pretrained=True),
            head=dict(type='B', init_cfg=[trunc]),
        ),
    )


REST = dict(
    custom_imports=dict(imports=['lors_plugin', 'mine']),
    val_evaluator=[dict(type='lors_plugin.CocoMetric', backend='faster')],
    default_hooks=dict(
        seed=dict(type='lors_plugin.EpochSeedHook'),
        timer=dict(type='IterTimerHook'),
    ),
    custom_hooks=[dict(type='lors_plugin.FreezeHook', modules=['backbone'])],
)


def test_a_host_model_needs_nothing_of_the_plugin():
    new, notes = deployed(dict(type='ImageClassifier'), **REST)
    assert 'lors_plugin' not in new.pretty_text
    assert new.custom_imports.imports == ['mine']
    assert new.val_evaluator == [dict(type='mmdet.CocoMetric')]
    assert list(new.default_hooks) == ['timer']
    assert 'custom_hooks' not in new
    assert notes == [
        'custom_imports.imports[0] is left out: lors_plugin',
        'default_hooks.seed is left out: lors_plugin.EpochSeedHook',
    ]


def test_a_model_of_the_plugin_keeps_the_rest():
    model = dict(type='lors_plugin.AdaMixer', backbone=dict(type='ResNet'))
    new, notes = deployed(model, **REST)
    for key in ('custom_imports', 'val_evaluator', 'default_hooks'):
        assert new[key] == REST[key]
    assert 'custom_hooks' not in new and not notes


def test_new_style_configs_name_classes():
    from lors_plugin.engine.hooks import RepAdapterHook
    from lors_plugin.evaluation import CocoMetric

    new, _ = deployed(
        dict(type='ImageClassifier'),
        custom_hooks=[dict(type=RepAdapterHook)],
        val_evaluator=dict(type=CocoMetric),
    )
    assert 'custom_hooks' not in new
    assert new.val_evaluator.type == 'mmdet.CocoMetric'
