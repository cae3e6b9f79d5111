#!/usr/bin/env bash
# Train on a cluster that Slurm schedules.
set -euo pipefail

if [ "$#" -lt 4 ]; then
    cat >&2 <<'USAGE'
Usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]

Environment: GPUS (8), GPUS_PER_NODE (8 or GPUS, whichever is smaller),
CPUS_PER_TASK (5), SRUN_ARGS (more options for srun), PYTHON (python),
PORT (MASTER_PORT, or else one by the number of the job).

Exit code 75: the job was told to stop and saved its state; start it again
with --resume.
USAGE
    exit 2
fi
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
shift 4

TOOLS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$TOOLS/slurm_launch.sh"

saved() { stat -c '%i %Y' "$WORK_DIR/interrupted.pth" 2>/dev/null || true; }
before="$(saved)"
# In the background, since Bash passes no signal on to what it waits for.
(slurm_launch "$PARTITION" "$JOB_NAME" "$TOOLS/train.py" "$CONFIG" \
    --work-dir "$WORK_DIR" --launcher slurm "$@") &
trap 'kill -TERM $! 2>/dev/null || true' TERM
trap 'kill -USR1 $! 2>/dev/null || true' USR1
trap 'kill -INT $! 2>/dev/null || true' INT
while true; do
    code=0
    wait $! || code=$?
    # A signal ends the waiting, but not srun.
    kill -0 $! 2>/dev/null || break
done
# srun ends all tasks as soon as one has ended, and reports the last of them.
if [ "$code" != 0 ] && [ "$(saved)" != "$before" ]; then code=75; fi
exit "$code"
