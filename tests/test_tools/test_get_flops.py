"""The command that counts, and the tables that it writes."""

import json
import re
from pathlib import Path

import get_flops
import pytest

ROOT = Path(__file__).parents[2]
READMES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'configs').rglob('README.md')
    if '<!-- get_flops:' in path.read_text(encoding='utf-8')
)
QUICK = (
    'configs/lors_adamixer/lors-adamixer_mobilenetv2_quickstart_tree-crowns.py'
)


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope='module')
def known():
    """Counts that all READMEs share."""
    return {}


def test_readmes_with_tables():
    folders = {Path(path).parent.name for path in READMES}
    assert folders >= {'adamixer', 'lors_adamixer'}


def first_row(match):
    """Leave a row in a table of models; each costs a second or two."""
    *head, rows = match[3].split('\n', 2)
    row = rows.splitlines()[0]
    name = re.search(r'\]\((.+?)\)', row)[1]
    return match[1] + name + match[2] + '\n'.join([*head, row, ''])


@pytest.mark.slow
@pytest.mark.parametrize(
    'rows', ['first', pytest.param('all', marks=pytest.mark.thorough)]
)
@pytest.mark.parametrize('readme', READMES)
def test_tables_are_what_the_command_writes(readme, rows, known):
    text = Path(readme).read_text(encoding='utf-8')
    assert '| ' in text.split('<!-- get_flops: ')[1]
    if rows == 'first':
        models = r'(<!-- get_flops: models )(?:.+?)( -->\n)(.*?)(?=<!--)'
        text = re.sub(models, first_row, text, flags=re.DOTALL)
    assert get_flops.with_tables(text, Path(readme), known) == text


def test_weights_per_stage_are_those_of_the_paper():
    """LORS, table 1: the output projection with a private rank of 8."""
    folder = ROOT / 'configs'
    rows = get_flops.stages_table(
        folder / 'lors_adamixer' / 'lors-adamixer_r50_8xb2-1x_coco.py',
        folder / 'adamixer' / 'adamixer_r50-g2-p64_8xb2-1x_coco.py',
    )
    assert [row[0] for row in rows[1:]] == ['1', '2', '3', '6', '12', '24']
    shares = [float(row[4].rstrip('%')) for row in rows[1:]]
    assert shares == pytest.approx([103, 53, 36.5, 19.8, 11.5, 7.3], abs=0.2)


def run(capsys, *argv, code=0):
    assert get_flops.main([str(arg) for arg in argv]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_detector(capsys):
    out = run(capsys, QUICK)
    assert '1 x 256 x 256\n' in out
    assert 'decoder / mixing: low rank' in out
    assert '3,868,551' in out
    assert 'NOT COUNTED' not in out


def test_classifier_and_batch(capsys):
    """ResNet-18 at 224 x 224 takes 1.814 G, as its authors say (1.8)."""
    config = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
    out = run(capsys, config, '--json', '-', '--batch', 2)
    counts = json.loads(out[out.index('{') :])
    assert counts['total']['parameters'] == 11_689_512
    assert f'{counts["total"]["multiply_adds"] / 2e9:.3f}' == '1.814'
    assert counts['shape'] == [224, 224]
    assert counts['batch'] == 2


def test_shape_and_options(capsys, tmp_path):
    path = tmp_path / 'counts.json'
    run(
        capsys, QUICK, '--shape', 100, 70, '--json', path,
        '--cfg-options', 'model.decoder.num_stages=1',
    )  # fmt: skip
    counts = json.loads(path.read_text())
    assert counts['shape'] == [100, 70]
    assert counts['padded_shape'] == [128, 96]
    decoder = [k for k in counts['parts'] if k.startswith('decoder / ')]
    assert len(decoder) >= 7
    assert sum(counts['parts'][name]['shared'] for name in decoder) == 0
    queries, width = 64, 96
    ffn = counts['parts']['decoder / FFN']
    assert ffn['multiply_adds'] == queries * 2 * width * 384


@pytest.mark.parametrize(
    ('config', 'parameters'),
    [
        ('configs/parameternet/parameternet-tiny_fashion-mnist.py', 0),
        ('mmpretrain::lenet/lenet5_mnist.py', 61_706),
    ],
)
def test_gray_images(config, parameters, capsys):
    out = run(capsys, config, '--json', '-')
    total = json.loads(out)['total']
    assert total['multiply_adds'] > 0
    assert total['parameters'] == parameters or not parameters


@pytest.mark.parametrize(
    ('argv', 'text'),
    [
        (['no_such_file.py'], 'no_such_file.py'),
        (['configs/_base_/default_runtime.py'], 'has no model'),
        ([QUICK, '--cfg-options', 'model.decoder.num_groups=5'], 'num_groups'),
        (
            ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'],
            '--real runs it with numbers',
        ),
    ],
    ids=['file', 'model', 'option', 'values'],
)
def test_mistakes(argv, text, capsys):
    assert text in run(capsys, *argv, code=2)


@pytest.mark.parametrize(
    'argv', [[], [QUICK, '--check-readme', 'x'], [QUICK, '--shape', '0']]
)
def test_wrong_arguments(argv, capsys):
    with pytest.raises(SystemExit) as error:
        get_flops.main(argv)
    assert error.value.code == 2


def test_update_and_check(capsys, tmp_path):
    config = (ROOT / QUICK).as_posix()
    (tmp_path / 'tiny.py').write_text(
        f'_base_ = {config!r}\n'
        'model = dict(decoder=dict(num_stages=1, adaptive_groups=1))\n'
    )
    readme = tmp_path / 'README.md'
    empty = (
        'before\n<!-- get_flops: models t*.py -->\nold\n'
        '<!-- get_flops: end -->\nbetween\n'
        '<!-- get_flops: parts tiny.py -->\n<!-- get_flops: end -->\nafter\n'
    )
    readme.write_text(empty)
    error = run(capsys, '--check-readme', readme, code=1)
    assert 'tables differ' in error and readme.read_text() == empty
    run(capsys, '--update-readme', readme)
    text = readme.read_text()
    assert text.startswith('before\n<!--') and text.endswith('-->\nafter\n')
    assert 'old' not in text and 'between' in text
    assert '| [tiny](tiny.py) | 256 x 256 | 3.400 M | 1.035 M |' in text
    assert '| **all** | 3.400 M | 0.48 G |' in text
    readme.write_text(text.replace('3.400 M', '3.401 M', 1))
    run(capsys, '--check-readme', readme, code=1)


@pytest.mark.parametrize(
    ('mark', 'message'),
    [
        ('<!-- get_flops: models *.py -->', 'no end'),
        ('<!-- get_flops: all *.py -->\n<!-- get_flops: end -->', 'no kind'),
        (
            '<!-- get_flops: models x*.py -->\n<!-- get_flops: end -->',
            'no config is named x',
        ),
    ],
)
def test_wrong_marks(mark, message, capsys, tmp_path):
    readme = tmp_path / 'README.md'
    readme.write_text(mark)
    error = run(capsys, '--update-readme', readme, code=2)
    assert message in error
