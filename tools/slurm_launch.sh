#!/usr/bin/env bash
# What slurm_train.sh and slurm_test.sh share. To be sourced.

# slurm_launch PARTITION JOB_NAME SCRIPT [arguments of the script]
slurm_launch() {
    local partition=$1 job_name=$2 extra=()
    shift 2
    GPUS="${GPUS:-8}"
    if [ -z "${GPUS_PER_NODE:-}" ]; then
        GPUS_PER_NODE=$((GPUS < 8 ? GPUS : 8))
    fi
    # All tasks of a job agree on a port, two jobs on a node rarely do.
    export MASTER_PORT="${PORT:-${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-$$} % 20000))}}"
    # As in setup_env.sh: threads that wait leave the processor to others.
    [ -n "${OMP_WAIT_POLICY:-}" ] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
    # Several options in one variable, as OpenMMLab's scripts take them.
    read -r -a extra <<<"${SRUN_ARGS:-}"
    PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec srun \
        -p "$partition" \
        --job-name="$job_name" \
        --gres="gpu:$GPUS_PER_NODE" \
        --ntasks="$GPUS" \
        --ntasks-per-node="$GPUS_PER_NODE" \
        --cpus-per-task="${CPUS_PER_TASK:-5}" \
        --kill-on-bad-exit=1 \
        ${extra[@]+"${extra[@]}"} \
        "${PYTHON:-python}" -u "$@"
}
