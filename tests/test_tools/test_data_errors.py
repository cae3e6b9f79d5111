"""Data that cannot be used ends a tool with one message that names it."""

import json
from pathlib import Path

import pytest
import test
import torch
import train
from mmengine.config import Config

from lors_plugin.engine.image_errors import ImageError

pytestmark = pytest.mark.usefixtures('in_tmp_path')


def change(config, **options):
    """Write the config with other options."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    cfg.dump(config)


def test_annotations_without_a_field(detection, fails):
    path = Path('coco/a.json')
    data = json.loads(path.read_text())
    for annotation in data['annotations']:
        del annotation['area']
    path.write_text(json.dumps(data))
    for main, *argv in (
        (train.main, detection),
        (test.main, detection, __file__),
    ):
        text = fails(main, *argv)
        assert 'coco/a.json cannot be used as it is' in text
        assert '2 annotations without `area` (first: annotation 0)' in text
    assert not Path('work_dirs').exists()


def test_what_is_kept_is_told(detection, capfd):
    assert train.main([detection, '--work-dir', 'w']) == 0
    out, err = capfd.readouterr()
    assert (
        'coco/a.json (train_dataloader.dataset): 2 images, 2 of 2 boxes kept'
    ) in out + err


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_picture_is_named(detection, fails, workers):
    assert train.main([detection, '--work-dir', 'w']) == 0
    Path('coco/img/1.png').write_bytes(b'no picture')
    change(
        detection,
        **{
            f'{phase}_dataloader.num_workers': workers
            for phase in ('train', 'test')
        },
    )
    for main, *argv in (
        (train.main, detection),
        (test.main, detection, 'w/epoch_1.pth'),
    ):
        text = fails(main, *argv)
        assert text.startswith(
            'error: the image coco/img/1.png cannot be read'
        )


def test_an_empty_picture_is_named_at_the_start(detection, fails):
    Path('coco/img/1.png').write_bytes(b'')
    for main, *argv in (
        (train.main, detection),
        (test.main, detection, __file__),
    ):
        text = fails(main, *argv)
        assert '1 pictures are empty files (0 bytes) (first: coco/img' in text
    assert not Path('work_dirs').exists()


@pytest.mark.parametrize(
    ('names', 'told'),
    [('bac', 'b, a, c in the checkpoint, a, b, c in the data'), ('abc', '')],
)
def test_names_of_a_checkpoint(classification, capfd, names, told):
    assert train.main([classification, '--work-dir', 'w']) == 0
    content = torch.load('w/epoch_1.pth', weights_only=False)
    content['meta']['dataset_meta']['classes'] = list(names)
    torch.save(content, 'w.pth')
    capfd.readouterr()
    assert test.main([classification, 'w.pth', '--work-dir', 'w']) == 0
    text = ''.join(capfd.readouterr())
    assert ('in another order' in text) == bool(told)
    assert told in text


def test_any_process_names_its_image(fails, monkeypatch):
    from tool_utils import user_errors

    def run(argv):
        with user_errors('', False, (ImageError,)):
            raise ImageError('the image a.png cannot be read')

    monkeypatch.setenv('RANK', '1')
    assert fails(run) == 'error: the image a.png cannot be read\n'


def test_an_empty_picture_of_a_classifier(classification, fails):
    Path('images/b/1.png').write_bytes(b'')
    text = fails(train.main, classification)
    assert 'the image images/b/1.png cannot be read' in text


def test_checks_can_be_turned_off(detection, fails):
    change(
        detection,
        **{'test_dataloader.dataset.metainfo.classes': ('bush', 'tree')},
    )
    argv = [detection, 'none.pth']
    Path('none.pth').write_bytes(b'')
    assert 'bush' in fails(test.main, *argv)
    assert 'bush' not in fails(test.main, *argv, '--no-checks')


def test_ctrl_c_is_no_traceback(capsys):
    from tool_utils import user_errors

    with pytest.raises(SystemExit) as ended, user_errors('', False):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == '\ninterrupted\n'
