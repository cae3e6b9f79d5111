"""Parts of the decoder sharded by FSDP, as PyTorch shards them."""

import json
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name('fsdp_runner.py')


def test_units_of_fsdp(tmp_path):
    """Weights are there only while the forward of their unit runs."""
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(tmp_path / 'store')],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    ranks = [line for line in done.stdout.splitlines() if line[:1] == '{']
    assert len(ranks) == 2
    for found in map(json.loads, ranks):
        assert len(found) == 8
        assert found == dict.fromkeys(found, 0.0)
