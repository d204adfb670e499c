# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: creates .venv with exactly the versions in requirements.txt and the project in
# it, unless it is up to date, and puts it first on the PATH. Changes to the project's root.
#
#   PYTHON=python3.12             the Python to create it with (default python3)
#   POLAFORMER_INSTALLER=uv|pip   by default uv if it is or can be installed, else pip
#   POLAFORMER_KERNELS=…          which kernels to build, see setup.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# setup MESSAGE: prints what is being done, or how long it took.
setup() { echo "set-up: $1"; }

# setup_fail MESSAGE [LOG]: prints the end of the log and the error, and ends the script.
setup_fail() {
  [ $# = 1 ] || tail -n 40 "$2" >&2
  echo "error: $1" >&2
  exit 2
}

# install NAME REQUIREMENT…: installs packages; the installer's output goes to .venv/NAME.log.
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

# find_installer: prints the installer, uv's path or pip.
find_installer() {
  if [ "${POLAFORMER_INSTALLER-}" = pip ]; then
    echo pip
  elif command -v uv; then
    return
  elif setup "installing uv" >&2 &&
    .venv/bin/python -m pip install --disable-pip-version-check uv >.venv/uv.log 2>&1; then
    echo .venv/bin/uv
  elif [ "${POLAFORMER_INSTALLER-}" = uv ]; then
    setup_fail "uv is not on the PATH, and pip could not install it" .venv/uv.log
  else
    echo pip
  fi
}

# build_kernels: builds against the torch in .venv, and prints what setup.py built and left out.
build_kernels() {
  local began=$SECONDS
  .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --verbose --editable . \
    >.venv/build.log 2>&1 </dev/null || return
  sed -n 's/^ *polaformer: //p' .venv/build.log | sort -u
  setup "kernels: $((SECONDS - began)) s"
}

# set_up: creates .venv. Kernels need only PyTorch, so they are built while the other packages are installed.
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
  # Everything that the build of the kernels imports, at the versions of requirements.txt: a package that is replaced
  # during the build may be missing for a moment.
  grep -E '^(torch|numpy|fsspec|ninja|packaging|setuptools|wheel)==' requirements.txt >.venv/first.txt
  install torch --requirement .venv/first.txt --constraint requirements.txt
  setup "PyTorch: $((SECONDS - began)) s"

  setup "building kernels, and meanwhile installing all other packages, 0.5 GB to download"
  began=$SECONDS
  set -m # in a process group of its own, so that all of its processes can be ended
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

wanted=$({ cat requirements.txt setup.py && find polaformer/csrc -type f ! -name '*.md' | sort | xargs cat; } | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  set_up
  echo "$wanted" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"
# Containers often set it. Each process would compile PyTorch and what it needs again, which takes longer than all else
# at its start.
unset PYTHONDONTWRITEBYTECODE

# apt_install PACKAGE…: installs Debian packages as root, and does nothing without apt: who needs them reports an error.
apt_install() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg --status "$@" >/dev/null 2>&1; then
    setup "apt-get install $*"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "$@"; } >/dev/null 2>&1 || true
  fi
}
