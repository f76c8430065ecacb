#!/bin/bash
# Cells as vectors, by all GPUs of a node or of several.
#   sbatch slurm/embed.sh [arguments of launch/embed.py]
# From the project's folder. What is written is whole or not there: after a failure submit it again.
#SBATCH --job-name=embed
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail
[[ -f slurm/job.sh ]] || {
    echo "error: $PWD has no slurm/job.sh: submit this script from the project's folder" >&2
    exit 2
}
source slurm/job.sh
launcher
on_nodes "$SLURM_NNODES" 60 "${launch[@]}" launch/embed.py "$@"
