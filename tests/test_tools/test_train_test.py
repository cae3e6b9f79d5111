"""``tools/train.py`` and ``tools/test.py`` on small stock models."""

import pickle
import resource
from pathlib import Path

import pytest
import test
import torch
import train
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper

from lors_plugin.build import build_model

pytestmark = pytest.mark.usefixtures('in_tmp_path')


def test_classification_is_trained_resumed_and_tested(classification):
    assert train.main([classification, '--auto-scale-lr']) == 0
    work_dir = Path('work_dirs') / Path(classification).stem
    first = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    assert first['optimizer']['param_groups'][0]['lr'] == pytest.approx(0.005)

    more = ['--resume', '--cfg-options', 'train_cfg.max_epochs=2']
    assert train.main([classification, *more]) == 0
    second = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert second['meta']['epoch'] == 2

    checkpoint = str(work_dir / 'epoch_2.pth')
    outputs = ['--out', 'out.pkl', '--show-dir', 'shown']
    assert test.main([classification, checkpoint, *outputs]) == 0
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert len(predictions) == 6
    assert predictions[0]['pred_score'].shape == (3,)
    assert len(list(Path('shown').iterdir())) > 0


def test_detection_is_trained_and_tested(detection):
    pytest.importorskip('mmdet')
    assert train.main([detection, '--work-dir', 'here']) == 0
    outputs = ['--out', 'out.pkl', '--show-dir', str(Path('shown').resolve())]
    argv = [detection, 'here/epoch_1.pth', '--work-dir', 'there', *outputs]
    assert test.main(argv) == 0
    predictions = pickle.loads(Path('out.pkl').read_bytes())
    assert len(predictions) == 2
    assert predictions[0]['pred_instances']['bboxes'].shape == (5, 4)
    assert len(list(Path('shown').glob('*.png'))) == 2


@pytest.fixture
def weights(classification):
    """Untrained weights of the classifier."""
    model = build_model(Config.fromfile(classification))
    torch.save(dict(state_dict=model.state_dict()), 'w.pth')
    return 'w.pth'


def test_pictures_go_where_a_shell_user_expects(detection):
    """Below the current directory, and not below the work directory."""
    cfg = Config.fromfile(detection)
    args = test.parse_args([detection, 'w.pth', '--show-dir', 'pictures'])
    test.apply_visualization(cfg, args)
    place = str(Path('pictures').resolve())
    assert cfg.default_hooks.visualization.test_out_dir == place


def test_predictions_on_a_full_disk(classification, weights, fails):
    """The old file stays, nothing lies beside it, and one line says so."""
    Path('out').mkdir()
    argv = [classification, weights, '--out', 'out/a.pkl']
    assert test.main(argv) == 0
    before = Path('out/a.pkl').read_bytes()
    assert len(pickle.loads(before)) == 6

    metric = test.dump_metric(Config.fromfile(classification), 'out/a.pkl')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(test.PredictionsWriteError) as error:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            metric.compute_metrics(['x' * 1000])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '--out out/a.pkl cannot be written' in str(error.value)
    assert Path('out/a.pkl').read_bytes() == before
    assert [p.name for p in Path('out').iterdir()] == ['a.pkl']

    # The exit code, where a file stands in the way of its folder.
    argv[-1] = 'out/a.pkl/b.pkl'
    assert '--out out/a.pkl/b.pkl cannot be' in fails(test.main, *argv)
    Path('folder.pkl').mkdir()
    argv[-1] = 'folder.pkl'
    assert 'is a directory' in fails(test.main, *argv)


def test_predictions_that_are_no_numbers(classification, weights, capsys):
    """Of weights so large that values overflow."""
    content = torch.load(weights)
    for value in content['state_dict'].values():
        value.fill_(3e38)
    torch.save(content, 'large.pth')
    for path, said in ((weights, False), ('large.pth', True)):
        argv = [classification, path, '--work-dir', path[:-4]]
        assert test.main(argv) == 0
        text = ''.join(capsys.readouterr())
        assert ('0.png: pred_score of the prediction hold NaN' in text) == said
        assert ('6 of 6 images have predictions' in text) == said


@pytest.mark.parametrize('which', [0, 1], ids=['train', 'test'])
def test_damaged_weights(classification, weights, fails, which):
    content = torch.load(weights)
    next(iter(content['state_dict'].values())).view(-1)[0] = float('nan')
    torch.save(content, 'nan.pth')
    argv = [['--cfg-options', 'load_from=nan.pth'], ['nan.pth']][which]
    text = fails((train, test)[which].main, classification, *argv)
    assert 'nan.pth: 1 of 8 weights hold NaN' in text


