"""Units of the decoder that FSDP shards over two processes."""

import json
import subprocess
import sys
from pathlib import Path

RUNNER = Path(__file__).with_name('fsdp_runner.py')


def test_units_of_fsdp(tmp_path):
    """Weights are there only while the forward of their unit runs."""
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RUNNER), str(rank), str(tmp_path / 'store')],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0
        found = json.loads(out.splitlines()[-1])
        assert len(found) == 8
        assert found == dict.fromkeys(found, 0.0)
