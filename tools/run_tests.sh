#!/usr/bin/env bash
# Set-up, a look at the environment, then the test suite.
# Usage: bash tools/run_tests.sh [pytest arguments]
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh

setup_env tests

# The tests use small tensors: more threads than this only wait on each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
export MPLBACKEND="${MPLBACKEND:-Agg}"

"$PYTHON" -m lors_plugin.doctor
# Without a path among the arguments, pytest takes all of tests (pyproject.toml).
code=0
"$PYTHON" -m pytest "$@" || code=$?
exit "$code"
