#!/usr/bin/env bash
# Make a virtual environment and install distlm in it, versions as in constraints.txt:  scripts/install.sh VENV [PYTHON]
#
# torch comes first and by itself, because its default build for Linux brings gigabytes of CUDA packages. In this order:
# a wheel that pip is configured to find locally; the build for this machine (CUDA or CPU) as uv chooses it; the default build.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1 python=${2:-python3}
torch=$(grep -E '^torch==' constraints.txt)

fail() { echo "install: $*" >&2; exit 1; }

command -v "$python" >/dev/null || fail "there is no $python; install Python 3.10 to 3.13, or name one: make PYTHON=/path/to/python"
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
    fail "$python is $("$python" -V 2>&1), and distlm runs on Python 3.10 to 3.13; name another: make PYTHON=/path/to/python"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian and Ubuntu: apt install python3-venv), or name another: make PYTHON=..."
    echo "install: making $venv with $("$python" -V 2>&1)"
    "$python" -m venv "$venv"
fi
log=$venv/install.log
: > "$log"
run() {
    "$@" >> "$log" 2>&1 || { tail -n 20 "$log" >&2; fail "failed: $*; the whole log is $log"; }
}
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c "from importlib.metadata import version as v; assert 'torch==' + v('torch').split('+')[0] == '$torch'" 2>/dev/null; then
    echo "install: $torch"
    if ! pip install --no-index --no-deps "$torch" >> "$log" 2>&1; then
        run pip install -c constraints.txt uv
        if ! "$venv/bin/uv" pip install -p "$venv/bin/python" -c constraints.txt --torch-backend=auto "$torch" >> "$log" 2>&1; then
            echo "install: the build of $torch for this machine cannot be reached (see $log); taking the default one, which may be large"
            run pip install -c constraints.txt "$torch"
        fi
    fi
fi
echo "install: distlm and what it needs"
export DS_BUILD_OPS=0                                      # DeepSpeed compiles an operator when it is first used, if ever
run pip install -c constraints.txt -e '.[dev]'
echo "install: done; the log is $log"
