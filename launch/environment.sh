# Sourced by quickstart.sh and test.sh: makes .venv with exactly the versions in requirements.txt and the project in
# it, or leaves it as it is if nothing changed, and puts it first on the PATH. Leaves the shell in the project's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "error: $python is missing or older than Python 3.10; install one and name it: PYTHON=/path/to/python3 bash $0" >&2
  exit 2
fi

wanted=$({ cat requirements.txt setup.py && find polaformer/csrc -type f | sort | xargs cat; } | sha256sum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv and building kernels (about three minutes and 6 GB, once)"
  if ! "$python" -m venv .venv; then
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
  # The kernels are built against the torch just installed; setup.py says what it builds, and what not.
  if ! .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --verbose \
    --editable . >.venv/build.log 2>&1; then
    tail -n 40 .venv/build.log >&2
    echo "error: the kernels could not be built (.venv/build.log); POLAFORMER_KERNELS=cpu or none leaves them out" >&2
    exit 2
  fi
  grep 'polaformer: building' .venv/build.log | sort -u
  echo "$wanted" >.venv/installed
fi
export PATH="$PWD/.venv/bin:$PATH"

# Installs Debian packages where that is possible, and says nothing where it is not: whoever needs them says so.
apt_install() {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg --status "$@" >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update && apt-get -qq install --yes --no-install-recommends "$@"; } >/dev/null 2>&1 || true
  fi
}
