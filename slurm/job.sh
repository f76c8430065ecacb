# shellcheck shell=bash
# How a job of pretraining goes, for the scripts beside this file:
#
#   settings checked -> store copied -> preflight -> srun torchrun launch/pretrain.py -> outcome.json
#        | 2               | 2           | 2             USR1, TERM: all ranks save        |
#        +--------- end ---+-------------+                                  0, 1, 2: end --+
#                                                       75: scontrol requeue, the next start --+
#
# Sourced from the project's folder, with the arguments of launch/pretrain.py.

source slurm/environment.sh

say() { printf '%s %s\n' "$(date '+%F %T')" "$*"; }
fail() {
    say "error: ${*:2}" >&2
    exit "$1"
}

# --- being told to stop ----------------------------------------------------------------------
# --signal=B:USR1@... reaches this shell alone, and is handed on. With TERM (requeue, cancel, time
# limit) SLURM tells the ranks itself, and a second signal would end torchrun while they save.
stopped_by=''
running=''
hand_on() {
    [[ $stopped_by != USR1 || -z $running ]] || kill -s USR1 "$running" 2>/dev/null || true
}
trap 'stopped_by=USR1; hand_on' USR1
trap 'stopped_by=TERM' TERM

# Runs a command to its end, whatever this shell is told meanwhile: `wait` ends with every signal.
to_its_end() {
    local code=0
    "$@" &
    running=$!
    hand_on # what came a moment before
    while :; do
        wait "$running" && code=0 || code=$?
        kill -0 "$running" 2>/dev/null || break
    done
    running=''
    return "$code"
}

# --- on the nodes ----------------------------------------------------------------------------
on_nodes() { # NODES COMMAND...: the command on so many nodes, once on each
    local options=(--nodes="$1" --ntasks="$1" --ntasks-per-node=1 --mem=0)
    # All cores of a node, not one. A torchrun that has ended waits for those that still save.
    options+=(--cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --kill-on-bad-exit=0 --wait=0)
    if [[ -n $GENEFORMER_IMAGE ]]; then
        options+=(--container-image="$GENEFORMER_IMAGE" --container-workdir="$PWD")
        options+=(--container-mounts="$GENEFORMER_MOUNTS")
    fi
    to_its_end srun "${options[@]}" slurm/on_node.sh "${@:2}"
}

# torchrun on every node, the ranks of all in one job.
launcher() {
    printf '%s\n' torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$GENEFORMER_RANKS_PER_NODE"
    # torchrun itself dies of USR1 unless told otherwise, and kills its ranks after 30 s.
    printf '%s\n' --max-restarts=0 --shutdown-timeout="$GENEFORMER_SAVE_S"
    printf '%s\n' --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
    if ((SLURM_NNODES == 1)); then
        printf '%s\n' --rdzv-backend=loopback # nothing listens to other machines
    else
        printf '%s\n' --rdzv-backend=static --master-addr="$(first_address)"
        printf '%s\n' --master-port="$GENEFORMER_PORT"
    fi
}

first_address() { # by which SLURM itself reaches the first node
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# --- how the run stands ----------------------------------------------------------------------
outcome() { # KEY: its value in outcome.json; empty if there is none
    [[ ! -f $run_dir/outcome.json ]] ||
        sed -n "s/^ \"$1\": \"\{0,1\}\(.*[^\",]\)\"\{0,1\},\{0,1\}\$/\1/p" "$run_dir/outcome.json"
}

# TERM to this shell is a requeue, which SLURM does by itself, a cancellation, or the time limit.
is_cancelled() {
    [[ $stopped_by == TERM ]] || return 1
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r 2>/dev/null) != TimeLimit ]]
}

nodes_answer() { # whether SLURM can still start something on every node
    timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
        --ntasks-per-node=1 --mem=0 true >/dev/null 2>&1
}

