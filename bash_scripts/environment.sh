# Sourced by the other scripts, from the project's root: sets $python, making .venv if needed.
#
# An environment that already works is used as it is: PYTHON=/path/to/python says which.
# solo-learn 1.0.2 is installed without its pins on torch 1.9 and Lightning 1.4.

python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ]; then
    # The stamp holds what was installed; a change of setup.py installs again.
    stamp=.venv/solo-gating-$(cksum <setup.py | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        base=""
        for candidate in python3 python3.13 python3.12 python3.11 python3.10; do
            if command -v "$candidate" >/dev/null &&
                "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
                base=$candidate
                break
            fi
        done
        [ -n "$base" ] || { echo "error: no Python 3.10 to 3.13 found" >&2; exit 2; }
        echo "installing into .venv (a few minutes, once) with $("$base" --version)"
        "$base" -m venv .venv
        .venv/bin/python -m pip install --no-compile --disable-pip-version-check -e ".[dev]"
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps solo-learn==1.0.2
        # On all cores, and here: where Python writes no bytecode, as in many containers, every start
        # of it would compile PyTorch again. (Some packages bring templates that are no Python.)
        .venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true
        touch "$stamp"
    fi
fi
