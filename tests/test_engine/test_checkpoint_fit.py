import os

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel
from mmengine.runner import CheckpointLoader
from torch import nn

from lors_plugin.checkpoints import read_weights, to_original
from lors_plugin.engine.checkpoint_fit import (
    check_checkpoint,
    check_checkpoint_path,
    check_resumable,
    compare,
    unwrapped,
)


def make_model(width=4, classes=3):
    return nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, classes)
    )


def save(path, state, **more):
    torch.save(dict(meta={}, state_dict=state, **more), path)
    return str(path)


def test_own_checkpoint_fits(tmp_path):
    model = make_model()
    fit = check_checkpoint(model, save(tmp_path / 'a', model.state_dict()))
    assert fit.complete
    assert fit.unmatched_share == 0


def test_prefix_of_a_parallel_wrapper_is_dropped(tmp_path):
    model = make_model()
    state = {f'module.{k}': v for k, v in model.state_dict().items()}
    assert check_checkpoint(model, save(tmp_path / 'a', state)).complete


def test_a_bare_state_dict_is_read(tmp_path):
    model = make_model()
    torch.save(model.state_dict(), tmp_path / 'a')
    assert check_checkpoint(model, str(tmp_path / 'a')).complete


def test_test_time_wrappers_are_looked_through():
    class Merge(BaseTTAModel):
        def merge_preds(self, data_samples_list):
            return data_samples_list

    inner = make_model()
    wrapped = Merge.__new__(Merge)
    nn.Module.__init__(wrapped)
    wrapped.module = inner
    assert unwrapped(wrapped) is inner


def test_another_architecture_is_refused(tmp_path):
    path = save(tmp_path / 'a', nn.Conv2d(3, 4, 3).state_dict())
    with pytest.raises(ValueError) as error:
        check_checkpoint(make_model(), path)
    text = str(error.value)
    assert 'does not fit' in text
    assert '0.weight' in text
    assert 'config that the checkpoint was trained with' in text


@pytest.mark.parametrize('share', [0.0, 0.5])
@pytest.mark.parametrize('kind', ['adamixer', 'lors'])
def test_files_of_the_original_programs(tmp_path, tiny_detector, kind, share):
    model = tiny_detector(kind)
    state = model.state_dict()
    path = save(tmp_path / 'a', to_original(state, kind))
    convert = rf'tools/convert_checkpoint\.py {path} '
    with pytest.raises(ValueError, match=convert):
        check_checkpoint(model, path, share)

    other = {k: v[..., :0] for k, v in state.items() if v.dim()}
    own = save(tmp_path / 'b', other)
    with pytest.raises(ValueError, match='does not fit') as error:
        check_checkpoint(model, own, share)
    assert 'convert_checkpoint' not in str(error.value)

    other = {'roi_head.bbox_head.0.fc_cls.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match='does not fit') as error:
        check_checkpoint(model, save(tmp_path / 'c', other), share)
    assert 'convert_checkpoint' not in str(error.value)


def test_other_shapes_are_named_with_both_sizes(tmp_path):
    path = save(tmp_path / 'a', make_model(classes=80).state_dict())
    with pytest.raises(ValueError) as error:
        check_checkpoint(make_model(classes=3), path)
    assert '2.weight (file (80, 4), model (3, 4))' in str(error.value)
    assert '2 have another shape' in str(error.value)


@pytest.mark.parametrize('dtype', [torch.int8, torch.complex64])
def test_quantized_weights_are_not_taken_for_numbers(tmp_path, dtype):
    state = make_model().state_dict()
    state['0.weight'] = state['0.weight'].to(dtype)
    with pytest.raises(ValueError, match=f'0.weight .file {dtype}, model'):
        check_checkpoint(make_model(), save(tmp_path / 'a', state))


def test_fine_tuning_may_leave_the_classifier(tmp_path):
    path = save(tmp_path / 'a', make_model(classes=80).state_dict())
    fit = check_checkpoint(make_model(classes=3), path, max_unmatched=0.5)
    assert len(fit.mismatched) == 2
    other = save(tmp_path / 'b', make_model(width=5).state_dict())
    with pytest.raises(ValueError, match='same architecture'):
        check_checkpoint(make_model(), other, max_unmatched=0.5)


def test_counts():
    model = make_model().state_dict()
    file = dict(model, extra=torch.zeros(1))
    del file['0.weight'], file['1.num_batches_tracked']
    fit = compare(model, file)
    assert fit.missing == ['0.weight']
    assert fit.unexpected == ['extra']
    assert fit.unmatched_share == pytest.approx(32 / (32 + 4 + 16 + 1 + 15))


def test_averaged_weights_do_not_count_as_unknown(tmp_path):
    model = make_model()
    state = model.state_dict()
    averaged = {f'module.{k}': v for k, v in state.items()}
    path = save(tmp_path / 'a', state, ema_state_dict=averaged)
    assert check_checkpoint(model, path).unexpected == []


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'PK\x03\x04 half a download')
    with pytest.raises(ValueError, match='cannot be read; it is cut off'):
        read_weights(str(path))
    torch.save(dict(meta={}), path)
    with pytest.raises(ValueError, match='holds no weights'):
        read_weights(str(path))


