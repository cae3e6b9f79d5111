"""``tools/demo.py``: what the page does, and the page in a browser."""

import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable
from lors_plugin.build import build_model
from lors_plugin.inference import InferenceError, load_predictor
from lors_plugin.testing import randomize

CLASSES = ('cat', 'dog', '牛')


@pytest.fixture(scope='module')
def tool():
    import demo

    return demo


@pytest.fixture
def detector(write_detector, tmp_path, monkeypatch):
    """A config and weights of a tiny detector, and a photo."""
    monkeypatch.chdir(tmp_path)
    photos = dict(data_root='.', data_prefix=dict(img='photos/'))
    config = write_detector('tiny model.py', **photos)
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (6, 9, 3), dtype=np.uint8)
    write_png('photos/树 a.png', cv2.resize(coarse, (192, 128)))
    write_png('big.png', np.zeros((10000, 10000), np.uint8))
    Path('text.txt').write_text('no image')
    Path('text.png').write_text('no image')
    return config


def write_png(name, pixels):
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())


@pytest.fixture
def demo(tool, detector):
    return tool.Demo(load_predictor(detector, 'w.pth'))


def test_boxes_by_threshold_and_class(demo):
    look = demo.look('photos/树 a.png')
    for score_thr, classes in ((0.0, []), (0.5, []), (0.0, ['牛'])):
        picture, plain, text, table = demo.show(look, score_thr, classes)
        wanted = look.found.select(score_thr, [2] if classes else None)
        assert text.startswith(f'**{len(wanted)} boxes**')
        assert len(table or ()) == len(wanted)
        assert plain is None and picture.shape == (480, 720, 3)
    assert {row[0] for row in table or ()} <= {'牛'}
    assert re.search(r'\d\.\d\d s for 192 x 128 pixels', text)


def test_points_by_stage_level_and_group(demo):
    look = demo.look('photos/树 a.png')
    everything = demo.points(look, 2, 'all', 'all', 3)
    assert everything.ndim == 3 and min(everything.shape[:2]) > 200
    for other in (
        (0, 'all', 'all', 3),
        (2, '16', 'all', 3),
        (2, 'all', '1', 3),
    ):
        picture = demo.points(look, *other)
        assert (
            picture.shape != everything.shape or (picture != everything).any()
        )


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('text.txt', 'text.txt is no image'),
        ('text.png', 'text.png is no image'),
        ('big.png', r'too many pixels \(10000 x 10000\); 25 million'),
    ],
)
def test_files_that_are_refused_unread(demo, monkeypatch, name, expected):
    def read(path):
        raise AssertionError('it was read')

    monkeypatch.setattr(demo.predictor, 'read', read)
    with pytest.raises(InferenceError, match=expected):
        demo.look(name)


def test_adapters_on_and_off(tool, tmp_path):
    config = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='VisionTransformer',
                    arch=dict(
                        embed_dims=16,
                        num_layers=1,
                        num_heads=2,
                        feedforward_channels=16,
                    ),
                    img_size=32,
                    patch_size=8,
                ),
                head=dict(
                    type='VisionTransformerClsHead',
                    num_classes=3,
                    in_channels=16,
                ),
            ),
            data_preprocessor=dict(mean=[127.0], std=[64.0], num_classes=3),
            custom_hooks=[dict(type='lors_plugin.RepAdapterHook')],
            test_dataloader=dict(
                dataset=dict(
                    type='CustomDataset',
                    metainfo=dict(classes=CLASSES),
                    pipeline=[
                        dict(type='LoadImageFromFile'),
                        dict(type='Resize', scale=32),
                        dict(type='PackInputs'),
                    ],
                )
            ),
        )
    )
    model = randomize(build_model(config), 0)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'w.pth')
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    path = tmp_path / 'a.png'
    path.write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
    demo = tool.Demo(load_predictor(config, tmp_path / 'w.pth'))
    assert demo.adapters > 0 and not demo.samples_points
    look = demo.look(str(path))
    assert np.abs(look.found.scores - look.plain.scores).max() > 1e-4
    picture, plain, text, _ = demo.show(look, 0, [])
    assert '3 with the adapters off' in text and '3 classes' in text
    assert picture.shape == plain.shape


def test_samples_are_those_of_the_test_set(tool, detector):
    assert tool.find_samples(detector, []) == ['photos/树 a.png']
    assert tool.find_samples(detector, ['big.png']) == ['big.png']
    assert tool.find_samples(Config(), []) == []


def test_without_gradio(tool, detector, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(SystemExit) as error:
        tool.main(['tiny model.py', 'w.pth'])
    assert error.value.code == 2
    assert 'pip install "gradio>=6"' in capsys.readouterr().err


@pytest.fixture
def served(tool, detector):
    """The address of the page."""
    pytest.importorskip('gradio')
    page, options = tool.prepare(['tiny model.py', 'w.pth'])
    options.update(prevent_thread_lock=True)
    _, address, _ = page.launch(**options)
    yield address
    page.close()


@pytest.mark.slow
def test_page_in_a_browser(served, browser, detector, tmp_path):
    """A photo, the slider, and files that are no photos."""
    predictor = load_predictor(detector, 'w.pth')
    (found,) = predictor([predictor.read('photos/树 a.png')])
    page = browser.new_page(viewport=dict(width=1280, height=1200))
    page.goto(served)

    def wait_for(text):
        page.wait_for_function(
            'text => document.querySelector("#text")?.innerText.includes'
            '(text)',
            arg=text,
        )

    def upload(name):
        names = ('Clear', 'Remove Image')
        clear = page.locator(
            ','.join(f'#photo button[aria-label="{n}"]' for n in names)
        )
        if clear.count():
            clear.first.click()
        wait_for('Upload a photo')
        page.locator('#photo input[type=file]').set_input_files(name)

    upload('photos/树 a.png')
    wait_for(f'{len(found.select(0.3))} boxes with a score of at least 0.30')
    page.wait_for_selector('#picture img')
    page.wait_for_selector('#sampled img')
    first = page.locator('#sampled img').get_attribute('src')
    for name, value in (('threshold', 0.6), ('stage', 0)):
        page.locator(f'#{name} input[type=range]').evaluate(
            """(slider, value) => {
                slider.value = value;
                slider.dispatchEvent(new Event('input', {bubbles: true}));
                slider.dispatchEvent(new Event('change', {bubbles: true}));
            }""",
            value,
        )
    wait_for(f'{len(found.select(0.6))} boxes with a score of at least 0.60')
    page.wait_for_function(
        'first => document.querySelector("#sampled img")?.src != first',
        arg=first,
    )
    page.screenshot(path=tmp_path / 'page.png')
    assert cv2.imread(str(tmp_path / 'page.png')).std() > 10

    upload('big.png')
    wait_for('big.png has too many pixels (10000 x 10000)')
    assert page.locator('#picture img').count() == 0
    upload('text.png')
    wait_for('text.png is no image of a known format')
    # The page itself refuses other kinds of files.
    upload('text.txt')
    page.wait_for_selector('text=Invalid file type')
