"""What LORS' decoder does differently."""

import torch

from lors_plugin.adamixer.lors_mixing import LORSAdaptiveMixing
from lors_plugin.adamixer.mixing import PrivateMixing


def test_stages_share_the_mixing_object(tiny_decoder):
    decoder = tiny_decoder('lors')
    assert isinstance(decoder.mixing, LORSAdaptiveMixing)
    inside = {id(m) for m in decoder.stages.modules()}
    assert not inside & {id(m) for m in decoder.mixing.modules()}
    keys = [k for k in decoder.state_dict() if k.endswith('generator.weight')]
    assert keys == ['mixing.generator.weight']


def test_adamixer_stages_have_their_own(tiny_decoder):
    decoder = tiny_decoder('adamixer')
    assert isinstance(decoder.mixing, PrivateMixing)
    assert len({id(m) for m in decoder.mixing}) == 3


def test_stages_call_the_shared_mixing_in_turn(tiny_decoder, decoder_inputs):
    decoder = tiny_decoder('lors')
    called = []
    decoder.mixing.register_forward_pre_hook(
        lambda module, args: called.append(args[2])
    )
    decoder(*decoder_inputs())
    assert called == [0, 1, 2]


def test_shared_gradient_is_the_sum_over_stages(tiny_decoder, decoder_inputs):
    """The generator learns from every stage."""
    decoder, inputs = tiny_decoder('lors'), decoder_inputs()
    weight = decoder.mixing.generator.weight
    _, _, contents = decoder(*inputs)
    for stage in range(3):
        (grad,) = torch.autograd.grad(
            contents[stage].square().sum(), weight, retain_graph=True
        )
        assert grad.abs().sum() > 0
    private = decoder.mixing.core_generators[2].weight
    (grad,) = torch.autograd.grad(contents[1].square().sum(), private)
    assert not grad.any()


def test_default_parameter_groups(build):
    six = build(dict(type='lors_plugin.LORSAdaMixerDecoder', num_classes=1))
    assert six.mixing.channel_part.groups == [1, 1, 2, 2, 3, 3]
    assert six.mixing.channel_part.ranks == [16] * 6
    assert [len(down) for down in six.mixing.out_proj.down] == [8] * 6
    assert six.num_groups == [2] * 6
    assert six.in_points == [64] * 6
    assert six.out_points == [128] * 6
    four = build(
        dict(
            type='lors_plugin.LORSAdaMixerDecoder',
            num_classes=1,
            num_stages=4,
            embed_dims=32,
            out_points=4,
        )
    )
    assert four.mixing.channel_part.groups == [1, 1, 2, 3]


def test_options_reach_the_mixing(tiny_decoder):
    decoder = tiny_decoder(
        'lors',
        adaptive_ranks=[1, 0, 2],
        adaptive_groups=2,
        static_ranks=[0, 1, 5],
        generator_init='kaiming',
        fan_in='matrix',
        backend='reference',
    )
    mixing = decoder.mixing
    assert mixing.channel_part.ranks == [1, 0, 2]
    assert mixing.spatial_part.groups == [2, 2, 2]
    assert [len(down) for down in mixing.out_proj.down] == [0, 1, 5]
    assert mixing.generator_init == 'kaiming'
    assert mixing.channel_part.fan_in == 'matrix'
    assert mixing.backend == 'reference'
