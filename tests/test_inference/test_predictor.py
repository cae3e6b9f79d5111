"""Predictions are those of the hosts, and files that do not fit are told."""

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from lors_plugin.adapters import (
    adapter_checkpoint,
    adapters_of,
    remove_adapters,
)
from lors_plugin.adapters.checkpoint import META
from lors_plugin.build import build_model
from lors_plugin.inference import (
    InferenceError,
    adapters_off,
    load_predictor,
)
from lors_plugin.testing import randomize

CLASSES = ('cat', 'dog', '牛')


def test_a_detector_predicts_as_in_the_host(predictor, photo):
    """MMDetection's own way from a file to boxes."""
    from mmdet.apis import inference_detector

    found = predictor('detector')
    assert found.detects and found.classes == CLASSES
    image = found.read(photo)
    assert image.shape == (120, 180, 3)
    (prediction,) = found([image])
    model = found.model
    model.cfg = found.cfg
    with DefaultScope.overwrite_default_scope('mmdet'):
        expected = inference_detector(model, image).pred_instances
    boxes = expected.bboxes.clamp(min=0).minimum(
        torch.tensor([180, 120, 180, 120])
    )
    np.testing.assert_allclose(prediction.boxes, boxes, atol=1e-3)
    np.testing.assert_allclose(prediction.scores, expected.scores, atol=1e-6)
    assert prediction.labels.tolist() == expected.labels.tolist()
    assert (np.diff(prediction.scores) <= 0).all()


def test_a_classifier_predicts_as_in_the_host(predictor, photo):
    from mmpretrain.apis import ImageClassificationInferencer

    found = predictor('classifier')
    assert not found.detects and found.classes == CLASSES
    (prediction,) = found([found.read(photo)])
    found.model._config = found.cfg
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        host = ImageClassificationInferencer(found.model, classes=CLASSES)
        (expected,) = host(found.read(photo))
    assert prediction.boxes is None
    assert prediction.labels[0] == expected['pred_label']
    np.testing.assert_allclose(
        prediction.scores, np.sort(expected['pred_scores'])[::-1], rtol=1e-5
    )


@pytest.mark.parametrize('kind', ['detector', 'classifier'])
def test_a_batch_predicts_as_single_images(predictor, photo, kind):
    found = predictor(kind)
    image = found.read(photo)
    images = [image, image[::-1], 255 - image]
    together = found(images)
    for one, image in zip(together, images):
        (alone,) = found([image])
        np.testing.assert_allclose(one.scores, alone.scores, atol=1e-5)
        assert one.labels.tolist() == alone.labels.tolist()


@pytest.mark.parametrize(
    ('kind', 'ending', 'options'),
    [
        ('detector', 'onnx', []),
        ('classifier', 'onnx', ['--input', 'uint8', '--static']),
        ('classifier', 'xml', ['--input', 'normalized']),
    ],
)
def test_exported_files_predict_as_pytorch(
    predictor,
    weights,
    photo,
    tmp_path,
    kind,
    ending,
    options,
    new_config,
):
    pytest.importorskip('openvino' if ending == 'xml' else 'onnxruntime')
    import export

    cfg = new_config(kind)
    (tmp_path / 'config.py').write_text(cfg.pretty_text)
    path = tmp_path / f'model.{ending}'
    argv = [str(tmp_path / 'config.py'), str(weights[kind]), str(path)]
    assert export.main([*argv, '--no-check', *options]) == 0
    found = load_predictor(cfg, path)
    assert found.detects == (kind == 'detector')
    assert found.classes == CLASSES
    image = found.read(photo)
    images = [image, image[::-1]]
    for one, expected in zip(found(images), predictor(kind)(images)):
        np.testing.assert_allclose(one.scores, expected.scores, atol=2e-4)
        # Classes of nearly equal scores may change places.
        assert one.labels[0] == expected.labels[0]
        if kind == 'detector':
            np.testing.assert_allclose(
                one.boxes[0], expected.boxes[0], atol=0.05
            )
    with pytest.raises(InferenceError, match='on the CPU'):
        load_predictor(cfg, path, amp=True)


@pytest.mark.parametrize('name', ['a.onnx', 'a.xml'])
@pytest.mark.parametrize('content', [None, b'', b'text'])
def test_exported_files_of_others(tmp_path, content, name, new_config):
    pytest.importorskip('openvino' if name == 'a.xml' else 'onnxruntime')
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InferenceError, match=name):
        load_predictor(new_config('detector'), path)


def test_adapters_are_off_within_a_block_only(photo, tmp_path, new_config):
    hook = dict(type='lors_plugin.RepAdapterHook', hidden_dims=4)
    cfg = new_config('classifier', custom_hooks=[hook])
    model = randomize(build_model(cfg), 0)
    state = model.state_dict()
    torch.save(dict(state_dict=state), tmp_path / 'adapted.pth')
    base = {k: v for k, v in state.items() if 'rep_adapter' not in k}
    torch.save(dict(state_dict=base), tmp_path / 'base.pth')
    found = load_predictor(cfg, tmp_path / 'adapted.pth')
    plain = load_predictor(new_config('classifier'), tmp_path / 'base.pth')
    images = [found.read(photo)]
    before = found(images)[0].scores
    with adapters_off(found.model) as number:
        off = found(images)[0].scores
    assert number == len(adapters_of(found.model)) > 0
    np.testing.assert_array_equal(off, plain(images)[0].scores)
    np.testing.assert_array_equal(found(images)[0].scores, before)
    assert np.abs(before - off).max() > 1e-4


