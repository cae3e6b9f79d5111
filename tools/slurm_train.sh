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
# A signal that comes before srun has started is passed on as soon as it has.
child=''
signal=''
pass_on() {
    signal=$1
    [ -z "$child" ] || kill -s "$1" "$child" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap 'pass_on INT' INT
(slurm_launch "$PARTITION" "$JOB_NAME" "$TOOLS/train.py" "$CONFIG" \
    --work-dir "$WORK_DIR" --launcher slurm "$@") &
child=$!
[ -z "$signal" ] || pass_on "$signal"
while true; do
    signal=''
    code=0
    wait "$child" || code=$?
    # A signal ends the waiting, but not srun.
    [ -n "$signal" ] || break
done
# srun ends all tasks as soon as one has ended, and reports the last of them.
if [ "$code" != 0 ] && [ "$(saved)" != "$before" ]; then code=75; fi
exit "$code"