def test_user_mistakes_before_anything_is_built(classification, fails):
    text = fails(train.main, 'none.py')
    assert 'there is no config none.py' in text

    data = ['--cfg-options', 'train_dataloader.dataset.data_root=nowhere']
    text = fails(train.main, classification, *data)
    assert 'train_dataloader.dataset.data_root: nowhere' in text

    classes = ['--cfg-options', 'model.head.num_classes=7']
    text = fails(train.main, classification, *classes)
    assert 'model.head.num_classes=7' in text
    assert 'has 3 classes' in text

    text = fails(train.main, classification, '--resume', 'none.pth')
    assert '--resume: the checkpoint file none.pth does not exist' in text

    text = fails(test.main, classification, 'none.pth')
    assert 'CHECKPOINT: the checkpoint file none.pth' in text

    Path('x.pth').write_bytes(b'')
    text = fails(test.main, classification, 'x.pth', '--out', 'out.json')
    assert 'must end in .pkl' in text

    Path('broken.py').write_text('model = dict(')
    text = fails(train.main, 'broken.py')
    assert 'broken.py cannot be read' in text
    assert not Path('work_dirs').exists()


def test_no_checks_allows_other_numbers_of_classes(classification, fails):
    argv = ['--work-dir', 'w', '--cfg-options', 'model.head.num_classes=7']
    assert '--no-checks' in fails(train.main, classification, *argv)
    assert train.main([classification, '--no-checks', *argv]) == 0
    argv = ['w/epoch_1.pth', *argv]
    assert '--no-checks' in fails(test.main, classification, *argv)
    assert test.main([classification, '--no-checks', *argv]) == 0


def test_mistakes_in_the_model(classification, fails):
    options = ['--cfg-options', 'model.neck.foo=1']
    text = fails(train.main, classification, *options)
    assert "unexpected keyword argument 'foo'" in text
    assert '--debug' in text
    with pytest.raises(TypeError, match='foo'):
        train.main([classification, *options, '--debug'])

    torch.save(
        dict(state_dict={'backbone.features.0.weight': torch.zeros(4, 1)}),
        'other.pth',
    )
    text = fails(test.main, classification, 'other.pth')
    assert 'other.pth does not fit the model of this config' in text
    assert 'backbone.features.0.weight (file (4, 1)' in text
    load = ['--cfg-options', 'load_from=other.pth']
    text = fails(train.main, classification, *load)
    assert 'same architecture' in text


@pytest.mark.parametrize(
    ('given', 'cuda', 'dtype'),
    [
        ('auto', False, 'bfloat16'),
        ('auto', True, 'float16'),
        ('float16', False, 'float16'),
        ('bfloat16', True, 'bfloat16'),
    ],
)
def test_amp(monkeypatch, given, cuda, dtype):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')  # loggers ask
    options = dict(
        type='OptimWrapper',
        optimizer=dict(type='SGD', lr=0.1),
        clip_grad=dict(max_norm=1),
    )
    cfg = Config(dict(optim_wrapper=options))
    train.apply_amp(cfg, given)
    expected = dict(
        options, type='lors_plugin.AutocastOptimWrapper', dtype=dtype
    )
    assert cfg.optim_wrapper.to_dict() == expected


def test_amp_where_the_config_decides():
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper')))
    train.apply_amp(cfg, 'auto')
    assert cfg.optim_wrapper.to_dict() == dict(type='AmpOptimWrapper')
    cfg = Config(dict(optim_wrapper=dict(type=OptimWrapper)))
    train.apply_amp(cfg, 'bfloat16')
    assert cfg.optim_wrapper.type == 'lors_plugin.AutocastOptimWrapper'
    cfg = Config(dict(optim_wrapper=dict(type=AmpOptimWrapper)))
    train.apply_amp(cfg, 'float16')
    assert cfg.optim_wrapper.type is AmpOptimWrapper
    assert cfg.optim_wrapper.dtype == 'float16'
    cfg = Config(dict(optim_wrapper=dict(type='ApexOptimWrapper')))
    with pytest.raises(ValueError, match='ApexOptimWrapper'):
        train.apply_amp(cfg, 'auto')


def test_auto_scale_lr_needs_a_base():
    with pytest.raises(ValueError, match='base_batch_size'):
        train.apply_auto_scale_lr(Config(dict()))


EACH_EPOCH = dict(type='lors_plugin.CheckpointHook', interval=1)


@pytest.mark.parametrize(
    ('hooks', 'expected'),
    [
        ({}, EACH_EPOCH),
        (dict(default_hooks=None), EACH_EPOCH),
        (
            dict(default_hooks=dict(checkpoint=dict(type='CheckpointHook'))),
            dict(type='lors_plugin.CheckpointHook'),
        ),
        (
            dict(
                default_hooks=dict(
                    checkpoint=dict(type=CheckpointHook, interval=3)
                )
            ),
            dict(type='lors_plugin.CheckpointHook', interval=3),
        ),
        # Those of users stay, and so does the wish for none.
        (
            dict(default_hooks=dict(checkpoint=dict(type='MyHook'))),
            dict(type='MyHook'),
        ),
        (dict(default_hooks=dict(checkpoint=None)), None),
    ],
)
def test_no_config_loses_its_checkpoints(hooks, expected):
    cfg = Config(hooks)
    train.use_checkpoint_hook(cfg)
    assert cfg.default_hooks.checkpoint == expected
