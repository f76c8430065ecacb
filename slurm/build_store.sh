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

if [[ ${1:-} == --put-together ]]; then
    on_nodes 1 python data_prep/build_store.py "${@:2}" --workers "${SLURM_CPUS_PER_TASK:-1}"
    exit
fi
[[ " $* " == *' --vocabulary'[=\ ]* ]] ||
    fail 2 "parts of a store need --vocabulary FILE.json: the inputs' own one would take all of them."
part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1 == SLURM_ARRAY_TASK_COUNT)) ||
    fail 2 "--array must be whole, such as 0-31: it has $SLURM_ARRAY_TASK_COUNT tasks from" \
        "$SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX."
# Whatever becomes of the parts: it does itself what they left undone.
if ((part == 0 && ${SLURM_RESTART_COUNT:-0} == 0)); then
    options=(--dependency="afterany:$SLURM_ARRAY_JOB_ID" --array=0)
    options+=(--partition="$SLURM_JOB_PARTITION" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}")
    [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || options+=(--account="$SLURM_JOB_ACCOUNT")
    sbatch "${options[@]}" slurm/build_store.sh --put-together "$@"
fi
on_nodes 1 python data_prep/build_store.py "$@" --workers "${SLURM_CPUS_PER_TASK:-1}" \
    --part "$part/$SLURM_ARRAY_TASK_COUNT"
