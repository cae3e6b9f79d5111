"""``yolo_to_coco.py``."""

import json

import mmcv
import pytest
import yolo_to_coco as yolo
from PIL import Image


def write(root, image, label=None, size=(40, 20), exif=None):
    """Write an image and its label file, given by (path, text)."""
    path = root / image
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {} if exif is None else dict(exif=exif)
    Image.new('RGB', size).save(path, **options)
    if label is not None:
        path = root / label[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(label[1], encoding='utf-8')


def run(root, *options, labels='labels', images='images'):
    out = root / 'out' / 'train.json'
    arguments = [root / labels, root / images, out, *options]
    code = yolo.main([str(a) for a in arguments])
    return code, json.loads(out.read_text()) if out.exists() else None


def names_of(coco):
    return [c['name'] for c in coco['categories']]


def test_boxes_and_background(tmp_path, caplog):
    rows = '\ufeff1 0.5 0.5 0.5 0.2\n\n0 0.1 0.9 0.4 0.4 \n1 0.5 0.5 0.5 0.2'
    write(tmp_path, 'images/a.jpg', ('labels/a.txt', rows))
    write(tmp_path, 'images/b.PNG')
    write(tmp_path, 'images/c.jpeg', ('labels/c.txt', ''))
    write(tmp_path, 'images/._a.jpg')
    (tmp_path / 'labels' / 'gone.txt').write_text('0 0.5 0.5 1 1')
    (tmp_path / 'labels' / 'classes.txt').write_text('cat\nbig dog\n\n')
    with caplog.at_level('INFO'):
        code, coco = run(tmp_path)
    assert code == 0
    assert names_of(coco) == ['cat', 'big dog']
    files = [i['file_name'] for i in coco['images']]
    assert files == ['a.jpg', 'b.PNG', 'c.jpeg']
    boxes = [(a['category_id'], a['bbox']) for a in coco['annotations']]
    assert boxes == [(2, [10, 8, 20, 4]), (1, [0, 14, 12, 6])]
    assert {a['image_id'] for a in coco['annotations']} == {1}
    assert '1 label files have no image' in caplog.text
    assert '3 images (2 without boxes), 2 boxes' in caplog.text


@pytest.mark.parametrize(
    ('images', 'labels', 'image', 'label', 'file_name'),
    [
        ('images', 'labels', 'images/a.jpg', 'labels/a.txt', 'a.jpg'),
        ('images', 'labels', 'images/v/a.jpg', 'labels/v/a.txt', 'v/a.jpg'),
        ('images', 'labels', 'images/v/a.jpg', 'labels/a.txt', 'v/a.jpg'),
        ('t/images', 't/labels', 't/images/a.jpg', 't/labels/a.txt', 'a.jpg'),
        ('all', 'all', 'all/ä ö.jpg', 'all/ä ö.txt', 'ä ö.jpg'),
        ('all', 'all', 'all/x/a.b.jpg', 'all/x/a.b.txt', 'x/a.b.jpg'),
    ],
)
def test_layouts(tmp_path, images, labels, image, label, file_name):
    write(tmp_path, image, (label, '0 0.5 0.5 0.5 0.5'))
    (tmp_path / 'data.yaml').write_text('names: [cat]\nnc: 1\n')
    code, coco = run(tmp_path, images=images, labels=labels)
    assert code == 0
    assert [i['file_name'] for i in coco['images']] == [file_name]
    assert len(coco['annotations']) == 1


def test_same_names_in_two_folders(tmp_path):
    for part in ('x', 'y'):
        row = '0 0.5 0.5 0.5 0.5\n' * (part == 'y')
        write(tmp_path, f'images/{part}/a.jpg', (f'labels/{part}/a.txt', row))
    _, coco = run(tmp_path, '--classes', 'cat')
    assert [a['image_id'] for a in coco['annotations']] == [2]
    write(tmp_path, 'images/x/a.png')
    assert run(tmp_path, '--classes', 'cat')[0] == 1


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('names: [cat, "a dog"]', ['cat', 'a dog']),
        ('names: {1: dog, 0: cat}\nnc: 2', ['cat', 'dog']),
        ('names: [no, yes]', ['no', 'yes']),
        ('names: [on, off, null, ~]', ['on', 'off', 'null', '~']),
        ('names:\n  0: 001\n  1: 1.10\nnc: 2', ['001', '1.10']),
        ('names: [猫, "狗"]', ['猫', '狗']),
        ('names: {1: dog, 2: cat}', 'keys of `names`'),
        ('names: [cat]\nnc: 3', 'nc=3'),
        ('nc: 3', '`names` is missing'),
        ('names: [{name: cat}]', 'no list of names'),
        ('names: !!python/object/apply:os.getcwd []', 'unique'),
        ('names: [cat, cat]', 'unique'),
        ('names: [', 'not yaml'),
    ],
)
def test_names_in_yaml(tmp_path, text, expected):
    path = tmp_path / 'data.yaml'
    path.write_text(text, 'utf-8')
    if isinstance(expected, list):
        assert yolo.read_names(path) == expected
    else:
        with pytest.raises(yolo.ConverterError) as error:
            yolo.read_names(path)
        assert expected in str(error.value)
        assert 'data.yaml' in str(error.value)


