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
fail() { # CODE MESSAGE
    say "error: ${*:2}" >&2
    exit "$1"
}

# slurmctld may be too busy to answer: a run of weeks must not end by that.
insist() {
    local pause_s
    for pause_s in 1 2 4 8 16 32; do
        "$@" && return
        sleep "$pause_s"
    done
    "$@"
}

# --- being told to stop ----------------------------------------------------------------------
# --signal=B:USR1@... reaches this shell alone, and is handed on, once: a second signal would end
# torchrun while its ranks save. With TERM (requeue, cancel, time limit) SLURM tells them itself.
stopped_by=''
running=''
hand_on() {
    [[ $stopped_by != USR1 || -z $running ]] || kill -s USR1 "$running" 2>/dev/null || true
}
trap '[[ -n $stopped_by ]] || { stopped_by=USR1; hand_on; }' USR1
trap 'stopped_by=TERM' TERM

# Whether this start is to end. Of a preemption the steps alone are told: SLURM has to be asked.
told_to_stop() {
    [[ -n $stopped_by ]] ||
        scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -q 'PreemptTime=[0-9]'
}

# TERM to this shell is a requeue, which SLURM does by itself, a cancellation, or the time limit.
is_cancelled() {
    [[ $stopped_by == TERM ]] || return 1
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%r 2>/dev/null) != TimeLimit ]]
}

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
# on_nodes NODES WAIT_S COMMAND...: the command on so many nodes, once on each. WAIT_S seconds after
# the first has ended the others are ended, too; 0: never.
on_nodes() {
    # All cores of a node, not one: of the smallest, where they differ.
    local options=(--nodes="$1" --ntasks="$1" --ntasks-per-node=1 --mem=0 --wait="$2")
    options+=(--cpus-per-task="$(least_cores)" --kill-on-bad-exit=0 --export=ALL)
    if [[ -n $GENEFORMER_IMAGE ]]; then
        options+=(--container-image="$GENEFORMER_IMAGE" --container-workdir="$PWD")
        options+=(--container-mounts="$GENEFORMER_MOUNTS")
    fi
    to_its_end srun "${options[@]}" slurm/on_node.sh "${@:3}"
}

