#!/usr/bin/env bash
# Sets up .venv and runs every test: bash launch/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
apt_install slurm-wlm munge dataset-fashion-mnist
exec python -m pytest "$@"
