#!/usr/bin/env bash
# Check and measure this package on a GPU, in ten minutes:
#
#   bash tools/gpu_check.sh [--minutes 10] [--wheels DIR] [--output DIR]
#
# It takes the interpreter in PYTHON or the active environment if everything
# can be imported there. Else it installs what is missing, from the package
# index or, without a network, from the wheels in DIR; where the machine's own
# Python has a PyTorch, into an environment that sees it. The time for that
# does not count. `--help` says more.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
ENV_DIR="$ROOT/.venv"

wheels=""
for argument in "$@"; do
    case "$argument" in
        --wheels=*) wheels="${argument#*=}" ;;
        *) [ "${previous:-}" != --wheels ] || wheels="$argument" ;;
    esac
    previous="$argument"
done
if [ -n "$wheels" ]; then
    if [ ! -d "$wheels" ]; then
        echo "error: --wheels $wheels is no folder" >&2
        exit 2
    fi
    PIP_FIND_LINKS="$(cd "$wheels" && pwd)"
    export PIP_NO_INDEX=1 PIP_FIND_LINKS
fi

# 0 if the interpreter $1 can import the rest of the arguments.
has() {
    (cd / && "$1" -c 'import importlib.util as util, sys
sys.exit(not all(map(util.find_spec, sys.argv[1:])))' "${@:2}") 2>/dev/null
}

chosen="${PYTHON:-}"
for folder in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}" "$ENV_DIR"; do
    if [ -z "$chosen" ] && [ -n "$folder" ] && [ -x "$folder/bin/python" ]; then
        chosen="$folder/bin/python"
    fi
done
[ -n "$chosen" ] || chosen="$(command -v python3 || command -v python || true)"
if [ -n "$chosen" ] &&
    has "$chosen" torch torchvision mmengine mmcv mmdet mmpretrain pytest; then
    PYTHON="$chosen"
else
    if [ -n "$chosen" ] && [ ! -e "$ENV_DIR" ] && has "$chosen" torch &&
        "$chosen" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
        # The machine's PyTorch fits its driver; another one may not.
        "$chosen" -m venv --system-site-packages "$ENV_DIR"
        export PYTHON="$ENV_DIR/bin/python"
    fi
    . "$ROOT/tools/setup_env.sh"
    setup_env tests optional
fi
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" \
    exec "$PYTHON" "$ROOT/tools/benchmarks/gpu_check.py" "$@"