least_cores() { # of SLURM_JOB_CPUS_PER_NODE, such as 64,48(x2)
    tr ',' '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-1}" | sed 's/(.*//' | sort -n | sed -n 1p
}

# torchrun on every node, the ranks of all in one job.
launcher() { # sets launch
    launch=(torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$GENEFORMER_RANKS_PER_NODE")
    # torchrun itself dies of USR1 unless told otherwise, and kills its ranks after 30 s.
    launch+=(--max-restarts=0 --shutdown-timeout="$GENEFORMER_SAVE_S")
    launch+=(--signals-to-handle='SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1')
    if ((SLURM_NNODES == 1)); then
        launch+=(--rdzv-backend=loopback) # nothing listens to other machines
    else
        launch+=(--rdzv-backend=static --master-addr="$(first_address)")
        launch+=(--master-port="$GENEFORMER_PORT")
    fi
}

# By which SLURM itself reaches the first node. Debian gives a host's own name an address that leads
# from every node to itself, so a name is looked up here.
first_address() {
    local first name found
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    name=$(insist scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') || true
    name=${name:-$first}
    found=$(getent ahostsv4 "$name" | sed -n 's/ .*STREAM.*//p' | grep -v '^127\.' | sed -n 1p) || true
    printf '%s\n' "${found:-$name}"
}

nodes_answer() { # whether SLURM can still start something on every node
    timeout 60 srun --overlap --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
        --ntasks-per-node=1 --mem=0 --chdir=/ true >/dev/null 2>&1
}

# --- how the run stands ----------------------------------------------------------------------
outcome() { # KEY: its value in outcome.json; empty if there is none
    [[ ! -f $run_dir/outcome.json ]] ||
        sed -n "s/^ \"$1\": \"\{0,1\}\(.*[^\",]\)\"\{0,1\},\{0,1\}\$/\1/p" "$run_dir/outcome.json"
}

told_outcome() {
    if [[ $(outcome outcome) == running ]]; then
        printf 'was killed, or lost its node\n'
    else
        printf 'ended at step %s as %s (%s)\n' \
            "$(outcome step)" "$(outcome outcome)" "$(outcome reason)"
    fi
}

# --- the job ---------------------------------------------------------------------------------
pretrain() { # CONFIG [arguments of launch/pretrain.py]
    local settings=(--config "$1") launch
    [[ -z $GENEFORMER_CACHE_DIR ]] || settings+=("data.cache_dir=$GENEFORMER_CACHE_DIR")
    settings+=("${@:2}")
    restarts=${SLURM_RESTART_COUNT:-0}
    check_settings "${settings[@]}"
    ((restarts == 0)) || say "restart $restarts of job $SLURM_JOB_ID: the start before $(told_outcome)"
    ((restarts <= GENEFORMER_MAX_RESTARTS)) ||
        fail 1 "restart $restarts: GENEFORMER_MAX_RESTARTS allows $GENEFORMER_MAX_RESTARTS. Look" \
            "for the reasons above, then submit the job again: the run goes on."

    start_before=$(outcome restart)
    step_before=$(outcome step)
    launcher
    before_training "${settings[@]}"
    # A torchrun that has ended waits for those that still save, but for none that hangs.
    on_nodes "$SLURM_NNODES" $((GENEFORMER_SAVE_S + 60)) \
        "${launch[@]}" launch/pretrain.py "${settings[@]}" || true
    [[ $(outcome restart) != "$start_before" ]] ||
        give_up 1 "the run in $run_dir did not begin; what went wrong stands above."
    conclude "$(outcome exit_code)"
}

check_settings() { # sets run_dir, or ends with 2: a mistake is told before any node has to work
    local shown code=0 ranks=$((SLURM_NNODES * GENEFORMER_RANKS_PER_NODE))
    shown=$(WORLD_SIZE=$ranks on_nodes 1 0 python launch/pretrain.py --dry-run "$@") || code=$?
    run_dir=$(sed -n 's/^# run folder: //p' <<<"$shown")
    unless_stopped
    if ((code != 0)); then
        ! told_to_stop || start_again "stopped before the run began"
        exit "$code"
    fi
    [[ -z $GENEFORMER_IMAGE || -d $run_dir || -d ${run_dir%/*} ]] ||
        fail 2 "run.dir must have the same path in the container and here, and ${run_dir%/*} is" \
            "not here. Remedy: mount it under its own path, /runs:/runs (GENEFORMER_MOUNTS)."
}

before_training() {
    unless_stopped
    [[ -z $GENEFORMER_CACHE_DIR ]] ||
        on_nodes "$SLURM_NNODES" 0 python launch/cache_store.py "$@" ||
        give_up 2 "the store could not be copied to every node; what is wrong stands above."
    unless_stopped
    [[ $GENEFORMER_PREFLIGHT != yes ]] ||
        on_nodes "$SLURM_NNODES" 60 "${launch[@]}" launch/preflight.py "$@" ||
        give_up 2 "the nodes are not fit for this run; what is wrong stands above."
    unless_stopped
}

unless_stopped() { [[ -z $stopped_by ]] || start_again "stopped by $stopped_by before the run began"; }

give_up() { # CODE MESSAGE: unless it was told to stop, or a node is lost
    ! told_to_stop || start_again "stopped before the run began"
    await_verdict
    fail "$@"
}

conclude() { # EXIT_CODE of the run
    say "the run $(told_outcome)"
    case ${1:-1} in
        75) start_again "$(outcome reason)" ;;
        # Ranks that hear a signal before they have begun to listen die of it.
        1) ! told_to_stop || start_again "stopped while the ranks began" ;;&
        1) await_verdict ;;
    esac
    exit "${1:-1}"
}

start_again() { # REASON
    if is_cancelled; then
        say "stopped by SLURM, which starts this job again if it was requeued and not cancelled"
    elif ((restarts >= GENEFORMER_MAX_RESTARTS)); then
        say "not started again: GENEFORMER_MAX_RESTARTS is $GENEFORMER_MAX_RESTARTS"
    elif [[ $stopped_by == USR1 && $(outcome step) == "${step_before:-}" ]] && ((restarts > 0)); then
        say "not started again: no step was made before the signal. Remedy: more --time, or a" \
            "--signal that comes later."
    else
        say "to be started again: $1"
        # Of a preempted job SLURM may have done so already.
        insist scontrol requeue "$SLURM_JOB_ID" ||
            say "error: SLURM does not take the requeue: submit the job again" >&2
    fi
    exit 75
}

# A crash is not to be repeated, but a rank is also lost when its node is. SLURM starts a job again
# that has lost a node, as soon as it takes it for lost: a job that ended before would be a failed one.
await_verdict() {
    local patience_s
    nodes_answer && return
    patience_s=$(scontrol show config | sed -n 's/^SlurmdTimeout *= *\([0-9]*\).*/\1/p') || true
    say "a node does not answer: waiting for SLURM to start this job again"
    # Not in one piece: a trap runs only between commands.
    for ((i = 0; i < ${patience_s:-300} + 60; i++)); do sleep 1; done
    start_again "a node was lost, and is back" # it is down for longer than that, or not for SLURM
}