@pytest.fixture
def adapter_file(tmp_path, new_config):
    """A config with adapters, and where its files are.

    Returns:
        tuple: The config, the whole model, and a function that writes the
        adapter file with the name of its base.
    """
    hook = dict(type='lors_plugin.RepAdapterHook', hidden_dims=4)
    cfg = new_config('classifier', custom_hooks=[hook])
    model = randomize(build_model(cfg), 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_('adapter' in name or 'head' in name)
    whole, path, base = (
        tmp_path / name for name in ('whole.pth', 'adapter.pth', 'base.pth')
    )
    torch.save(dict(state_dict=model.state_dict()), whole)
    content = adapter_checkpoint(model, hook)
    remove_adapters(model)
    torch.save(dict(state_dict=model.state_dict()), base)
    backbone = model.backbone.state_dict()
    torch.save(dict(state_dict=backbone), tmp_path / 'backbone.pth')

    def write(source=None):
        content['meta'][META]['source'] = source
        torch.save(content, path)
        return path

    return cfg, whole, write


@pytest.mark.parametrize(
    'base_from', ['init_cfg', 'hook', 'file', 'base', 'backbone']
)
def test_adapter_files_find_their_base(
    adapter_file, photo, tmp_path, base_from
):
    cfg, whole, write = adapter_file
    base = str(tmp_path / 'base.pth')
    path = write(base if base_from == 'file' else None)
    expected = load_predictor(cfg, whole)
    given = {}
    if base_from == 'init_cfg':
        cfg.model.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth')
        )
    elif base_from == 'hook':
        cfg.custom_hooks[0]['base'] = base
    elif base_from != 'file':
        given = dict(base=tmp_path / f'{base_from}.pth')
    found = load_predictor(cfg, path, **given)
    images = [found.read(photo)]
    assert adapters_of(found.model).keys() == (
        adapters_of(expected.model).keys()
    )
    np.testing.assert_array_equal(
        found(images)[0].scores, expected(images)[0].scores
    )


def test_adapter_files_without_their_base(adapter_file, tmp_path):
    cfg, whole, write = adapter_file
    other = torch.load(tmp_path / 'base.pth')
    other['state_dict']['backbone.cls_token'] += 1
    torch.save(other, tmp_path / 'other.pth')
    for source, base, expected in (
        (None, None, 'adapter.pth: .*--base names'),
        ('gone.pth', None, 'adapter.pth: its base gone.pth is not there'),
        (None, 'other.pth', 'adapter.pth: .*cls_token'),
    ):
        path = write(source)
        with pytest.raises(InferenceError, match=f'(?s){expected}'):
            load_predictor(cfg, path, base=base and tmp_path / base)
    with pytest.raises(InferenceError, match='leave out the base'):
        load_predictor(cfg, whole, base=tmp_path / 'base.pth')


@pytest.mark.parametrize('content', [None, b'', b'no image'])
def test_images_that_cannot_be_read(predictor, tmp_path, content):
    path = tmp_path / 'bad.jpg'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InferenceError, match=r'bad\.jpg'):
        predictor('detector').read(path)


def test_images_too_thin_to_be_resized(predictor):
    thin = np.zeros((1, 3000, 3), np.uint8)
    with pytest.raises(InferenceError, match='3000 x 1'):
        predictor('detector')([thin])


def test_predictions_that_are_not_finite(weights, photo, tmp_path, new_config):
    content = torch.load(weights['detector'])
    content['state_dict']['decoder.stages.1.fc_reg.bias'].fill_(3e38)
    torch.save(content, tmp_path / 'large.pth')
    found = load_predictor(new_config('detector'), tmp_path / 'large.pth')
    with pytest.raises(InferenceError, match='NaN or inf'):
        found([found.read(photo)])


def test_classes_by_name_or_number(predictor):
    found = predictor('detector')
    assert found.labels_of(['牛', '0']) == [2, 0]
    for wrong in ('bird', '3'):
        with pytest.raises(InferenceError, match=f"class '{wrong}'"):
            found.labels_of([wrong])


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda cfg: cfg.pop('test_dataloader'), 'no test pipeline'),
        (lambda cfg: cfg.pop('model'), 'has no model'),
        (lambda cfg: cfg.update(default_scope='mmseg'), 'MMSegInferencer'),
    ],
)
def test_configs_that_lack_something(weights, change, expected, new_config):
    cfg = new_config('detector')
    change(cfg)
    with pytest.raises(InferenceError, match=expected):
        load_predictor(cfg, weights['detector'])
