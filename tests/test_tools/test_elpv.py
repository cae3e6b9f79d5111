"""The data set of solar cells."""

from collections import Counter

import elpv as tool
import pytest


@pytest.fixture
def labels(tmp_path):
    """As many cells of each kind as there are, and some unsure ones."""
    kinds = [key for key, count in tool.COUNTS.items() for _ in range(count)]
    kinds += [(0.3333333333333333, 'mono')] * (tool.NUM_PHOTOS - len(kinds))
    lines = [
        f'images/cell{i:04d}.png  {float(probability)}  {kind}\n'
        for i, (probability, kind) in enumerate(kinds, start=1)
    ]
    path = tmp_path / 'labels.csv'
    path.write_text(''.join(lines))
    return path


def test_split(labels):
    cells = tool.read_labels(labels)
    assert Counter(c[1:] for c in cells) == tool.COUNTS
    splits = tool.split_cells(cells)
    assert {k: len(v) for k, v in splits.items()} == dict(
        train=800, val=200, test=1223
    )
    assert sorted(sum(splits.values(), [])) == sorted(cells)
    for part in splits.values():
        counts = Counter(c[1:] for c in part)
        for key, count in tool.COUNTS.items():
            share = len(part) * count / len(cells)
            assert abs(counts[key] - share) <= 1
    # Always the same, in whatever order the cells were read.
    assert tool.split_cells(cells[::-1]) == splits


def test_lists(labels, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    monkeypatch.setattr(
        tool, 'fetch_wheel_members', lambda *args: [labels] * len(args[2])
    )
    monkeypatch.setattr(tool, 'NUM_PHOTOS', 1)
    assert tool.main(['--out-dir', str(out)]) == 0
    defect, kind = (
        dict(
            line.split()
            for line in (out / f'annotations/{task}_test.txt')
            .read_text()
            .splitlines()
        )
        for task in ('defect', 'type')
    )
    assert defect.keys() == kind.keys() and len(kind) == 1223
    cells = {c.name: c for c in tool.read_labels(labels)}
    for name, label in kind.items():
        assert ('mono', 'poly')[int(label)] == cells[name].kind
        assert int(defect[name]) == cells[name].defect


def test_changed_labels_are_refused(labels, monkeypatch, caplog):
    monkeypatch.setattr(
        tool, 'fetch_wheel_members', lambda *args: [labels] * len(args[2])
    )
    monkeypatch.setattr(tool, 'NUM_PHOTOS', 1)
    text = labels.read_text()
    labels.write_text(text.replace('1.0  poly', '0.0  poly', 1))
    out = ['--out-dir', str(labels.parent / 'out')]
    assert tool.main(out) == 1
    assert 'was changed' in caplog.text
    labels.write_text(text.replace('poly', 'other', 1))
    assert tool.main(out) == 1
    assert 'line' in caplog.text
