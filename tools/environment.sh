#!/bin/sh
# Make .venv hold this project and the extras asked for: `sh tools/environment.sh soundfont` or `dev,docs`.
# Does nothing when it already does. PYTHON=... names an interpreter; otherwise the first fitting one on the PATH.
set -eu
cd "$(dirname "$0")/.."
extras=$1
want="$(cat settings.ini setup.py | cksum)"
has() { [ -x .venv/bin/python ] && [ "$(cat ".venv/ready-$1" 2>/dev/null)" = "$want" ] && .venv/bin/python -c '' 2>/dev/null; }

if has dev,docs || has "$extras"; then exit 0; fi

version='import sys; print("%d.%d.%d" % sys.version_info[:3])'
newest='(3, 12)'
[ -z "${PYTHON:-}" ] || newest='(3, 99)' # named by the user: newer is at their own risk
fits="import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= $newest)"
found= python=
for name in ${PYTHON:-python3.12 python3.11 python3.10 python3 python}; do
    v=$("$name" -c "$version" 2>/dev/null) || continue
    found="$found $name $v"
    if "$name" -c "$fits"; then python=$name; break; fi
done
if [ -z "$python" ]; then
    echo "disentangle_nb needs Python 3.10, 3.11 or 3.12; found:${found:- none}. Install one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

if ! { [ -x .venv/bin/python ] && .venv/bin/python -c "$fits" 2>/dev/null; }; then
    echo "environment: .venv with $python ($("$python" -c "$version"))"
    rm -rf .venv
    if ! "$python" -m venv .venv >.venv.log 2>&1; then
        cat .venv.log >&2; rm -rf .venv .venv.log
        echo "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        exit 1
    fi
    rm -f .venv.log
fi
echo "environment: installing disentangle_nb[$extras]; the first time this fetches up to 2 GB and takes a few minutes"
start=$(date +%s)
.venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -e ".[$extras]"
.venv/bin/python -m pip check
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true # pip compiles on one core; a few packages carry files that can't
printf '%s\n' "$want" > ".venv/ready-$extras"
echo "environment: ready after $(($(date +%s) - start)) s"
