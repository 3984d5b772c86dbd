#!/usr/bin/env bash
# Table 1 of "Dynamic Channel Selection in Self-Supervised Learning": 1-NN of SimSiam, dense and
# gated.
#
#   bash bash_scripts/reproduce/simsiam_table1.sh --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

for dataset in $(datasets "cifar10 cifar100 imagenet100"); do
    published="0.1 0.2 0.3 0.4 0.5 0.6 0.7"
    [ "$dataset" != imagenet100 ] || published="0.3 0.4 0.5"
    pretrain "simsiam-$dataset" simsiam "$dataset"
    knn "simsiam-$dataset" "$dataset"
    for budget in $(budgets "$published"); do
        pretrain "simsiam_gated-$dataset-$budget" simsiam_gated "$dataset" gating.target_budget="$budget"
        knn "simsiam_gated-$dataset-$budget" "$dataset"
    done
done
report
