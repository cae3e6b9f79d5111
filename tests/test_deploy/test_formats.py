"""Files of OpenVINO and of torch.export, float16 weights and INT8."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

from lors_plugin.deploy.runtime import load
from lors_plugin.export.torch_file import TorchEngine

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def labelled(classifier, photos, tmp_path_factory):
    """Config and checkpoint of a classifier with photos to test on.

    They are labelled as the exported classifier labels them.
    """
    folder = tmp_path_factory.mktemp('labelled')
    found = load(classifier[2], top=1)(photos)
    lines = [
        f'{path} {result["labels"][0]}' for path, result in zip(photos, found)
    ]
    (folder / 'labels.txt').write_text('\n'.join(lines))
    config = Config.fromfile(classifier[0])
    config.test_dataloader.dataset.update(
        type='CustomDataset', ann_file=str(folder / 'labels.txt')
    )
    config.test_evaluator = dict(type='Accuracy', topk=(1,))
    config.dump(folder / 'b.py')
    return [str(folder / 'b.py'), classifier[1]]


def test_openvino(export, classifier, photos, tmp_path):
    pytest.importorskip('openvino')
    out = tmp_path / 'a.xml'
    assert export([*classifier[:2], str(out)]) == 0
    model, former = load(out), load(classifier[2])
    assert model.classes == former.classes
    said = dict(former.metadata, checksum=model.metadata['checksum'])
    assert model.metadata == said
    for found, wanted in zip(model(photos), former(photos)):
        np.testing.assert_array_equal(found['labels'], wanted['labels'])
        np.testing.assert_allclose(
            found['scores'], wanted['scores'], atol=1e-5
        )
    with pytest.raises(ValueError, match='a file of OpenVINO'):
        load(out, engine='onnxruntime')
    weights = out.with_suffix('.bin')
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match='not as it was exported'):
        load(out)


def test_torch(export, classifier, photos, tmp_path):
    out = tmp_path / 'a.pt2'
    options = ['--fixed-size', '--no-check']
    assert export([*classifier[:2], str(out), *options]) == 0
    engine = TorchEngine(out.read_bytes())
    model = load(out, engine=engine, verify=False, batch_size=3)
    for found, wanted in zip(model(photos), load(classifier[2])(photos)):
        np.testing.assert_array_equal(found['labels'], wanted['labels'])
        np.testing.assert_allclose(
            found['scores'], wanted['scores'], atol=1e-5
        )
    with pytest.raises(ValueError, match='a package of torch.export'):
        load(out)


def test_float16_weights(export, labelled, photos, tmp_path, capsys):
    files = labelled
    half, whole = str(tmp_path / 'half.onnx'), str(tmp_path / 'whole.onnx')
    assert export([*files, whole, '--evaluate']) == 0
    assert ', accuracy/top1 100.0' in capsys.readouterr().out
    assert export([*files, half, '--half', '--evaluate', '4']) == 0
    assert '100.0000 before, 100.0000 after' in capsys.readouterr().out
    model = load(half, top=None)
    assert model.metadata['precision'] == 'float16 weights'
    assert Path(half).stat().st_size < 0.7 * Path(whole).stat().st_size
    for found, wanted in zip(model(photos), load(whole, top=None)(photos)):
        order = np.argsort(found['labels']), np.argsort(wanted['labels'])
        scores = found['scores'][order[0]], wanted['scores'][order[1]]
        np.testing.assert_allclose(*scores, rtol=2e-2, atol=1e-4)
        # Weights were rounded.
        assert (scores[0] != scores[1]).any()


@pytest.mark.parametrize('ending', ['onnx', 'xml'])
def test_int8(ending, export, labelled, photos, tmp_path, capsys):
    if ending == 'xml':
        pytest.importorskip('openvino')
    files, folder = labelled, Path(photos[0]).parent
    out = str(tmp_path / f'int8.{ending}')
    options = ['--int8', '--calibration', str(folder)]
    options += ['--evaluate', '2', '--no-check']
    assert export([*files, out, *options]) == 0
    assert 'before, ' in capsys.readouterr().out
    model = load(out, top=None)
    assert model.metadata['precision'] == 'int8'
    for result in model(photos):
        assert result['scores'].sum() == pytest.approx(1, abs=1e-4)
    if ending == 'onnx':
        nodes = onnx.load(out).graph.node
        kinds = [node.op_type for node in nodes]
        # Activations and weights of each convolution.
        assert kinds.count('DequantizeLinear') >= 2 * kinds.count('Conv') > 0


def test_a_file_that_loses_too_much_is_refused(
    export, labelled, tmp_path, capsys
):
    files = labelled
    out = tmp_path / 'half.onnx'
    options = ['--half', '--no-check', '--evaluate', '--max-drop', '-1']
    assert export([*files, str(out), *options]) == 1
    text = capsys.readouterr().err
    assert 'accuracy/top1 falls from' in text and 'nothing was wr' in text
    assert not out.exists()


@pytest.mark.parametrize(
    'options, word',
    [
        (['a.engine'], 'OUT ends with'),
        (['a.onnx', '--format', 'openvino'], 'end with .xml'),
        (['a.onnx', '--int8'], '--calibration need each other'),
        (['a.pt2', '--half'], 'are for .onnx and .xml'),
    ],
)
def test_options_that_do_not_fit(options, word, export, classifier, capsys):
    with pytest.raises(SystemExit) as error:
        export([*classifier[:2], *options])
    assert error.value.code == 2
    assert word in capsys.readouterr().err


def test_nothing_to_learn_or_to_evaluate(export, classifier, tmp_path, capsys):
    out = str(tmp_path / 'a.onnx')
    options = ['--int8', '--calibration', str(tmp_path), '--no-check']
    assert export([*classifier[:2], out, *options]) == 2
    assert f'no images in {tmp_path}' in capsys.readouterr().err
    assert export([*classifier[:2], out, '--evaluate', '--no-check']) == 2
    assert 'nothing to evaluate on' in capsys.readouterr().err
    assert not Path(out).exists()


def test_the_former_name_of_the_tool(export):
    import export_onnx

    assert export_onnx.main is export
