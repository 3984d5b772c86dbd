#!/usr/bin/env bash
# The tests: sets up .venv once, then runs pytest in two processes. Arguments go to pytest; `-n 0`
# runs them in one.
set -euo pipefail
cd "$(dirname "$0")/.."
source bash_scripts/environment.sh
# A file stays in one process, because its tests share what is slow to make.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
