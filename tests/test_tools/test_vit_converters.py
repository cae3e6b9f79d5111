"""Converters of vision transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[2] / 'tools' / 'model_converters'
WIDTH, HEADS, LAYERS, PATCH, HIDDEN = 12, 2, 2, 4, 20


def make_vit(**options):
    from mmpretrain.models import VisionTransformer

    model = VisionTransformer(
        arch=dict(
            embed_dims=WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            feedforward_channels=HIDDEN,
        ),
        img_size=8,
        patch_size=PATCH,
        out_type='raw',
        **options,
    )
    model.eval()
    return model


@pytest.fixture
def npz():
    """Random weights in the layout of the JAX program."""
    head = WIDTH // HEADS
    shapes = {
        'cls': (1, 1, WIDTH),
        'embedding/kernel': (PATCH, PATCH, 3, WIDTH),
        'embedding/bias': (WIDTH,),
        'Transformer/posembed_input/pos_embedding': (1, 5, WIDTH),
        'Transformer/encoder_norm/scale': (WIDTH,),
        'Transformer/encoder_norm/bias': (WIDTH,),
        'head/kernel': (WIDTH, 7),
        'head/bias': (7,),
    }
    for i in range(LAYERS):
        block = f'Transformer/encoderblock_{i}/'
        attention = f'{block}MultiHeadDotProductAttention_1/'
        for norm in ('LayerNorm_0', 'LayerNorm_2'):
            shapes[f'{block}{norm}/scale'] = (WIDTH,)
            shapes[f'{block}{norm}/bias'] = (WIDTH,)
        for part in ('query', 'key', 'value'):
            shapes[f'{attention}{part}/kernel'] = (WIDTH, HEADS, head)
            shapes[f'{attention}{part}/bias'] = (HEADS, head)
        shapes[f'{attention}out/kernel'] = (HEADS, head, WIDTH)
        shapes[f'{attention}out/bias'] = (WIDTH,)
        for name, sizes in (
            ('Dense_0', (WIDTH, HIDDEN)),
            ('Dense_1', (HIDDEN, WIDTH)),
        ):
            shapes[f'{block}MlpBlock_3/{name}/kernel'] = sizes
            shapes[f'{block}MlpBlock_3/{name}/bias'] = sizes[1:]
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype('f4') for k, s in shapes.items()}


def jax_forward(weights, image):
    """What the JAX program computes, in its own layout."""
    w = {k: torch.from_numpy(v) for k, v in weights.items()}

    def norm(x, name):
        shape = (WIDTH,)
        scale, bias = w[f'{name}/scale'], w[f'{name}/bias']
        return F.layer_norm(x, shape, scale, bias, eps=1e-6)

    x = image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    x = torch.einsum('bcyxij,ijco->byxo', x, w['embedding/kernel'])
    x = (x + w['embedding/bias']).flatten(1, 2)
    x = torch.cat([w['cls'].expand(len(x), 1, WIDTH), x], 1)
    x = x + w['Transformer/posembed_input/pos_embedding']
    for i in range(LAYERS):
        block = f'Transformer/encoderblock_{i}/'
        attention = f'{block}MultiHeadDotProductAttention_1/'
        y = norm(x, f'{block}LayerNorm_0')
        q, k, v = (
            torch.einsum('bnd,dhe->bhne', y, w[f'{attention}{part}/kernel'])
            + w[f'{attention}{part}/bias'][:, None]
            for part in ('query', 'key', 'value')
        )
        weight = (q @ k.mT / (WIDTH // HEADS) ** 0.5).softmax(-1)
        y = torch.einsum('bhne,hed->bnd', weight @ v,
                         w[f'{attention}out/kernel'])  # fmt: skip
        x = x + y + w[f'{attention}out/bias']
        y = norm(x, f'{block}LayerNorm_2')
        for name in ('Dense_0', 'Dense_1'):
            dense = f'{block}MlpBlock_3/{name}/'
            y = y @ w[f'{dense}kernel'] + w[f'{dense}bias']
            y = F.gelu(y) if name == 'Dense_0' else y
        x = x + y
    return norm(x, 'Transformer/encoder_norm')


def test_npz_computes_the_same(npz, tmp_path):
    import vit_npz

    np.savez(tmp_path / 'a.npz', **npz)
    target = tmp_path / 'new' / 'b.pth'
    assert vit_npz.main([str(tmp_path / 'a.npz'), str(target)]) == 0
    model = make_vit()
    state = torch.load(target, weights_only=True)['state_dict']
    state = {k.removeprefix('backbone.'): v for k, v in state.items()}
    model.load_state_dict(state, strict=True)
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        (tokens,) = model(image)
    torch.testing.assert_close(
        tokens, jax_forward(npz, image), rtol=1e-4, atol=1e-5
    )


def test_npz_refuses_others(npz, tmp_path, caplog):
    import vit_npz

    path = tmp_path / 'a.npz'
    del npz['Transformer/encoderblock_1/LayerNorm_2/bias']
    np.savez(path, **npz)
    assert vit_npz.main([str(path), str(tmp_path / 'b.pth')]) == 1
    assert 'LayerNorm_2/bias is missing' in caplog.text
    whole = path.read_bytes()
    for damaged in (b'no archive', b'', whole[:200]):
        path.write_bytes(damaged)
        assert vit_npz.main([str(path), str(tmp_path / 'b.pth')]) == 1
        assert 'a.npz is no .npz file' in caplog.records[-1].getMessage()
    assert not (tmp_path / 'b.pth').exists()


def test_focus_refuses_another_file(tmp_path, caplog):
    pytest.importorskip('onnx')
    import vit_small_focus

    path = tmp_path / 'a.onnx'
    path.write_bytes(b'something else')
    assert vit_small_focus.main([str(path), str(tmp_path / 'b.pth')]) == 1
    assert 'sha256' in caplog.text
    assert not (tmp_path / 'b.pth').exists()


def test_focus_keys_fit():
    """Names of the file, each with a place in the model."""
    import vit_small_focus

    model = make_vit(layer_scale_init_value=1e-5)
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items()}
    source = dict(
        zip(
            ('positions.cls', 'positions.patches'),
            state['pos_embed'].split([1, 4], 1),
        )
    )
    source['embeddings.cls_token'] = state['cls_token']
    for part in ('weight', 'bias'):
        key = 'patch_embed.projection'
        name = 'embeddings.patch_embeddings.projection'
        source[f'{name}.{part}'] = state[f'{key}.{part}']
        source[f'layernorm.{part}'] = state[f'ln1.{part}']
    for i in range(LAYERS):
        layer, old = f'layers.{i}.', f'encoder.layer.{i}.'
        for n, kind in ((1, 'attn'), (2, 'ffn')):
            gamma = state[f'{layer}{kind}.gamma{n}.weight']
            source[f'{old}layer_scale{n}.lambda1'] = gamma
        for part in ('weight', 'bias'):
            for name, key in (
                ('norm1', 'ln1'),
                ('norm2', 'ln2'),
                ('attention.output.dense', 'attn.proj'),
                ('mlp.fc1', 'ffn.layers.0.0'),
                ('mlp.fc2', 'ffn.layers.1'),
            ):
                source[f'{old}{name}.{part}'] = state[f'{layer}{key}.{part}']
            parts = state[f'{layer}attn.qkv.{part}'].chunk(3)
            for name, value in zip(('query', 'key', 'value'), parts):
                source[f'{old}attention.attention.{name}.{part}'] = value
    target = vit_small_focus.map_keys(source)
    assert target.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(target[key], value), key
