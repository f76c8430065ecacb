#!/bin/bash
# What srun starts on every node of a job: the command given, in the site's environment.
set -euo pipefail
source slurm/environment.sh
# torchrun reads its options from PET_...: this one differs from node to node.
export PET_NODE_RANK=$SLURM_NODEID
exec "$@"
