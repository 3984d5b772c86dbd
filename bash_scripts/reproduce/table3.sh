#!/usr/bin/env bash
# Table 3 of "Unifying Synergies between Self-supervised Learning and Dynamic Computation": 1-NN, with
# features of length 1, of students by SimReg and SEED beside the gated encoder whose policy says how wide
# they are. Teacher: the dense VICReg. SEED_TEACHER=FILE in the environment is SEED's; the published one is
# MoCo v2's ResNet-50 of 800 epochs. --epochs is for all runs (published: 500, SimReg 130, SEED 200).
#
#   SEED_TEACHER=FILE bash bash_scripts/reproduce/table3.sh --data cifar100=PATH [options]
set -euo pipefail
[ -z "${SEED_TEACHER:-}" ] || SEED_TEACHER=$(realpath "$SEED_TEACHER")
source "$(dirname "$0")/common.sh"

for dataset in $(datasets "cifar100 imagenet100"); do
    published="0.1 0.3 0.5"
    [ "$dataset" != imagenet100 ] || published="0.3 0.5"
    pretrain "vicreg-$dataset" vicreg "$dataset"
    teacher=$(run_of "vicreg-$dataset")/last.ckpt
    for budget in $(budgets "$published"); do
        gated="vicreg_dual-$dataset-$budget"
        pretrain "$gated" vicreg_dual "$dataset" gating.target_budget="$budget"
        knn_normalized "$gated" "$dataset"
        policy "$gated" "$dataset"
        widths="backbone.kwargs.policy=$out/$gated/policy-$dataset/policy.json"
        pretrain "simreg-$dataset-$budget" simreg "$dataset" "$widths" method_kwargs.teacher="$teacher"
        knn_normalized "simreg-$dataset-$budget" "$dataset"
        pretrain "seed-$dataset-$budget" seed "$dataset" "$widths" \
            method_kwargs.teacher="${SEED_TEACHER:-$teacher}"
        knn_normalized "seed-$dataset-$budget" "$dataset"
    done
done
report
