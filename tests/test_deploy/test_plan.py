"""tools/benchmarks/engines.py: whole rounds within the minutes given."""

import time

import engines
import pytest


class Run:
    def __init__(self, label, seconds=0.0):
        self.label, self.seconds, self.times = label, seconds, 0

    def time(self, modes, clock):
        self.times += 1
        time.sleep(self.seconds)
        return dict.fromkeys(modes, self.seconds)


def block(**options):
    return engines.Block('a', 'detect', (8, 8), {}, **options)


@pytest.mark.parametrize('warm', [True, False])
def test_rounds_in_turns(warm):
    runs = [Run('a'), Run('b')]
    later = time.monotonic() + 60
    found = engines.time_until(runs, block(rounds=4, warm=warm), 'wall', later)
    assert len(found) == 4 and all(set(one) == {'a', 'b'} for one in found)
    assert [run.times for run in runs] == [4 + warm] * 2


def test_no_round_is_begun_that_would_end_too_late():
    runs = [Run('a', 0.05), Run('b', 0.05)]
    soon = time.monotonic() + 0.25
    found = engines.time_until(runs, block(rounds=99), 'wall', soon)
    assert len(found) <= 1 and time.monotonic() < soon + 0.2
    assert engines.time_until(runs, block(), 'wall', time.monotonic()) == []


def test_the_plan(capsys):
    assert engines.main(['--list', '--models', 'FCOS', 'ResNet-50']) == 0
    text = capsys.readouterr().out
    assert text.startswith('detect: 1 x 800 x 1333, 1 thread')
    assert '    FCOS: eager, onnxruntime, openvino' in text
    assert 'DINO' not in text
    with pytest.raises(SystemExit):
        engines.parse_args(['--models', 'YOLO'])
