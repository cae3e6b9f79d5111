#!/usr/bin/env bash
# Test on a cluster that Slurm schedules.
set -euo pipefail

if [ "$#" -lt 4 ]; then
    cat >&2 <<'USAGE'
Usage: bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]

Environment: GPUS (8), GPUS_PER_NODE (8 or GPUS, whichever is smaller),
CPUS_PER_TASK (5), SRUN_ARGS (more options for srun), PYTHON (python),
PORT (MASTER_PORT, or else one by the number of the job).
USAGE
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
CHECKPOINT=$4
shift 4

TOOLS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$TOOLS/slurm_launch.sh"
slurm_launch "$PARTITION" "$JOB_NAME" "$TOOLS/test.py" "$CONFIG" \
    "$CHECKPOINT" --launcher slurm "$@"