# --- the job ---------------------------------------------------------------------------------
unless_stopped() { [[ -z $stopped_by ]] || start_again "stopped by $stopped_by before the run began"; }

pretrain() { # CONFIG [arguments of launch/pretrain.py]
    local settings=(--config "$1") restarts=${SLURM_RESTART_COUNT:-0}
    [[ -z $GENEFORMER_CACHE_DIR ]] || settings+=("data.cache_dir=$GENEFORMER_CACHE_DIR")
    settings+=("${@:2}")
    check_settings "${settings[@]}"
    if ((restarts > 0)); then
        say "restart $restarts of job $SLURM_JOB_ID: the start before ended at step" \
            "$(outcome step) as $(outcome outcome) ($(outcome reason))"
    fi
    ((restarts <= GENEFORMER_MAX_RESTARTS)) ||
        fail 1 "restart $restarts: GENEFORMER_MAX_RESTARTS allows $GENEFORMER_MAX_RESTARTS. Look" \
            "for the reasons above, then submit the job again: the run goes on."

    local before launch
    before=$(outcome restart)
    mapfile -t launch < <(launcher)
    before_training "${settings[@]}"
    unless_stopped
    on_nodes "$SLURM_NNODES" "${launch[@]}" launch/pretrain.py "${settings[@]}" || true
    if [[ $(outcome restart) == "$before" ]]; then
        unless_stopped
        await_verdict
        fail 1 "the run in $run_dir did not begin; what went wrong stands above."
    fi
    conclude "$(outcome exit_code)"
}

check_settings() { # sets run_dir, or ends with 2: a mistake is told before any node has to work
    local shown code=0
    shown=$(WORLD_SIZE=$((SLURM_NNODES * GENEFORMER_RANKS_PER_NODE)) \
        on_nodes 1 python launch/pretrain.py --dry-run "$@") || code=$?
    unless_stopped
    ((code == 0)) || exit "$code"
    run_dir=$(sed -n 's/^# run folder: //p' <<<"$shown")
}

before_training() {
    local code=0
    if [[ -n $GENEFORMER_CACHE_DIR ]]; then
        on_nodes "$SLURM_NNODES" python launch/cache_store.py "$@" || code=$?
    fi
    if [[ $code == 0 && $GENEFORMER_PREFLIGHT == yes ]]; then
        on_nodes "$SLURM_NNODES" "${launch[@]}" launch/preflight.py "$@" || code=$?
    fi
    ((code != 0)) || return 0
    unless_stopped
    await_verdict
    fail 2 "the nodes are not fit for this run; what is wrong stands above."
}

conclude() { # EXIT_CODE of the run
    say "the run ended at step $(outcome step) as $(outcome outcome) ($(outcome reason))"
    case $1 in
        75) start_again "$(outcome reason)" ;;
        1) await_verdict ;;
    esac
    exit "$1"
}

start_again() { # REASON
    if is_cancelled; then
        say "stopped by SLURM, which starts this job again if it was requeued and not cancelled"
    elif ((${SLURM_RESTART_COUNT:-0} >= GENEFORMER_MAX_RESTARTS)); then
        say "not started again: GENEFORMER_MAX_RESTARTS is $GENEFORMER_MAX_RESTARTS"
    else
        say "to be started again: $1"
        scontrol requeue "$SLURM_JOB_ID" || true # of a preempted job SLURM may have done so already
    fi
    exit 75
}

# A crash is not to be repeated, but a rank is also lost when its node is. SLURM starts a job again
# that has lost a node, as soon as it takes it for lost: a job that ended before would be a failed one.
await_verdict() {
    local patience_s
    nodes_answer && return
    patience_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p')
    say "a node does not answer: waiting for SLURM to start this job again"
    # Not in one piece: a trap runs only between commands.
    for ((i = 0; i < ${patience_s:-300} + 60; i++)); do sleep 1; done
    start_again "a node was lost, and is back" # it is down for longer than that, or not for SLURM
}
