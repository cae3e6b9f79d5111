"""Where host packages fall short, and what stands in."""

import logging
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lors_plugin import compat
from lors_plugin.compat import (
    MissingOpError,
    drop_debug_messages,
    has_compiled_ops,
    install_mmcv_ext_fallback,
    is_worth_telling,
    register_safe_globals,
)


@pytest.fixture
def fallback(monkeypatch):
    """The stand-in for ``mmcv._ext``, as if none had been imported."""
    finder = compat._ExtFallback()
    spec = finder.find_spec('mmcv._ext')
    module = types.ModuleType(spec.name)
    finder.exec_module(module)
    return module


def run(code, path=''):
    """Run a program with modules of ``path``; return what it prints."""
    paths = [str(path), os.environ.get('PYTHONPATH', '')]
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FAKE_MMCV = """
import lors_plugin
from lors_plugin.compat import has_compiled_ops
print(has_compiled_ops())
import mmcv._ext
print(mmcv.__file__)
print(hasattr(mmcv._ext, 'LORS_PLUGIN_FALLBACK'))
print(has_compiled_ops())
"""


@pytest.fixture
def fake_mmcv(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    return package


def test_stands_in_where_nothing_is_compiled(fake_mmcv):
    out = run(FAKE_MMCV, fake_mmcv.parent)
    assert out == ['False', f'{fake_mmcv}/__init__.py', 'True', 'False']


def test_a_compiled_extension_wins(fake_mmcv):
    (fake_mmcv / '_ext.py').write_text('nms = 1')
    out = run(FAKE_MMCV, fake_mmcv.parent)
    assert out == ['True', f'{fake_mmcv}/__init__.py', 'False', 'True']


def test_installed_once_and_asked_last():
    install_mmcv_ext_fallback()
    install_mmcv_ext_fallback()
    own = [f for f in sys.meta_path if isinstance(f, compat._ExtFallback)]
    assert len(own) == 1
    assert own[0].find_spec('mmcv.ops') is None
    assert own[0].find_spec('torch') is None


def test_mmdet_models_import_here():
    import mmcv.ops  # noqa: F401
    import mmdet.models  # noqa: F401

    extension = sys.modules['mmcv._ext']
    assert has_compiled_ops() != hasattr(extension, 'LORS_PLUGIN_FALLBACK')


def test_other_operators_name_themselves(fallback):
    for name in ('roi_align_forward', 'sigmoid_focal_loss_forward'):
        with pytest.raises(MissingOpError, match=f'"{name}" has no replace'):
            getattr(fallback, name)(torch.zeros(1), offset=1)
    assert fallback.deform_conv_forward.__name__ == 'deform_conv_forward'
    assert not hasattr(fallback, '__wrapped__')


@pytest.mark.skipif(
    'has_compiled_ops()', reason='this mmcv has compiled operators'
)
def test_operators_of_mmcv_name_themselves():
    from mmcv.ops import roi_align

    with pytest.raises(MissingOpError, match='roi_align_forward'):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2)


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('"FileClient" will be deprecated in future. Please use', False),
        ('"HardDiskBackend" is the alias of "LocalBackend"', False),
        ('The checkpoint holds no state of the optimizer', True),
        ('the word "FileClient" will be deprecated', True),
        ('backbone.bn.weight is skipped since its requires_grad=False', False),
        ('the image is skipped', True),
    ],
)
def test_messages_about_code_of_hosts(text, told):
    record = logging.LogRecord('x', logging.WARNING, '', 1, text, (), None)
    assert is_worth_telling(record) is told


def nms_by_hand(boxes, scores, threshold):
    """Keep the best, drop what it covers, go on."""
    order = scores.argsort(descending=True).tolist()
    kept = []
    while order:
        best = order.pop(0)
        kept.append(best)
        order = [i for i in order if iou(boxes[best], boxes[i]) <= threshold]
    return kept


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return inner / (sum(areas) - inner)


@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.9])
def test_nms(fallback, threshold):
    corners = torch.rand(40, 2, 2).sort(1).values
    boxes, scores = corners.flatten(1) * 100, torch.rand(40)
    kept = fallback.nms(boxes, scores, iou_threshold=threshold, offset=0)
    assert kept.tolist() == nms_by_hand(boxes, scores, threshold)
    assert fallback.nms(boxes[:0], scores[:0], 0.5, 0).tolist() == []


def test_nms_through_mmcv():
    from mmcv.ops import nms

    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 9, 9]]
    )
    scores = torch.tensor([0.5, 0.9, 0.1, 0.3])
    found, index = nms(boxes, scores, 0.5)
    assert index.tolist() == [1, 2]
    assert_close(found[:, :4], boxes[index])


def test_nms_with_the_old_offset(fallback):
    with pytest.raises(MissingOpError, match='offset=1'):
        fallback.nms(torch.zeros(1, 4), torch.zeros(1), 0.5, 1)


def test_checkpoints_of_mmengine_load_safely(tmp_path):
    """With the log history as a training leaves it."""
    from mmengine.logging import MessageHub

    hub = MessageHub.get_instance('test_compat')
    for value in (1.0, 0.5):
        hub.update_scalar('train/loss', value)
    hub.update_scalar('train/tensor', torch.tensor(2.0))
    hub.update_scalar('train/numpy', np.float32(3.0))
    hub.update_info('epoch', 2)
    path = tmp_path / 'epoch_2.pth'
    torch.save(dict(message_hub=hub.state_dict()), path)

    register_safe_globals()
    state = torch.load(path, weights_only=True)['message_hub']
    other = MessageHub.get_instance('test_compat_other')
    other.load_state_dict(state)
    history = other.get_scalar('train/loss')
    assert_close(history.data[0], np.array([1.0, 0.5]))
    assert history.statistics('mean') == 0.75
    assert history.current() == 0.5
    assert other.get_info('epoch') == 2


class Attack:
    """A pickle that reaches for something through ``getattr``."""

    def __init__(self, owner, name):
        self.target = owner, name

    def __reduce__(self):
        return getattr, self.target


@pytest.mark.parametrize('name', ['__init__', '__class__', 'data', 'update'])
def test_nothing_else_becomes_loadable(tmp_path, name):
    from mmengine.logging import HistoryBuffer

    register_safe_globals()
    path = tmp_path / 'attack.pth'
    for owner in (HistoryBuffer, np.ndarray):
        torch.save(Attack(owner, name), path)
        with pytest.raises(Exception, match='not allowed|Unsupported'):
            torch.load(path, weights_only=True)


def test_debug_messages_without_a_logger_are_not_printed(capsys):
    drop_debug_messages()
    drop_debug_messages()
    from mmengine.logging import MMLogger, print_log

    print_log('one', level=logging.DEBUG)
    print_log('two')
    print_log('three', logger='silent')
    assert capsys.readouterr().out == 'two\n'
    logger = MMLogger.get_instance('debugged', log_level='DEBUG')
    print_log('four', logger=logger, level=logging.DEBUG)
    assert 'four' in capsys.readouterr().out
