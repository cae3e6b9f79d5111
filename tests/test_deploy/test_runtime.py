"""Exported files, opened where PyTorch cannot be imported."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from lors_plugin.deploy.runtime import (
    Classifier,
    Detector,
    ImageError,
    load,
    stack,
)

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

ENGINES = ['onnxruntime', 'openvino']
# Another process, where nothing but NumPy, OpenCV and an engine is found.
ELSEWHERE = """
import sys
import numpy as np

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in REFUSED:
            raise ImportError(f'{name} is not installed')

REFUSED = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain',
           'onnx', 'scipy', 'PIL', 'matplotlib')
sys.meta_path.insert(0, Refuse())
from lors_plugin.deploy.runtime import load

path, engine, out, *images = sys.argv[1:]
model = load(path, engine=engine, threads=1, batch_size=2)
found = model(images)
np.savez(out, **{
    f'{i}.{key}': value for i, each in enumerate(found)
    for key, value in each.items()
})
print(type(model).__name__, *model.classes)
# The signal stack of OpenVINO went with its model: the next signal ended the
# process without a message.
import signal, subprocess, threading
signal.signal(signal.SIGCHLD, lambda *_: None)
model = [model]
thread = threading.Thread(target=model.clear)
thread.start()
thread.join()
subprocess.run(['true'])
"""


@pytest.fixture(scope='module')
def infer(detector, photos):
    """Detections of MMDetection's inferencer in the photos, by batch size.

    Images of a batch are padded to one size, which changes what is found.
    """
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(
        detector.config,
        detector.checkpoint,
        device='cpu',
        show_progress=False,
    )
    results = {}
    for batch_size in (1, 2, 3):
        found = inferencer(photos, batch_size=batch_size)['predictions']
        for each in found:
            each['boxes'] = each.pop('bboxes')
        results[batch_size] = found
    return results


@pytest.fixture
def wanted(infer):
    """Of one image at a time."""
    return infer[1]


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for image, right in zip(found, wanted):
        np.testing.assert_array_equal(image['labels'], right['labels'])
        np.testing.assert_allclose(image['scores'], right['scores'], atol=2e-5)
        np.testing.assert_allclose(image['boxes'], right['boxes'], atol=5e-3)


@pytest.mark.parametrize('kind', ['float', 'normalized'])
def test_detections_are_those_of_the_inferencer(kind, file_of, photos, infer):
    model = Detector(file_of(kind), threads=1)
    assert model.classes == ('a', 'b', 'c')
    assert_same(model(photos), infer[1])
    several = Detector(file_of(kind), batch_size=3)
    assert_same(list(several.stream(photos)), infer[3])
    arrays = [cv2.imread(path) for path in photos]
    assert_same(model(arrays), infer[1])
    rgb = Detector(file_of(kind), channel_order='RGB')
    assert_same(rgb([array[..., ::-1] for array in arrays]), infer[1])


@pytest.mark.parametrize('engine', ENGINES)
def test_without_pytorch(engine, file_of, photos, infer, tmp_path):
    pytest.importorskip(engine)
    out = str(tmp_path / 'found.npz')
    command = [sys.executable, '-c', ELSEWHERE, file_of(), engine, out]
    done = subprocess.run(
        [*command, *photos], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['Detector', 'a', 'b', 'c']
    with np.load(out) as data:
        found = [
            {key: data[f'{i}.{key}'] for key in infer[2][0]}
            for i in range(len(photos))
        ]
    assert_same(found, infer[2])


@pytest.mark.parametrize('engine', ENGINES)
def test_many_threads_share_a_model(engine, file_of, photos, wanted):
    pytest.importorskip(engine)
    model = Detector(file_of(), engine=engine, threads=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: model([path])[0], photos * 6))
    assert_same(found, wanted * 6)


def test_files_of_one_size(file_of, photos, wanted):
    model = Detector(file_of('uint8', '--static'), batch_size=2)
    assert (model.batch_size, model.fixed) == (1, [64, 96])
    found = model(photos)
    # The high one does not fit, and is resized to 28 x 64 instead.
    high = found.pop(1)
    assert_same(found, [wanted[0], *wanted[2:]])
    assert high['boxes'].shape == (9, 4)


def test_low_scores_are_left_out(file_of, photos, wanted):
    middle = float(np.median(wanted[0]['scores']))
    (found,) = Detector(file_of(), score_threshold=middle)(photos[:1])
    kept = [score for score in wanted[0]['scores'] if score >= middle]
    assert len(found['scores']) == len(found['boxes']) == len(kept) == 5


def test_mistakes(file_of, photos, tmp_path):
    path = file_of()
    model = Detector(path)
    assert model([]) == []
    with pytest.raises(TypeError, match='a list of images'):
        model(photos[0])
    with pytest.raises(ImageError, match='uint8'):
        model([np.zeros((4, 4, 3))])
    with pytest.raises(FileNotFoundError):
        model([str(tmp_path / 'none.png')])
    with pytest.raises(FileNotFoundError, match='none.onnx'):
        load(tmp_path / 'none.onnx')
    with pytest.raises(ValueError, match="engine='tensorrt'"):
        load(path, engine='tensorrt')
    with pytest.raises(ValueError, match='threads=0'):
        load(path, threads=0)
    with pytest.raises(ValueError, match='channel_order'):
        load(path, channel_order='GBR')
    with pytest.raises(ValueError, match='is no classifier'):
        Classifier(path)


def test_files_that_are_not_as_they_were(file_of, tmp_path):
    content = Path(file_of()).read_bytes()
    path = tmp_path / 'a.onnx'
    # One bit of a weight.
    middle = len(content) // 2
    path.write_bytes(
        content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    with pytest.raises(ValueError, match='not as it was exported'):
        load(path)
    assert load(path, verify=False).classes == ('a', 'b', 'c')
    path.write_bytes(content[:middle])
    with pytest.raises(ValueError, match='a.onnx cannot be opened'):
        load(path)
    # As files were before there was a runtime.
    model = onnx.load_from_string(content)
    kept = [p for p in model.metadata_props if p.key != 'pipeline']
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match='export it anew'):
        load(path)


def test_metadata(file_of, detector):
    said = Detector(file_of()).metadata
    assert said['pipeline'] == [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=[96, 64], keep_ratio=True),
    ]
    assert said['test_cfg'] == dict(max_per_img=9)
    assert said['checkpoint'] == 'tiny.pth'
    assert len(said['checkpoint_sha256']) == len(said['checksum']) == 64


@pytest.mark.parametrize('engine', ENGINES)
def test_a_classifier(engine, classifier, photos):
    from mmpretrain import ImageClassificationInferencer

    pytest.importorskip(engine)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        inferencer = ImageClassificationInferencer(
            classifier[0], classifier[1], device='cpu'
        )
        wanted = inferencer(photos, batch_size=2)
    model = load(classifier[2], engine=engine, batch_size=3, top=None)
    assert isinstance(model, Classifier)
    found = model(photos)
    assert len(found) == len(photos)
    for image, right in zip(found, wanted):
        assert image['labels'][0] == right['pred_label']
        scores = right['pred_scores'][image['labels']]
        np.testing.assert_allclose(image['scores'], scores, atol=1e-5)
        assert model.classes[image['labels'][0]] == right['pred_class']
    (best,) = load(classifier[2], top=2)(photos[:1])
    np.testing.assert_array_equal(best['labels'], found[0]['labels'][:2])


def test_a_pipeline_that_is_not_known(export, classifier, capsys, tmp_path):
    config = Config.fromfile(classifier[0])
    pipeline = config.test_dataloader.dataset.pipeline
    pipeline.insert(1, dict(type='Rotate', angle=5.0))
    config.dump(tmp_path / 'b.py')
    out = str(tmp_path / 'b.onnx')
    command = [str(tmp_path / 'b.py'), classifier[1], out, '--no-check']
    assert export(command) == 0
    assert 'will refuse it: the step' in capsys.readouterr().out
    with pytest.raises(ValueError, match='Rotate.*is not known'):
        load(out)
    said = onnx.load(out).metadata_props
    (text,) = [p.value for p in said if p.key == 'pipeline']
    with pytest.raises(ValueError):
        json.loads(text)


def test_former_names_warn():
    import lors_plugin.deploy
    from lors_plugin.export import export_file

    with pytest.warns(FutureWarning, match='lors_plugin.export.export_file'):
        assert lors_plugin.deploy.export_file is export_file
    with pytest.raises(AttributeError, match='nothing_like_it'):
        _ = lors_plugin.deploy.nothing_like_it


def test_files_of_a_fixed_number_of_images():
    """Missing images are empty, and margins have the file's value."""
    engine = SimpleNamespace(
        shapes=dict(images=(3, 3, None, None), sizes=(3, 2))
    )
    said = dict(
        input='normalized', channel_order='RGB', size_divisor=4, pad_value=7.0,
        mean=[1.0, 2.0, 3.0], std=[2.0, 2.0, 2.0],
    )  # fmt: skip
    images = [np.full((2, 5, 3), 9, np.uint8), np.full((3, 4, 3), 9, np.uint8)]
    batch = stack(images, engine, said)
    assert batch['images'].shape == (3, 3, 4, 8)
    assert batch['sizes'].tolist() == [[5, 2], [4, 3], [4, 3]]
    for image, (height, width) in zip(batch['images'], [(2, 5), (3, 4)]):
        inner = image[:, :height, :width]
        assert [set(c.ravel().tolist()) for c in inner] == [
            {4.0},
            {3.5},
            {3.0},
        ]
        assert (image[:, height:] == 7).all() and (
            image[..., width:] == 7
        ).all()
    assert not batch['images'][2].any()
