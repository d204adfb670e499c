#!/usr/bin/env bash
# Trains PolaFormer++ b4 on 8 GPUs per node. From the project's root:
#
#     sbatch slurm/train_b4.sh [key=value …]
#     sbatch --nodes=2 slurm/train_b4.sh optimizer.gradient_accumulation_steps=2
#
# Options of sbatch override the lines below; key=value goes to launch/train.py. The settings of your cluster are in
# slurm/common.sh. Jobs of one name share a run folder, so they wait for each other (singleton). 300 s before the time
# limit, the run gets a signal, saves a checkpoint and the job is requeued.
#SBATCH --job-name=polaformerpp_b4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# sbatch runs a copy of this file from a folder of its own.
cd "${SLURM_SUBMIT_DIR:?is not set; start this file with: sbatch slurm/train_b4.sh}"
if [[ ! -f slurm/common.sh ]]; then
    echo "error: $PWD is not the project's root; cd there, then: sbatch slurm/train_b4.sh" >&2
    exit 2
fi
source slurm/common.sh
train configs/polaformerpp_b4.yaml "$@"
