"""Parts of the decoder sharded by FSDP, as PyTorch shards them."""

import json
import subprocess
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name('fsdp_runner.py')


@pytest.mark.slow
def test_units_of_fsdp(quick_python, tmp_path):
    """Weights are there only while the forward of their unit runs."""
    command = [quick_python, RUNNER, tmp_path]
    subprocess.run(command, timeout=300, check=True)
    for rank in range(2):
        found = json.loads((tmp_path / f'rank{rank}.json').read_text())
        assert len(found) == 8
        assert found == dict.fromkeys(found, 0.0)