class Code:
    def __reduce__(self):
        return os.makedirs, ('ran', 0o777, True)


@pytest.mark.parametrize('address', ['{}', 'http://host/{}'])
def test_code_in_a_file_needs_trust(tmp_path, monkeypatch, address):
    """At an address too, where MMEngine reads without asking."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        CheckpointLoader,
        'load_checkpoint',
        lambda path, **_: torch.load('a.pth', weights_only=False),
    )
    save('a.pth', make_model().state_dict(), extra=Code())
    path = address.format('a.pth')
    with pytest.raises(ValueError, match=r'a\.pth holds more than .*--trust'):
        read_weights(path)
    assert not (tmp_path / 'ran').exists()
    assert len(read_weights(path, trust=True)) == 9
    assert (tmp_path / 'ran').exists()


def test_missing_file_names_the_field():
    with pytest.raises(FileNotFoundError, match=r'load_from: .*none\.pth'):
        check_checkpoint_path('none.pth', 'load_from')
    check_checkpoint_path('torchvision://resnet50', 'load_from')


def training_state():
    """What MMEngine writes beside the weights."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    return dict(
        meta=dict(epoch=1, iter=2, seed=3, dataset_meta=dict(classes=())),
        state_dict=make_model().state_dict(),
        message_hub=dict(
            log_scalars={'loss': history, 'old': 1.0},
            runtime_info=dict(iter=1),
            resumed_keys=dict(iter=True),
        ),
        optimizer=dict(state={}),
        param_schedulers=[],
    )


def test_whole_state_of_a_training_is_accepted():
    content = training_state()
    check_resumable(content, 'a.pth')
    for name in ('optimizer', 'param_schedulers'):
        del content[name]
    del content['meta']['seed']
    check_resumable(content, 'a.pth')


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('meta', 3),
        ('meta', None),
        ('meta.epoch', 'one'),
        ('meta.epoch', None),
        ('meta.iter', -1),
        ('meta.iter', True),
        ('meta.seed', [1]),
        ('meta.dataset_meta', 'abc'),
        ('message_hub', ['a']),
        ('message_hub', None),
        ('message_hub.runtime_info', 7),
        ('message_hub.log_scalars', None),
        ('message_hub.resumed_keys', 'iter'),
        ('optimizer', 'SGD'),
        ('param_schedulers', 2.5),
        ('ema_state_dict', 1),
    ],
)
def test_state_of_strange_types_is_refused_by_name(field, value):
    content = training_state()
    *parents, name = field.split('.')
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    with pytest.raises(ValueError, match='a.pth') as error:
        check_resumable(content, 'a.pth')
    assert field in str(error.value)


@pytest.mark.parametrize(
    'values', [None, np.ones(3), np.ones((2, 1)), np.array(['a', 'b'])]
)
def test_log_history_that_is_none_is_refused(values):
    content = training_state()
    content['message_hub']['log_scalars']['loss']._log_history = values
    with pytest.raises(ValueError, match='message_hub.log_scalars.loss'):
        check_resumable(content, 'a.pth')
