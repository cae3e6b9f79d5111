#!/usr/bin/env bash
# Set-up, a look at the environment, then the test suite.
# Usage: bash tools/run_tests.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh

setup_env tests

# The tests use small tensors: two processes of one thread each take half the
# time of one process with two threads. A file of tests stays in one process,
# and those with slow tests come first (tests/conftest.py).
processes="${TEST_PROCESSES:-2}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MPLBACKEND="${MPLBACKEND:-Agg}"

"$PYTHON" -m lors_plugin.doctor
# Without a path among the arguments, pytest takes all of tests (pyproject.toml).
code=0
"$PYTHON" -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder \
    "$@" || code=$?
exit "$code"
