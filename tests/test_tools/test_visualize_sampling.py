import os
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import visualize_sampling as sampling
from mmengine.config import Config
from mmengine.registry import DefaultScope

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.visualization import sampling_figure
from lors_plugin.visualization.sampling_figure import StageView

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'tools' / 'analysis_tools'
CONFIG = (
    ROOT
    / 'configs/lors_adamixer'
    / 'lors-adamixer_mobilenetv2_quickstart_tree-crowns.py'
)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model without training and a picture that is not square."""
    from mmdet.registry import MODELS

    root = tmp_path_factory.mktemp('sampling')
    torch.manual_seed(0)
    config = Config.fromfile(CONFIG)
    config.model.backbone.init_cfg = None
    scopes = dict(DefaultScope._instance_dict)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(config.model)
    model.init_weights()
    meta = dict(dataset_meta=dict(classes=('tree',)))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), root / 'a.pth')
    pixels = np.random.default_rng(0).integers(0, 255, (64, 128, 3))
    cv2.imwrite(str(root / 'ä b.jpg'), pixels)
    yield str(CONFIG), str(root / 'a.pth'), str(root / 'ä b.jpg')
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(scopes)


def test_points_are_in_pixels_of_the_original_image(files):
    """The first boxes of this model are a grid over the whole image."""
    predictor = sampling.load_model(*files[:2], device='cpu')
    found = sampling.record_sampling(predictor, predictor.read(files[2]))
    assert found.factors.tolist() == [2, 2]
    (view,) = sampling.stage_views(
        found.records, found.factors, [0], range(64), ['tree']
    )
    assert view.points.shape == (64, 2, 16, 2)
    assert view.weights.shape == (64, 2, 16, 3)
    corners = view.boxes_in[:, :2].min(0), view.boxes_in[:, 2:].max(0)
    np.testing.assert_allclose(corners, [[0, 0], [128, 64]], atol=0.01)
    # Without training the points are a grid of cell centres in each box.
    np.testing.assert_allclose(
        view.points.mean((1, 2)),
        view.boxes_in.reshape(-1, 2, 2).mean(1),
        atol=0.01,
    )
    assert view.texts[3].startswith('#3 tree 0.')


@pytest.mark.parametrize(
    'options',
    [
        [],
        ['--top-k', '1', '--zoom', '2', '--groups'],
        ['--queries', '3', '17', '--stages', '2', '--format', 'jpg'],
    ],
)
def test_writes_a_picture(files, tmp_path, options):
    out = tmp_path / 'new'
    assert sampling.main([*files, '--out', str(out), *options]) == 0
    (path,) = out.iterdir()
    assert path.stem == 'ä b_sampling'
    picture = cv2.imread(str(path))
    assert min(picture.shape[:2]) > 200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100


def test_images_of_the_same_name(files, tmp_path):
    *model, image = files
    images = [tmp_path / 'north' / '1.jpg', tmp_path / 'south' / '1.jpg']
    for path in images:
        path.parent.mkdir()
        path.write_bytes(Path(image).read_bytes())
    argv = [*model, *map(str, images), '--out', str(tmp_path / 'out')]
    assert sampling.main(argv) == 0
    found = {p.parent.name for p in tmp_path.glob('out/*/1_sampling.png')}
    assert found == {'north', 'south'}


def test_predictions_that_are_no_numbers(files, tmp_path, caplog):
    config, weights, image = files
    content = torch.load(weights)
    content['state_dict']['decoder.stages.2.fc_reg.bias'].fill_(3e38)
    torch.save(content, tmp_path / 'large.pth')
    argv = [config, str(tmp_path / 'large.pth'), image]
    assert sampling.main([*argv, '--out', str(tmp_path / 'out')]) == 1
    assert f'{image}: pred_instances.bboxes of the' in caplog.text
    assert not list(tmp_path.glob('out/*'))


@pytest.mark.parametrize('content', [b'', b'no image'])
def test_images_that_cannot_be_read(files, tmp_path, caplog, content):
    image = tmp_path / 'bad.jpg'
    image.write_bytes(content)
    argv = [*files[:2], str(image), '--out', str(tmp_path)]
    assert sampling.main(argv) == 1
    assert 'bad.jpg cannot be read' in caplog.text


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['--queries', '64'], 'has 64 queries, 0 to 63'),
        (['--stages', '0', '-1'], '--stages -1'),
        (['--score-thr', '0.99'], 'the best has'),
    ],
)
def test_numbers_that_do_not_exist(files, tmp_path, caplog, options, expected):
    assert sampling.main([*files, '--out', str(tmp_path), *options]) == 1
    assert expected in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('missing', [0, 1, 2])
def test_missing_files(files, tmp_path, caplog, missing):
    files = list(files)
    files[missing] = 'nowhere'
    assert sampling.main([*files, '--out', str(tmp_path)]) == 1
    assert 'nowhere' in caplog.text


def change(path, case):
    """Write what somebody may give in place of a checkpoint."""
    content = torch.load(path, weights_only=True)
    state = content['state_dict']
    if case == 'code':
        content['extra'] = Code()
    elif case == 'one weight missing':
        state.popitem()
    elif case == 'strange names':
        content['meta']['dataset_meta']['classes'] = [1]
    elif case == 'compiled':
        content['state_dict'] = {f'_orig_mod.{k}': state[k] for k in state}
    elif case == 'without meta':
        content = state
    torch.save(content, 'given.pth')
    return 'given.pth'


REFUSED = {
    'code': '--trust',
    'one weight missing': '1 are missing',
    'strange names': r'class names are \[1\]',
}


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ('ran',)


@pytest.mark.parametrize('case', REFUSED)
def test_foreign_files_are_refused(files, tmp_path, monkeypatch, caplog, case):
    monkeypatch.chdir(tmp_path)
    path = change(files[1], case)
    argv = [files[0], path, files[2], '--out', 'out']
    assert sampling.main(argv) == 1
    assert re.search(rf'given\.pth[\s\S]*{REFUSED[case]}', caplog.text)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['given.pth']


@pytest.mark.parametrize('case', ['compiled', 'without meta'])
def test_other_forms_of_the_same_weights(files, tmp_path, monkeypatch, case):
    """Class names come from the config where the file has none."""
    monkeypatch.chdir(tmp_path)
    predictor = sampling.load_model(files[0], change(files[1], case), 'cpu')
    assert predictor.classes == ('tree',)
    wanted = torch.load(files[1], weights_only=True)['state_dict']
    have = predictor.model.state_dict()
    assert all(have[key].equal(value) for key, value in wanted.items())


def test_best_queries_one_an_object():
    boxes = np.array(
        [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [40, 0, 50, 10.0]]
    )
    scores = np.array([0.3, 0.9, 0.1, 0.5])
    assert sampling.choose_queries(boxes, scores, 2, 0.0) == [1, 3]
    assert sampling.choose_queries(boxes, scores, 9, 0.2) == [1, 3]
    with pytest.raises(sampling.DrawError, match='0.900'):
        sampling.choose_queries(boxes, scores, 2, 0.95)


def test_other_models_are_refused():
    predictor = SimpleNamespace(model=torch.nn.Linear(1, 1))
    with pytest.raises(sampling.DrawError, match='for AdaMixer'):
        sampling.record_sampling(predictor, None)


def make_view(points, box=(40, 10, 60, 30)):
    points = np.array(points, float).reshape(1, 1, -1, 2)
    weights = np.full((*points.shape[:3], 6), 0.1)
    weights[..., 2] = 0.5
    boxes = np.array([box], float)
    return StageView(0, boxes, boxes, ['#0'], points, weights)


def test_limits_show_points_outside_up_to_a_margin():
    limits = sampling_figure.view_limits
    size = (100, 50)
    inside = make_view([[50, 20]])
    assert limits([inside], size) == (0, 0, 100, 50)
    outside = make_view([[-5, 20], [50, 999]])
    assert limits([inside, outside], size) == (-5, 0, 100, 62)
    assert limits([outside], size, zoom=2) == (30, 0, 70, 40)


def test_figure_counts_hidden_points_and_colours_levels():
    view = make_view([[-5, 20], [50, 999]])
    image = np.zeros((50, 100, 3), np.uint8)
    strides = (4, 8, 16, 32, 64, 128)
    figure = sampling_figure.sampling_figure(image, [view], strides, 'x')
    panel, strip = figure.axes
    assert panel.get_title('right') == '1 of 2 points outside'
    (dots,) = panel.collections
    np.testing.assert_allclose(dots.get_offsets(), [[-5, 20]])
    colors = sampling_figure.level_colors(6)
    np.testing.assert_allclose(dots.get_facecolors()[0, :3], colors[2])
    widths = [bar.get_width() for bar in strip.patches]
    np.testing.assert_allclose(widths, [0.1, 0.1, 0.5, 0.1, 0.1, 0.1])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == ['stride 4', 'stride 8']
    sampling.plt.close(figure)


def test_wrong_options():
    files = ['c', 'p', 'i', '--out', 'o']
    for wrong in (['--top-k', '0'], ['--zoom', '-1'], ['--columns', '0']):
        with pytest.raises(SystemExit):
            sampling.parse_args([*files, *wrong])
