#!/usr/bin/env bash
# Table 5 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation":
# 1-NN of two encoders beside one.
#
#   bash bash_scripts/reproduce/table5.sh --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

against_vicreg_dual vicreg_dual_two_encoders
