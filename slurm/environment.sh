# shellcheck shell=bash
# What a site sets once. Every line can be changed here, or from outside:
#   GENEFORMER_VENV=/shared/venv sbatch slurm/pretrain_106m.sh ...
# Read by the job's script on its first node, and by on_node.sh on every node.

# Where the packages are: a virtual environment that every node sees ...
: "${GENEFORMER_VENV:=$PWD/.venv}"
# ... or, with Enroot and Pyxis, an image: a .sqsh file or an address. The project and what else a
# run needs (store, run folder, cache) are mounted into it, each under its own path:
# "$PWD:$PWD,/data:/data,/scratch:/scratch".
: "${GENEFORMER_IMAGE:=}"
: "${GENEFORMER_MOUNTS:=$PWD:$PWD}"

# Folder on each node's own disk for a flat copy of the store, made once per node, by which any cell
# is a look into memory. It takes two bytes per token. Empty: every rank reads the store itself.
: "${GENEFORMER_CACHE_DIR=${SLURM_TMPDIR:-}}"

# Network interface for the ranks' first contact and for gloo; NCCL finds InfiniBand by itself.
# Empty: the one that leads to the first node.
: "${GENEFORMER_INTERFACE:=}"
# Port of the first node's rendezvous: two jobs that share a node must differ.
: "${GENEFORMER_PORT:=$((20000 + ${SLURM_JOB_ID:-0} % 10000))}"

# Ranks of a node: one per GPU that was asked for ("8", "a100:8") and is there: with --exclusive there
# may be more, with --gres fewer. Without GPUs, one.
asked_gpus=${SLURM_GPUS_PER_NODE:-}
: "${GENEFORMER_RANKS_PER_NODE:=$(
    printf '%s\n' "${asked_gpus##*:}" "${SLURM_GPUS_ON_NODE:-}" | sort -n | grep -m 1 '^[1-9]' ||
        printf '1\n'
)}"
# How often a job may start again by itself, preemptions and lost nodes included.
: "${GENEFORMER_MAX_RESTARTS:=20}"
# Whether nodes, network, store and folders are checked before each start: yes or no.
: "${GENEFORMER_PREFLIGHT:=yes}"
# Seconds that ranks have to save once they are told to stop; see checkpoint.deadline_s.
: "${GENEFORMER_SAVE_S:=600}"

[[ -z $GENEFORMER_INTERFACE ]] ||
    export NCCL_SOCKET_IFNAME=$GENEFORMER_INTERFACE GLOO_SOCKET_IFNAME=$GENEFORMER_INTERFACE
# A GPU's rank computes little on its processor. Without GPUs ranks share the cores by themselves.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export PYTHONUNBUFFERED=1
# The project's folder is what runs, also where an image holds another version of it.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Inside a container the image's own packages are meant.
[[ -n $GENEFORMER_IMAGE ]] || PATH=$GENEFORMER_VENV/bin:$PATH
