#!/usr/bin/env bash
# The tests: sets up .venv once, then runs pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source bash_scripts/environment.sh
exec "$python" -m pytest "$@"
