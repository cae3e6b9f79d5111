"""Names of parts; every parameter of a decoder has one."""

import pytest

from lors_plugin.analysis import part_of


@pytest.mark.parametrize(
    ('name', 'part'),
    [
        ('backbone.layer1.0.conv1.weight', 'backbone'),
        ('backbone.stages.0.attention.weight', 'backbone'),
        ('', 'model'),
        ('decoder.stages.3.attention.qkv.weight', 'attention'),
        ('decoder.stages.3.attention', 'attention'),
        ('decoder.stages.0.attention_norm.bias', 'attention'),
        ('decoder.stages.11.sampling.offsets.weight', 'sampling'),
        ('decoder.mixing.2.generator.bias', 'mixing: generator'),
        ('decoder.mixing.generator.bias', 'mixing: generator'),
        ('decoder.mixing.2', 'mixing: products'),
        ('decoder.mixing', 'mixing: products'),
        ('decoder.mixing.low_rank', 'mixing: low rank'),
        ('decoder.mixing.channel_part.left.0', 'mixing: low rank'),
        ('decoder.mixing.core_generators.5.bias', 'mixing: low rank'),
        ('decoder.mixing.out_proj.down.0', 'mixing: low rank'),
        ('decoder.mixing.out_proj.weight', 'mixing: output projection'),
        ('decoder.stages.0.mixing_norm.weight', 'mixing: output projection'),
        ('decoder.stages.0.ffn_norm.weight', 'FFN'),
        ('decoder.stages.0.reg_branch.0.weight', 'branches'),
        ('decoder.stages.0.fc_cls.bias', 'branches'),
        ('decoder.stages.0', 'decoder'),
        ('decoder.layers.0.self_attn.attn.weight', 'decoder'),
    ],
)
def test_names(name, part):
    whole = ('backbone', 'model', 'decoder')
    assert part_of(name) == (part if part in whole else f'decoder / {part}')


@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_no_parameter_of_the_decoder_is_left_over(kind, tiny_detector):
    names = [name for name, _ in tiny_detector(kind).named_parameters()]
    parts = {part_of(name) for name in names}
    assert 'decoder' not in parts
    assert ('decoder / mixing: low rank' in parts) == (kind == 'lors')
