#!/bin/bash
# A token store by many tasks: each does its part of the cells, and one that waits for all of them
# puts the store together.
#   sbatch [--array=0-31] slurm/build_store.sh [arguments of data_prep/build_store.py]
# From the project's folder, with --vocabulary. What a task has done outlives it: submit the same
# again after a failure. The job that puts the store together has the exit code that counts.
#SBATCH --job-name=build_store
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%A_%a.log
set -euo pipefail
[[ -f slurm/job.sh ]] || {
    echo "error: $PWD has no slurm/job.sh: submit this script from the project's folder" >&2
    exit 2
}
source slurm/job.sh

build() { on_nodes 1 0 python data_prep/build_store.py "$@" --workers "${SLURM_CPUS_PER_TASK:-1}"; }

# As this job was asked for, whatever its options were.
submit_last_job() {
    local options=(--dependency="afterany:$SLURM_ARRAY_JOB_ID" --array=0)
    options+=(--job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION")
    options+=(--comment="$SLURM_ARRAY_JOB_ID" --time="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)")
    options+=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    [[ -z ${SLURM_MEM_PER_NODE:-} ]] || options+=(--mem="$SLURM_MEM_PER_NODE")
    [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || options+=(--account="$SLURM_JOB_ACCOUNT")
    [[ -z ${SLURM_JOB_QOS:-} ]] || options+=(--qos="$SLURM_JOB_QOS")
    [[ -z ${SLURM_JOB_RESERVATION:-} ]] || options+=(--reservation="$SLURM_JOB_RESERVATION")
    sbatch "${options[@]}" slurm/build_store.sh --put-together "$@"
}

if [[ ${1:-} == --put-together ]]; then
    build "${@:2}"
    exit
fi
[[ " $* " == *' --vocabulary'[=\ ]* ]] ||
    fail 2 "parts of a store need --vocabulary FILE.json: the inputs' own one would take all of them."
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 == SLURM_ARRAY_TASK_COUNT)) ||
    fail 2 "--array must be whole, such as 0-31: it has $SLURM_ARRAY_TASK_COUNT tasks from" \
        "$SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX."
# By the first task, once. Whatever becomes of the parts: it does itself what they left undone.
if ((part == 0)) && ! squeue --noheader --me --format=%k | grep -qx "$SLURM_ARRAY_JOB_ID"; then
    submit_last_job "$@" ||
        say "warning: nobody will put the store together: run data_prep/build_store.py without --part" >&2
fi
build "$@" --part "$part/$SLURM_ARRAY_TASK_COUNT"
