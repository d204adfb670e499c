# shellcheck shell=bash
# Site settings of your cluster, and the function that starts one task per GPU. train_b4.sh and train_b5.sh source it
# on the first node of the job, in the project's root.

# --- Site settings: change the defaults here, or export the variables before sbatch -------------------------
# Environment modules to load, separated by spaces.
: "${POLAFORMER_MODULES:=}"
# The Python with requirements.txt installed, at the same path on every node.
: "${POLAFORMER_PYTHON:=$PWD/.venv/bin/python}"
# Folders that `python -m dataio.pack` wrote, as every node sees them.
: "${POLAFORMER_TRAIN_DATA:=$PWD/data/imagenet/train}"
: "${POLAFORMER_VAL_DATA:=$PWD/data/imagenet/val}"
# On a file system that all nodes share. Each job name has a folder of its own in it; a job that is requeued or
# submitted again under the same name resumes from there.
: "${POLAFORMER_RUNS:=$PWD/runs}"
# How often a job that stopped before its end is put back into the queue.
: "${POLAFORMER_MAX_RESTARTS:=100}"
# NCCL finds the network by itself on most clusters. If it does not, name the interface for its bootstrap, such as
# ib0, and the InfiniBand adapters, such as mlx5. Empty: NCCL's own choice.
: "${NCCL_SOCKET_IFNAME:=}"
: "${NCCL_IB_HCA:=}"
# ------------------------------------------------------------------------------------------------------------

# fail MESSAGE [CODE]: prints an error and ends the job, with exit code 2 unless another is given.
fail() {
    echo "error: $1" >&2
    exit "${2:-2}"
}

# The exit code of a run that was stopped, or of which a rank was killed or hung: start it again.
readonly EXIT_RESUME=75

# requeue: puts this job back into the queue, from where it resumes the run, unless that was done too often.
requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    ((restarts < POLAFORMER_MAX_RESTARTS)) || fail "job $SLURM_JOB_ID was restarted $restarts times and \
POLAFORMER_MAX_RESTARTS is $POLAFORMER_MAX_RESTARTS; submit it again to resume" "$EXIT_RESUME"
    scontrol requeue "$SLURM_JOB_ID" ||
        fail "job $SLURM_JOB_ID cannot be requeued; submit it again to resume" "$EXIT_RESUME"
    echo "job $SLURM_JOB_ID: requeued, restart $((restarts + 1)) of at most $POLAFORMER_MAX_RESTARTS"
}

# lost_a_rank RUN STATUS: whether a rank of this start of the job was killed, crashed or hung. STATUS: of srun, which is
# 1 after Slurm has killed a rank for lack of memory, whatever the other ranks end with.
lost_a_rank() {
    local record start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} heartbeats
    (($2)) || return 1
    ls "$1/heartbeats" >/dev/null 2>&1 || true # makes NFS notice new files of other hosts
    for record in "$1"/heartbeats/{lost,hung}; do
        [[ ! -f $record || $(sed -n 2p "$record") != "$start" ]] || return 0
    done
    heartbeats=$(grep --no-messages --no-filename --fixed-strings "\"job\": \"$start\"" "$1"/heartbeats/rank-*.json) ||
        true
    case $2 in
    2 | 130 | 143) return 1 ;; # refused, or ended at once by a second signal
    esac
    if [[ -z $heartbeats ]]; then # of a start-up, in which 75 may be a stop
        [[ $2 == @($EXIT_RESUME|134|135|137|139) ]] # ABRT, BUS, KILL, SEGV
        return
    fi
    [[ $2 == "$EXIT_RESUME" ]] || ! grep --quiet '"failed": true' <<<"$heartbeats" || return 1
    # None is left to record it where all were killed, or each has a node of its own and NCCL aborts it.
    grep --quiet --invert-match '"done": true' <<<"$heartbeats"
}

# require_progress RUN: ends the job if the run was lost three times since its newest checkpoint.
require_progress() {
    local newest losses=$1/heartbeats/newest_when_lost count
    newest=$(cat "$1/checkpoints/latest" 2>/dev/null) || newest="the start"
    { mkdir -p "$1/heartbeats" && echo "$newest" >>"$losses"; } || true # a full disk
    count=$(grep --no-messages --count --line-regexp --fixed-strings -e "$newest" "$losses") || true
    ((${count:-0} >= 3)) || return 0
    rm "$losses" # to begin anew when it is submitted again
    fail "job $SLURM_JOB_ID: ranks were lost three times since $newest, or the run stopped in its start-up; see above \
for the reason, and submit it again to resume" "$EXIT_RESUME"
}

# train CONFIG [key=value …]: runs launch/train.py as one task per GPU on all nodes of the job. Requeues the job if the
# run stopped before its end, or a rank was killed or hung; any other exit code of srun is the job's.
train() {
    local config=$1 cpus=${SLURM_CPUS_PER_TASK:-1} output=$POLAFORMER_RUNS/$SLURM_JOB_NAME modules argument status=0
    shift
    for argument in "$@"; do
        [[ $argument != output=* ]] || output=${argument#output=}
    done

    read -ra modules <<<"$POLAFORMER_MODULES"
    set +u # `module` is not ours
    if ((${#modules[@]})); then module load "${modules[@]}"; fi
    set -u
    [[ -x $POLAFORMER_PYTHON ]] || fail "there is no Python at $POLAFORMER_PYTHON on $(hostname); \
export POLAFORMER_PYTHON, or change it in slurm/common.sh"
    export NCCL_SOCKET_IFNAME NCCL_IB_HCA
    [[ -n $NCCL_SOCKET_IFNAME ]] || unset NCCL_SOCKET_IFNAME
    [[ -n $NCCL_IB_HCA ]] || unset NCCL_IB_HCA
    # Checkpoints are agreed on through gloo, which takes whole names of interfaces only.
    if [[ -n ${NCCL_SOCKET_IFNAME:-} && -e /sys/class/net/$NCCL_SOCKET_IFNAME ]]; then
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
    fi

    # Task 0 runs on the first node. The port is below the ephemeral ports of Linux; export MASTER_PORT before sbatch
    # if it is taken.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this checkout, whatever is installed
    export PYTHONUNBUFFERED=1                         # the last output of a killed task reaches the log
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}  # by default each task takes the whole node's
    echo "job $SLURM_JOB_ID: $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, meeting at $MASTER_ADDR:$MASTER_PORT"

    # srun does not inherit --cpus-per-task from sbatch. A failed task ends the others, which would wait for it; after
    # the first task has ended, the last may take 60 s more.
    srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task="$cpus" \
        "$POLAFORMER_PYTHON" launch/train.py --config "$config" \
        data.train="$POLAFORMER_TRAIN_DATA" data.val="$POLAFORMER_VAL_DATA" \
        output="$POLAFORMER_RUNS/$SLURM_JOB_NAME" "$@" || status=$?
    if lost_a_rank "$output" "$status"; then
        status=$EXIT_RESUME
        require_progress "$output"
    fi
    ((status != EXIT_RESUME)) || requeue
    return "$status"
}
