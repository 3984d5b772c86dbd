#!/usr/bin/env bash
# Table 1 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation": linear
# evaluation of VICReg, VICReg-Gating and VICReg-Dual-Gating.
#
#   bash bash_scripts/reproduce/table1.sh --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

for dataset in $(datasets "cifar10 stl10 cifar100 imagenet100"); do
    published="0.1 0.3 0.5"
    [ "$dataset" != imagenet100 ] || published="0.3 0.5"
    pretrain "vicreg-$dataset" vicreg "$dataset"
    linear "vicreg-$dataset" "$dataset"
    for budget in $(budgets "$published"); do
        for method in vicreg_gated vicreg_dual; do
            pretrain "$method-$dataset-$budget" $method "$dataset" gating.target_budget="$budget"
            linear "$method-$dataset-$budget" "$dataset"
        done
    done
done
report
