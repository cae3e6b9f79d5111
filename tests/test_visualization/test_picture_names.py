"""Names of pictures, and MMDetection's hook with them."""

from types import SimpleNamespace

import mmcv
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.visualization import picture_names

# isort: split
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer


@pytest.mark.parametrize(
    ('paths', 'names'),
    [
        (['a.jpg', 'x/b.png'], ['a', 'b']),
        (['n/1.png', 's/1.png', 'n/2.png'], ['n/1', 's/1', '2']),
        (['d/n/1.png', 'd/s/t/1.png'], ['n/1', 's/t/1']),
        (['d/1.png', 'd/s/1.png'], ['1', 's/1']),
        (['x.jpg', 'x.png', 'X.bmp'], ['x', 'x.png', 'X.bmp']),
        (['n/1.jpg', 'n/1.png', 's/1.png'], ['n/1', 'n/1.png', 's/1']),
        (['a.jpg', 'a.jpg'], ['a', 'a.jpg']),
        (['sheet.jpg', 'sheet.jpg.png'], ['sheet.jpg', 'sheet.jpg.png']),
    ],
)
def test_picture_names(paths, names):
    assert picture_names(paths, reserved=['sheet']) == names


def test_pictures_of_the_hook(tmp_path):
    from lors_plugin.visualization.det_visualization_hook import (
        DetVisualizationHook,
    )

    paths = [str(tmp_path / n) for n in ('n/1.png', 's/1.png', 'n/2.png')]
    outputs = []
    for i, path in enumerate(paths):
        mmcv.imwrite(np.full((30, 40, 3), 80 * i, np.uint8), path)
        found = InstanceData(
            bboxes=torch.tensor([[5.0, 5, 20, 20]]),
            labels=torch.tensor([0]),
            scores=torch.tensor([0.9]),
        )
        sample = DetDataSample(metainfo=dict(img_path=path))
        sample.pred_instances = found
        outputs.append(sample)

    class Dataset:
        def __len__(self):
            return len(paths)

        def get_data_info(self, index):
            return dict(img_path=paths[index])

    DetLocalVisualizer.get_instance('pictures').dataset_meta = {}
    runner = SimpleNamespace(
        work_dir=str(tmp_path),
        timestamp='now',
        test_loop=SimpleNamespace(
            dataloader=SimpleNamespace(dataset=Dataset())
        ),
    )
    hook = DetVisualizationHook(draw=True, test_out_dir='out')
    hook.before_test(runner)
    hook.after_test_iter(runner, 0, None, outputs[:2])
    hook.after_test_iter(runner, 1, None, outputs[2:])
    out = tmp_path / 'now' / 'out'
    corners = {
        path.relative_to(out).as_posix(): mmcv.imread(str(path))[0, 0, 0]
        for path in out.rglob('*.png')
    }
    assert corners == {'n/1.png': 0, 's/1.png': 80, '2.png': 160}
