"""Images as MMCV reads, resizes, crops and pads them."""

import cv2
import mmcv
import numpy as np
import PIL.Image
import pytest
from mmcv.transforms import Compose
from mmengine.registry import DefaultScope

from lors_plugin.deploy import images
from lors_plugin.deploy.images import ImageError, Pipeline, read_image
from lors_plugin.export.metadata import describe_pipeline

PNG = b'\x89PNG\r\n\x1a\n'  # how each begins


def picture(height, width, *channels):
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (height, width, *channels)).astype(np.uint8)


@pytest.mark.parametrize('shape', [(37, 53), (90, 41), (64, 64), (5, 120)])
@pytest.mark.parametrize(
    'scope, steps',
    [
        ('mmdet', [dict(type='Resize', scale=(80, 50), keep_ratio=True)]),
        ('mmdet', [dict(type='mmdet.Resize', scale=(50, 80))]),
        (
            'mmdet',
            [
                dict(type='Resize', scale=(64, 64), keep_ratio=True),
                dict(type='Pad', size=(64, 70), pad_val=dict(img=(114,) * 3)),
            ],
        ),
        (
            'mmdet',
            [
                dict(type='Pad', size_divisor=32),
                dict(type='Pad', size_divisor=7, pad_val=9),
            ],
        ),
        ('mmdet', [dict(type='Pad', pad_to_square=True)]),
        (
            'mmpretrain',
            [
                dict(type='ResizeEdge', scale=48, edge='short'),
                dict(type='CenterCrop', crop_size=40),
            ],
        ),
        (
            'mmpretrain',
            [
                dict(
                    type='ResizeEdge',
                    scale=49,
                    backend='pillow',
                    interpolation='bicubic',
                ),
                dict(type='CenterCrop', crop_size=(40, 35)),
            ],
        ),
        (
            'mmpretrain',
            [
                dict(
                    type='ResizeEdge',
                    scale=31,
                    edge='long',
                    interpolation='area',
                )
            ],
        ),
        ('mmpretrain', [dict(type='EfficientNetCenterCrop', crop_size=45)]),
        (
            'mmpretrain',
            [dict(type='Resize', scale=33, interpolation='bicubic')],
        ),
    ],
)
def test_steps_are_those_of_the_hosts(scope, steps, shape):
    image = picture(*shape, 3)
    described = describe_pipeline(steps)
    found, scale = Pipeline(described)(image)
    with DefaultScope.overwrite_default_scope(scope):
        wanted = Compose(steps)(
            dict(img=image, img_shape=shape, ori_shape=shape)
        )
    np.testing.assert_array_equal(found, wanted['img'])
    if scope == 'mmdet':
        assert scale == pytest.approx(wanted.get('scale_factor', (1, 1)))


def test_a_larger_image_fits_into_a_fixed_size():
    pipeline = Pipeline([dict(type='Resize', scale=(96, 64), keep_ratio=True)])
    high = picture(200, 100, 3)
    assert pipeline(high)[0].shape == (96, 48, 3)
    found, scale = pipeline(high, (64, 96))
    assert found.shape == (64, 32, 3) and scale == (0.32, 0.32)
    # Nothing else may change: the crop would be another one.
    steps = [dict(type='CenterCrop', crop_size=80)]
    assert Pipeline(steps)(high, (64, 96))[0].shape == (80, 80, 3)


@pytest.mark.parametrize(
    'step, word',
    [
        (dict(type='RandomFlip', prob=0.5), 'RandomFlip'),
        (dict(type='Resize', scale_factor=0.5), 'scale_factor'),
        (dict(type='ResizeEdge', scale=5, edge='middle'), 'middle'),
        (dict(type='Resize', scale=5, interpolation='hamming'), 'hamming'),
        (dict(type='LoadImageFromFile', to_float32=True), 'to_float32'),
    ],
)
def test_unknown_steps_are_named(step, word):
    assert word in describe_pipeline([step])
    assert 'no test pipeline' in describe_pipeline([])


def test_an_image_that_nothing_would_be_left_of():
    pipeline = Pipeline([dict(type='ResizeEdge', scale=31, edge='long')])
    with pytest.raises(ImageError, match='2 x 120 is too narrow'):
        pipeline(picture(2, 120, 3))


def exif(orientation):
    tags = PIL.Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize('gray', [False, True])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize(
    'mode, ending, options',
    [
        ('RGB', 'png', {}),
        ('RGB', 'jpg', dict(exif=exif(6))),
        ('RGB', 'png', dict(exif=exif(3))),
        ('L', 'png', {}),
        ('RGBA', 'png', {}),
        ('P', 'gif', {}),
        ('CMYK', 'jpg', {}),
        ('1', 'png', {}),
    ],
)
def test_files_are_read_as_mmcv_reads_them(
    mode, ending, options, backend, gray, tmp_path
):
    path = tmp_path / f'a.{ending}'
    smooth = cv2.resize(picture(3, 4, 3), (40, 30))
    PIL.Image.fromarray(smooth).convert(mode).save(path, **options)
    flag = 'grayscale' if gray else 'color'
    wanted = mmcv.imread(path, flag, backend=backend)
    found = read_image(path, gray, backend)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(
        found, read_image(path.read_bytes(), gray, backend)
    )


def test_sixteen_bits(tmp_path):
    path = tmp_path / 'a.png'
    cv2.imwrite(str(path), picture(9, 8).astype(np.uint16) * 256)
    np.testing.assert_array_equal(read_image(path), mmcv.imread(path))
    with pytest.raises(ImageError, match='more than 8 bits'):
        read_image(path, backend='pillow')


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize(
    'content',
    [b'', b'text', PNG + b'\x00', PNG + b'\x00\x00\x00\x02IHDRxx' + bytes(9)],
)
def test_rubbish(content, backend, tmp_path):
    path = tmp_path / 'rubbish.png'
    path.write_bytes(content)
    with pytest.raises(ImageError, match='rubbish.png'):
        read_image(path, backend=backend)


@pytest.mark.parametrize(
    'array, gray, word',
    [
        (picture(4, 4, 3).astype(np.float32), False, 'float32'),
        (picture(4, 4, 4), False, '(4, 4, 4)'),
        (picture(4, 4), False, '(4, 4)'),
        (picture(4, 4, 3), True, '(4, 4, 3)'),
        (picture(0, 4, 3), False, '(0, 4, 3)'),
        (picture(4, 4)[0], True, '(4,)'),
    ],
)
def test_arrays_that_are_no_images(array, gray, word):
    with pytest.raises(ImageError) as error:
        read_image(array, gray)
    assert word in str(error.value)


def test_without_opencv(monkeypatch, tmp_path):
    path = tmp_path / 'a.png'
    image = picture(57, 31, 3)
    cv2.imwrite(str(path), image)
    with monkeypatch.context() as patch:
        patch.setattr(images, 'cv2', None)
        np.testing.assert_array_equal(read_image(path), image)
        for size in ((90, 100), (20, 33)):
            found = images.resize(image, size).astype(int)
            assert abs(found - cv2.resize(image, size)).max() == 1
        with pytest.raises(ImportError, match='bicubic resizing needs OpenCV'):
            images.resize(image, (9, 9), 'bicubic')
        patch.setattr(images, 'PIL', None)
        with pytest.raises(ImportError, match='need OpenCV or Pillow'):
            read_image(path)
