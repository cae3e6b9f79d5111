"""Lists of small classification tasks, drawn from folders or lists."""

import image_lists
import pytest
from mmpretrain.datasets import CustomDataset
from PIL import Image


@pytest.fixture
def images(tmp_path):
    """Three classes of 12 images; names have spaces and other letters."""
    for k, name in enumerate(['a cat', '狗', 'zebra']):
        for i in range(12):
            path = tmp_path / 'images' / name / f'{"deep/" * (i % 2)}{i}.PNG'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (k, i, 0)).save(path)
    return tmp_path / 'images'


def read(path):
    lines = path.read_text(encoding='utf-8').splitlines()
    return [tuple(line.rsplit(' ', 1)) for line in lines]


def run(*words):
    return image_lists.main([*map(str, words)])


def test_lists_of_vtab(images, tmp_path):
    out = tmp_path / 'lists'
    assert run(images, '--train', 20, '--val', 5, '--out-dir', out) == 0
    train, val, test = (
        read(out / f'{name}.txt') for name in ('train20', 'val5', 'test')
    )
    assert [len(x) for x in (train, val, test)] == [20, 5, 11]
    assert read(out / 'train20val5.txt') == train + val
    assert len({*train, *val, *test}) == 36
    assert (out / 'classes.txt').read_text(encoding='utf-8').split('\n') == [
        'a cat', 'zebra', '狗', ''
    ]  # fmt: skip
    data = CustomDataset(
        data_root=str(images), ann_file=str(out / 'train20.txt'), pipeline=[]
    )
    assert len(data) == 20
    for index in range(20):
        path = data.get_data_info(index)['img_path']
        kind = Image.open(path).getpixel((0, 0))[0]
        # Folders are in alphabetical order.
        assert data.get_data_info(index)['gt_label'] == [0, 2, 1][kind]
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    assert run(images, '--train', 20, '--val', 5, '--out-dir', out) == 0
    assert before == [path.read_bytes() for path in sorted(out.iterdir())]
    assert (
        run(images, '--train', 20, '--val', 5, '--out-dir', out, '--seeds', 3)
        == 0
    )
    assert read(out / 'train20.txt') != train


def test_shots(images, tmp_path):
    words = ['--shots', 1, 4, '--seeds', 0, 1, '--test-share', 0.25]
    assert run(images, *words) == 0
    test = read(tmp_path / 'test.txt')
    labels = [label for _, label in test]
    assert sorted(labels) == ['0'] * 3 + ['1'] * 3 + ['2'] * 3
    for seed in (0, 1):
        one, four, val = (
            read(tmp_path / f'{name}_seed{seed}.txt')
            for name in ('train_1-shot', 'train_4-shot', 'val')
        )
        assert sorted(k for _, k in one) == ['0', '1', '2']
        assert sorted(k for _, k in four) == ['0'] * 4 + ['1'] * 4 + ['2'] * 4
        assert set(one) < set(four)
        assert len({*four, *val, *test}) == 12 + 12 + 9
    first, second = (
        read(tmp_path / f'train_4-shot_seed{seed}.txt') for seed in (0, 1)
    )
    assert first != second


def test_given_lists(images, tmp_path):
    (tmp_path / 'all.txt').write_text(
        ''.join(f'zebra/{i}.PNG {i % 3}\n' for i in range(0, 12, 2)), 'utf-8'
    )
    (tmp_path / 'mine.txt').write_text('zebra/2.PNG 2\n', 'utf-8')
    words = ['--list', tmp_path / 'all.txt', '--train', 3, '--val', 2]
    words += ['--test-list', tmp_path / 'mine.txt']
    assert run(images, *words) == 0
    assert read(tmp_path / 'test.txt') == [('zebra/2.PNG', '2')]
    assert len(read(tmp_path / 'train3val2.txt')) == 5
    assert not (tmp_path / 'classes.txt').exists()


@pytest.mark.parametrize(
    ('words', 'text', 'message'),
    [
        ([], None, '800 and 200 images are asked for, and there are 36'),
        (['--shots', '12'], None, 'need the same test images'),
        (
            ['--shots', '9', '--test-share', '0.1'],
            None,
            'class 0 has 11 images to draw from, fewer than 9 and 4',
        ),
        (['--train', '30', '--val', '6'], None, 'no images are left to test'),
        (['--list', 'list.txt'], 'zebra/0.PNG x\n', 'is not a file and a lab'),
        (['--list', 'list.txt'], 'zebra/no.PNG 1\n', 'does not exist'),
        (['--list', 'list.txt'], '\n', 'is empty'),
    ],
)
def test_mistakes(words, text, message, images, tmp_path, caplog):
    if text is not None:
        (tmp_path / 'list.txt').write_text(text, 'utf-8')
    words = [str(tmp_path / x) if x == 'list.txt' else x for x in words]
    assert run(images, *words) == 1
    assert message in caplog.text
    assert not list(tmp_path.glob('t*.txt'))


def test_an_empty_class_is_named(images, caplog):
    (images / 'nothing').mkdir()
    assert run(images) == 1
    assert f'{images / "nothing"} has no images' in caplog.text