@pytest.mark.parametrize(
    ('file', 'encoding', 'read'),
    [
        ('classes.txt', 'utf-16', True),
        ('classes.txt', 'utf-8-sig', True),
        ('classes.txt', 'gbk', False),
        ('classes.txt', 'utf-16-le', False),
        ('data.yaml', 'utf-16', True),
        ('data.yaml', 'gbk', False),
    ],
)
def test_encodings(tmp_path, file, encoding, read):
    path = tmp_path / file
    text = 'names: [狗, a]' if file == 'data.yaml' else '狗\na\n'
    path.write_bytes(text.encode(encoding))
    if read:
        assert yolo.read_names(path) == ['狗', 'a']
    else:
        with pytest.raises(yolo.ConverterError, match=f'{file} .*UTF-8'):
            yolo.read_names(path)


@pytest.mark.parametrize('text', ['cat\n\ndog\n', ''])
def test_names_with_a_gap(tmp_path, text):
    """An empty line would move all numbers behind it."""
    path = tmp_path / 'classes.txt'
    path.write_text(text)
    with pytest.raises(yolo.ConverterError, match='not empty'):
        yolo.read_names(path)


@pytest.mark.parametrize(
    ('row', 'expected'),
    [
        ('0 0.5 0.5 0.5', '4 numbers'),
        ('0 0.5 0.5 0.5 0.5 0.9', 'score'),
        ('0 0.1 0.1 0.5 0.1 0.5 0.5', '--polygons'),
        ('2 0.5 0.5 0.5 0.5', 'class 2 is not one of 0 to 1'),
        ('-1 0.5 0.5 0.5 0.5', 'class -1'),
        ('0.5 0.5 0.5 0.5 0.5', 'class 0.5'),
        ('0 120 80 40 30', 'not pixels'),
        ('0 0.5 0.5 -0.5 0.5', 'not within'),
        ('0 0.5 nan 0.5 0.5', 'not finite'),
        ('cat 0.5 0.5 0.5 0.5', "'cat'"),
    ],
)
def test_wrong_rows_are_named(tmp_path, caplog, row, expected):
    text = f'0 0.5 0.5 0.5 0.5\n\n{row}\n'
    write(tmp_path, 'images/a.jpg', ('labels/a.txt', text))
    code, coco = run(tmp_path, '--classes', 'cat', 'dog')
    assert code == 1 and coco is None
    assert expected in caplog.text
    assert 'a.txt, line 3' in caplog.text


def test_polygons(tmp_path):
    text = '0 0.1 0.2 0.5 0.1 0.3 0.5\n0 0.5 0.5 0.5 0.5'
    write(tmp_path, 'images/a.jpg', ('labels/a.txt', text))
    _, coco = run(tmp_path, '--classes', 'cat', '--polygons')
    boxes = [a['bbox'] for a in coco['annotations']]
    assert boxes == [[4, 2, 16, 8], [10, 5, 20, 10]]


