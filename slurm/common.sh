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
# NCCL finds the network by itself on most clusters. If it does not, name the interface for its bootstrap, such as
# ib0, and the InfiniBand adapters, such as mlx5. Empty: NCCL's own choice.
: "${NCCL_SOCKET_IFNAME:=}"
: "${NCCL_IB_HCA:=}"
# ------------------------------------------------------------------------------------------------------------

# fail MESSAGE: prints an error and ends the job.
fail() {
    echo "error: $1" >&2
    exit 2
}

# train CONFIG [key=value …]: runs launch/train.py as one task per GPU on all nodes of the job.
train() {
    local config=$1 cpus=${SLURM_CPUS_PER_TASK:-1} modules
    shift

    read -ra modules <<<"$POLAFORMER_MODULES"
    set +u # `module` is not ours
    if ((${#modules[@]})); then module load "${modules[@]}"; fi
    set -u
    [[ -x $POLAFORMER_PYTHON ]] || fail "there is no Python at $POLAFORMER_PYTHON on $(hostname); \
export POLAFORMER_PYTHON, or change it in slurm/common.sh"
    export NCCL_SOCKET_IFNAME NCCL_IB_HCA
    [[ -n $NCCL_SOCKET_IFNAME ]] || unset NCCL_SOCKET_IFNAME
    [[ -n $NCCL_IB_HCA ]] || unset NCCL_IB_HCA

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
        output="$POLAFORMER_RUNS/$SLURM_JOB_NAME" "$@"
}
