#!/usr/bin/env bash
# Table 6 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation":
# 1-NN without the invariance term beside with it.
#
#   bash bash_scripts/reproduce/table6.sh --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

against_vicreg_dual vicreg_dual_no_invariance
