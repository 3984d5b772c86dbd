#!/usr/bin/env bash
# The main job on real images, from nothing: sets up .venv once, writes the embedded digits once,
# pre-trains a dense and a gated encoder, prints their accuracy and FLOPs, the gated one's at several
# budgets. Arguments override the config, e.g. `bash bash_scripts/quickstart.sh gating.target_budget=0.3`
# for a single one.
set -euo pipefail
cd "$(dirname "$0")/.."
source bash_scripts/environment.sh
"$python" -m solo_gating.data.digits datasets/digits
"$python" -m solo_gating.main_pretrain --config-name vicreg_any_digits "$@"
