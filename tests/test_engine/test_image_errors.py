"""Errors of a data pipeline name the image, also out of worker processes."""

import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from mmengine.registry import TRANSFORMS
from torch.utils.data import DataLoader

from lors_plugin.engine.image_errors import ImageError, name_images


@TRANSFORMS.register_module()
class FailAt:
    """A transform that fails at an image, or passes the index on."""

    def __init__(self, path, error):
        self.path, self.error = path, error

    def __call__(self, data):
        if data['img_path'] == self.path:
            raise self.error
        return data['sample_idx']


class Pictures(BaseDataset):
    def load_data_list(self):
        return [dict(img_path=f'{i}.png') for i in range(4)]


def pictures(error):
    step = dict(type='FailAt', path='2.png', error=error)
    return Pictures(pipeline=[step], serialize_data=False)


WRAPPERS = {
    'plain': lambda dataset: dataset,
    'repeated': lambda dataset: RepeatDataset(dataset, times=2),
    'joined': lambda dataset: ConcatDataset([dataset, dataset]),
}


@pytest.mark.parametrize(
    ('wrap', 'workers', 'error'),
    [
        ('plain', 0, AssertionError('ssize > 0')),
        ('plain', 1, KeyError('img')),
        ('repeated', 0, OSError(5, 'I/O')),
        ('joined', 0, ValueError('of an image')),
    ],
)
def test_the_message_names_the_image(wrap, workers, error):
    dataset = WRAPPERS[wrap](pictures(error))
    name_images(dataset)
    loader = DataLoader(dataset, num_workers=workers)
    with pytest.raises(ImageError) as caught:
        list(loader)
    assert str(caught.value) == (
        'the image 2.png cannot be read or prepared '
        f'({type(error).__name__}: {error})'
    )


def test_what_works_is_left_alone():
    dataset = pictures(ValueError())
    name_images(dataset)
    name_images(dataset)
    assert [dataset[i] for i in (0, 1, 3)] == [0, 1, 3]
