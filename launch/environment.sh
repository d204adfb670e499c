# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes .venv with exactly the versions in requirements.txt and the project in
# it, or leaves it as it is if nothing changed, and puts it first on the PATH. Leaves the shell in the project's root.
#
#   PYTHON=python3.12             the Python to make it with; python3 is the default
#   POLAFORMER_INSTALLER=uv|pip   by default uv where it is there or can be installed, else pip
#   POLAFORMER_KERNELS=…          which kernels to build, see setup.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# setup MESSAGE: says what is being done, or how long it took.
setup() { echo "set-up: $1"; }

# setup_fail MESSAGE [LOG]: says what is wrong, after the end of the log, and ends the script.
setup_fail() {
  [ $# = 1 ] || tail -n 40 "$2" >&2
  echo "error: $1" >&2
  exit 2
}

# install WHAT REQUIREMENT…: installs packages; what the installer prints goes to .venv/WHAT.log.
install() {
  local log=.venv/$1.log
  shift
  if [ "$installer" != pip ]; then
    "$installer" pip install --python .venv/bin/python "$@" >"$log" 2>&1 && return
    [ "${POLAFORMER_INSTALLER-}" != uv ] || setup_fail "uv could not install; POLAFORMER_INSTALLER=pip takes pip" "$log"
    setup "uv could not ($log); pip does"
  fi
  .venv/bin/python -m pip install --disable-pip-version-check "$@" >"$log" 2>&1 ||
    setup_fail "pip could not install ($log)" "$log"
}

# find_installer: the command that installs packages, uv's path or pip.
find_installer() {
  if [ "${POLAFORMER_INSTALLER-}" = pip ]; then
    echo pip
  elif command -v uv; then
    return
  elif setup "installing uv" >&2 && .venv/bin/python -m pip install --disable-pip-version-check uv >.venv/uv.log 2>&1; then
    echo .venv/bin/uv
  elif [ "${POLAFORMER_INSTALLER-}" = uv ]; then
    setup_fail "uv is not on the PATH, and pip could not install it" .venv/uv.log
  else
    echo pip
  fi
}

# build_kernels: against the torch in .venv; setup.py says what it builds, and what not.
build_kernels() {
  local began=$SECONDS
  .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --verbose --editable . \
    >.venv/build.log 2>&1 </dev/null || return
  sed -n 's/^ *polaformer: //p' .venv/build.log | sort -u
  setup "kernels: $((SECONDS - began)) s"
}

# set_up: makes .venv. Kernels need PyTorch alone, so they are built while all other packages are still coming.
set_up() {
  local python=${PYTHON:-python3} installer began build
  [[ ${POLAFORMER_INSTALLER-} =~ ^(uv|pip|)$ ]] ||
    setup_fail "POLAFORMER_INSTALLER is '$POLAFORMER_INSTALLER'; use uv or pip, or leave it out"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || setup_fail \
    "$python is missing or older than Python 3.10; install one and name it: PYTHON=/path/to/python3 bash $0"
  setup "making .venv with $("$python" --version), cores: $(nproc)"
  "$python" -m venv .venv ||
    setup_fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
  rm -f .venv/installed
  installer=$(find_installer)

  setup "installing PyTorch with $(basename "$installer"), 2.7 GB to download"
  began=$SECONDS
  # All that is imported while kernels are built, with all that it needs as requirements.txt pins it: what is exchanged
  # meanwhile, the build may miss.
  grep -E '^(torch|numpy|fsspec|ninja|packaging|setuptools|wheel)==' requirements.txt >.venv/first.txt
  install torch --requirement .venv/first.txt --constraint requirements.txt
  setup "PyTorch: $((SECONDS - began)) s"

  setup "building kernels, and meanwhile installing all other packages, 0.5 GB to download"
  began=$SECONDS
  set -m # in a process group of its own, so that all of it can be ended
  build_kernels &
  build=$!
  set +m
  trap 'kill -- -$build 2>/dev/null || true' EXIT
  install packages --requirement requirements.txt
  setup "all other packages: $((SECONDS - began)) s"
  wait "$build" || setup_fail \
    "the kernels could not be built (.venv/build.log); POLAFORMER_KERNELS=cpu or none leaves them out" .venv/build.log
  trap - EXIT
}

wanted=$({ cat requirements.txt setup.py && find polaformer/csrc -type f | sort | xargs cat; } | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  set_up
  echo "$wanted" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"

# Installs Debian packages where that is possible, and says nothing where it is not: whoever needs them says so.
apt_install() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg --status "$@" >/dev/null 2>&1; then
    setup "apt-get install $*"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "$@"; } >/dev/null 2>&1 || true
  fi
}
