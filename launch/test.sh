#!/usr/bin/env bash
# Sets up .venv, checks style and runs every test: bash launch/test.sh [pytest arguments]
#
#   bash launch/test.sh -m "not slow"        the quick selection, a few minutes
#   bash launch/test.sh -n 0 tests/dataio    in one process, as plain pytest does
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
apt_install slurm-wlm munge dataset-fashion-mnist
{ ruff check --quiet . && ruff format --check --quiet .; } ||
  setup_fail "the style is off; ruff check --fix . and ruff format . mend most of it"
workers=$(nproc)
workers=$((workers < 4 ? workers : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / workers))} # more would only wait for each other
# Tests wait for events, and only these limits end one that hangs, in a test or, by ending the process, after one: many
# times what the slowest takes on a slow machine.
exec python -m pytest --timeout 1800 -o faulthandler_timeout=2400 -o faulthandler_exit_on_timeout=true \
  --numprocesses "$workers" --dist loadgroup "$@"
