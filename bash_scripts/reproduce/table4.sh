#!/usr/bin/env bash
# Table 4 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation":
# 1-NN of Barlow-Twins-Dual beside VICReg-Dual-Gating.
#
#   bash bash_scripts/reproduce/table4.sh --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

against_vicreg_dual barlow_dual
