#!/usr/bin/env bash
# Table 2 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation": linear
# evaluation on another data set than that of pre-training. --datasets names those of pre-training,
# TARGETS="stl10 cifar10" in the environment those of evaluation.
#
#   bash bash_scripts/reproduce/table2.sh --data cifar100=PATH --data cifar10=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

for dataset in $(datasets "cifar100 imagenet100"); do
    published="0.1 0.3 0.5" targets="stl10 cifar10 imagenet100"
    [ "$dataset" != imagenet100 ] || { published="0.3 0.5"; targets="stl10 cifar10 cifar100"; }
    pretrain "vicreg-$dataset" vicreg "$dataset"
    for budget in $(budgets "$published"); do
        pretrain "vicreg_dual-$dataset-$budget" vicreg_dual "$dataset" gating.target_budget="$budget"
    done
    for target in ${TARGETS:-$targets}; do
        linear "vicreg-$dataset" "$target"
        for budget in $(budgets "$published"); do
            linear "vicreg_dual-$dataset-$budget" "$target"
        done
    done
done
report
