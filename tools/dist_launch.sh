#!/usr/bin/env bash
# What dist_train.sh and dist_test.sh share. To be sourced.

# A port that nobody listens on.
_free_port() {
    "$PYTHON" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

# dist_launch PROCESSES SCRIPT [arguments of the script]
dist_launch() {
    local processes=$1 cores
    shift
    PYTHON="${PYTHON:-$(command -v python || command -v python3)}"
    NNODES="${NNODES:-1}"
    NODE_RANK="${NODE_RANK:-0}"
    MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
    if [ -z "${PORT:-}" ]; then
        # Several nodes must agree on a port beforehand.
        PORT=29500
        [ "$NNODES" != 1 ] || PORT="$(_free_port)"
    fi
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        cores="$("$PYTHON" -c 'import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
      else os.cpu_count())')"
        OMP_NUM_THREADS=$((cores / processes))
        [ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
        export OMP_NUM_THREADS
    fi
    # As in setup_env.sh: threads that wait leave the processor to others.
    [ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
    # The checkout itself, for those who have not installed it.
    PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec "$PYTHON" \
        "$TOOLS/dist_run.py" \
        --nnodes="$NNODES" \
        --node_rank="$NODE_RANK" \
        --master_addr="$MASTER_ADDR" \
        --master_port="$PORT" \
        --nproc_per_node="$processes" \
        "$@"
}
