#!/usr/bin/env bash
# Sets up .venv, checks style and runs every test: bash launch/test.sh [pytest arguments]
#
#   bash launch/test.sh -m "not slow"        the quick selection, a few minutes
#   bash launch/test.sh -n 0 tests/dataio    in one process, as plain pytest does
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
apt_install slurm-wlm munge dataset-fashion-mnist
ruff check --quiet .
ruff format --check --quiet .
workers=$(nproc)
workers=$((workers < 4 ? workers : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / workers))} # more would only wait for each other
# Tests wait for events, and only this limit ends one that hangs: many times what the slowest takes on a slow machine.
exec python -m pytest --timeout 1800 --numprocesses "$workers" --dist loadgroup "$@"
