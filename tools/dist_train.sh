#!/usr/bin/env bash
# Train with several processes, one for each GPU (or on CPU cores by gloo).
set -euo pipefail

if [ "$#" -lt 2 ] || [[ ! "$2" =~ ^[1-9][0-9]*$ ]]; then
    cat >&2 <<'USAGE'
Usage: bash tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]

Environment: NNODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1), PORT (a free
one; 29500 with several nodes), PYTHON (python).

Exit code 75: SIGTERM or SIGUSR1 asked the training to stop and it saved its
state; start it again with --resume.
USAGE
    exit 2
fi
CONFIG=$1
GPUS=$2
shift 2

TOOLS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$TOOLS/dist_launch.sh"
dist_launch "$GPUS" "$TOOLS/train.py" "$CONFIG" --launcher pytorch "$@"
