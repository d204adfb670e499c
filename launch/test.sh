#!/usr/bin/env bash
# Sets up .venv, checks style and runs every test: bash launch/test.sh [pytest arguments]
#
#   bash launch/test.sh -m "not slow"        the quick selection, a few minutes
#   bash launch/test.sh -n 0 tests/dataio    in one process, as plain pytest does
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
apt_install slurm-wlm munge dataset-fashion-mnist
{ ruff check --quiet . && ruff format --check --quiet .; } ||
  setup_fail "the style check failed; ruff check --fix . and ruff format . fix most of it"
find polaformer/csrc tests/polaformer/cuda -regex '.*\.\(cpp\|cu\|cuh\|h\|inl\)' -print0 |
  xargs -0 clang-format --dry-run --Werror || setup_fail "the style check of C++ failed; clang-format -i FILE fixes it"
mypy --no-error-summary || setup_fail "the type check failed, see above"
workers=$(nproc)
workers=$((workers < 4 ? workers : 4))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / workers))} # more would only wait for each other
# Tests wait for events. Only these limits end one that hangs, the second of them also after a test, by ending the process.
# The slowest tests take two minutes, and eight where four processes more want the two cores of the same machine.
exec python -m pytest --timeout 3600 -o faulthandler_timeout=4000 -o faulthandler_exit_on_timeout=true \
  --numprocesses "$workers" --dist loadgroup "$@"
