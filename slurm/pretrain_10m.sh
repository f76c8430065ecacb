#!/bin/bash
# The model card's 10.3M variant: 8 nodes x 8 GPUs, 32 cells per GPU, 2,048 per step.
#   sbatch slurm/pretrain_10m.sh [arguments of launch/pretrain.py]
#   sbatch --nodes=2 slurm/pretrain_10m.sh data.store=/data/census run.dir=/runs/10m
# From the project's folder. The job starts again by itself until the run is finished.
#SBATCH --job-name=geneformer_10m
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.log
set -euo pipefail
# SLURM runs a copy of this file, and in the folder that it was submitted from.
[[ -f slurm/job.sh ]] || {
    echo "error: $PWD has no slurm/job.sh: submit this script from the project's folder" >&2
    exit 2
}
source slurm/job.sh
pretrain configs/geneformer_10m.yaml "$@"