@pytest.mark.parametrize(
    ('suffix', 'orientation'),
    [('.jpg', 8), ('.jpg', 3), ('.png', 9), ('.tif', 6), ('.webp', 6)],
)
def test_photos_with_an_orientation(tmp_path, caplog, suffix, orientation):
    """Boxes are fractions of the photo as the image loader shows it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    label = ('labels/a.txt', '0 0.5 0.5 0.5 0.5')
    write(tmp_path, f'images/a{suffix}', label, exif=exif)
    _, coco = run(tmp_path, '--classes', 'cat')
    image = mmcv.imread(str(tmp_path / 'images' / f'a{suffix}'))
    height, width = image.shape[:2]
    info = coco['images'][0]
    assert (info['width'], info['height']) == (width, height)
    box = [width / 4, height / 4, width / 2, height / 2]
    assert coco['annotations'][0]['bbox'] == box
    assert ('EXIF orientation' in caplog.text) == (orientation != 9)


def test_split_file(tmp_path, caplog):
    for name in ('a', 'b', 'c', 'd e'):
        label = (f'labels/{name}.txt', '0 0.5 0.5 0.5 0.5')
        write(tmp_path, f'images/{name}.jpg', label)
    split = tmp_path / 'train.txt'
    split.write_text('data/images/c.jpg\na\n\nimages\\d e.jpg\nc\n')
    options = ['--classes', 'cat', '--split', split]
    code, coco = run(tmp_path, *options)
    assert code == 0
    files = [i['file_name'] for i in coco['images']]
    assert files == ['c.jpg', 'a.jpg', 'd e.jpg']
    assert 'no image' not in caplog.text
    split.write_text('z.jpg')
    assert run(tmp_path, *options)[0] == 1
    assert 'z.jpg fits 0 images' in caplog.text


def test_split_file_with_folders(tmp_path):
    for name in ('x/a.JPG', 'y/a.jpg', 'y/b.jpg', 'y/b.png'):
        write(tmp_path, f'images/{name}')
    folder = yolo.ImageFolder(tmp_path / 'images')
    split = tmp_path / 'train.txt'
    split.write_text('./images/x/a.jpg\nelse/y/a.jpg\nb.png')
    chosen = yolo.choose_images(folder, split)
    names = [path.relative_to(folder.root).as_posix() for path in chosen]
    assert names == ['x/a.JPG', 'y/a.jpg', 'y/b.png']


def test_split_by_share(tmp_path):
    for name in 'abcd':
        label = (f'labels/{name}.txt', '0 0.5 0.5 0.5 0.5')
        write(tmp_path, f'images/{name}.jpg', label)
    val = tmp_path / 'val.json'
    options = ['--val-fraction', '0.25', '--val-out', val]
    code, train = run(tmp_path, '--classes', 'cat', *options)
    assert code == 0 and len(train['images']) == 3
    assert len(json.loads(val.read_text())['images']) == 1


@pytest.mark.parametrize(
    ('case', 'expected'),
    [
        ('labels', 'does not exist'),
        ('names', 'give --names FILE'),
        ('other labels', 'has a label file'),
    ],
)
def test_wrong_folders(tmp_path, caplog, case, expected):
    write(tmp_path, 'images/a.jpg', ('labels/a.txt', '0 0.5 0.5 0.5 0.5'))
    options = [] if case == 'names' else ['--classes', 'cat']
    if case == 'labels':
        (tmp_path / 'labels').rename(tmp_path / 'other')
    elif case == 'other labels':
        (tmp_path / 'labels' / 'a.txt').rename(tmp_path / 'labels' / 'b.txt')
    assert run(tmp_path, *options) == (1, None)
    assert expected in caplog.text


def test_one_source_of_names(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, '--classes', 'cat', '--names', 'data.yaml')
