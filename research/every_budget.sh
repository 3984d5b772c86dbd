#!/usr/bin/env bash
# One run for every budget, or one for each? Trains variants of VICReg-Dual-Gating and their rivals with
# several seeds, evaluates both paths (1-NN, and logistic regression on standardised features) at given
# shares of the FLOPs, and prints a table (mean ± std). docs/results/every_budget.md and
# dual_gating_range.md have the results.
#
#   bash research/every_budget.sh digits [key=value ...]
#   DATA=FOLDER bash research/every_budget.sh cifar10|cifar100 [key=value ...]
#
# FOLDER holds train*.npz and test.npz, as for validate_cifar.sh. Further arguments override every
# run's config. From the environment: VARIANTS (default: all of the first study; names as below), and
# what research/setting.sh names. What is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
study=every_budget
source research/setting.sh
case ${1:-} in
digits) dual=vicreg_dual_digits dense=(vicreg_dual_digits method=vicreg backbone.name=resnet18_plain '~gating') ;;
cifar10 | cifar100) dual=vicreg_dual_$1 dense=("vicreg_$1") ;;
*) sed -n '2,/^[^#]/{/^#/p}' "$0"; exit 2 ;;
esac
prepare "$1"; shift

# The last two as in the runs of these pages.
gated="gating.sparsity_weight=100 gating.warmup_epochs=$((epochs / 10)) gating.bound_gradient=all gating.weight_decay=1e-4"
range="gating.target_budget=[0.05,0.9]"
any="$range gating.budget_anneal=0.5 gating.budget_per_image=true"  # vicreg_any_*
absolute="$any method=vicreg_distilled"
distilled="$absolute gating.relative_budget_loss=true"  # vicreg_distilled_*
annealed="$range gating.gate_kwargs.bias=4 gating.budget_anneal=0.5"
declare -A overrides=(
    [fixed_0.1]="gating.target_budget=0.1" [fixed_0.3]="gating.target_budget=0.3" [fixed_0.5]="gating.target_budget=0.5"
    [range]="$range"
    [range_untold]="$range gating.budget_embedding=false"
    [annealed]="$annealed"
    [annealed_only]="$range gating.budget_anneal=0.5"
    [any]="$any" [any_relative]="$any gating.relative_budget_loss=true"
    [annealed_slow]="$annealed gating.budget_anneal=1"
    [annealed_log_uniform]="$annealed method=vicreg_log_uniform"
    [annealed_sandwich]="$annealed method=vicreg_sandwich"
    [annealed_shuffled]="$annealed method=vicreg_shuffled"
    [annealed_lambda_5]="$annealed gating.sparsity_weight=5"
    [annealed_per_image]="$annealed gating.budget_per_image=true"
    [annealed_diverse]="$annealed method=vicreg_diverse"
    [annealed_detached]="$annealed method=vicreg_detached_dense"
    [annealed_half_dense]="$annealed method=vicreg_half_dense"
    [warm_half]="$range gating.gate_kwargs.bias=4 gating.warmup_epochs=$((epochs / 2)) method=vicreg_inherited_bn"
    # In-place distillation. (`*_long`: half as many epochs more, a step's cost of 9 instead of 6.)
    [distilled]="$distilled"
    [distilled_w3]="$distilled gating.distillation_weight=3"
    [distilled_w30]="$distilled gating.distillation_weight=30"
    [distilled_absolute]="$absolute"
    [distilled_lambda_1000]="$absolute gating.sparsity_weight=1000"
    [distilled_half]="$distilled gating.distillation_images=0.5"
    [distilled_quarter]="$distilled gating.distillation_images=0.25"
    [distilled_no_anneal]="$distilled gating.budget_anneal=0"
    [distilled_late]="$distilled gating.warmup_epochs=$((epochs / 2)) gating.budget_anneal=0.25"
    [distilled_0.3]="$distilled gating.target_budget=0.3 gating.budget_per_image=false"
    [distilled_per_step]="$distilled gating.budget_per_image=false"  # images may use more than others
    [distilled_top_k]="$distilled gating.gate=top_k"
    [distilled_fixed]="$distilled gating.gate=fixed"  # universally slimmable, between convolutions
    [distilled_projections]="$distilled method=vicreg_distilled_projections"
    [distilled_across_views]="$distilled method=vicreg_distilled_across_views"
    [distilled_gates]="$distilled method=vicreg_distilled_gates"
    [any_long]="$any"
    # The dense run of the same seed made gated, in so many epochs: gates alone, or all weights.
    [existing_gates_1]="$distilled gating.train=gates" [existing_gates_3]="$distilled gating.train=gates"
    [existing_gates_10]="$distilled gating.train=gates" [existing_gates_30]="$distilled gating.train=gates"
    [existing_all_1]="$distilled gating.train=all" [existing_all_3]="$distilled gating.train=all"
    [existing_all_10]="$distilled gating.train=all"
    # Dense networks of the FLOPs that the shares mean: width × √share.
    [dense]="" [dense_0.1]="" [dense_0.3]="" [dense_0.5]="" [dense_long]="" [dense_0.3_long]="" [dense_0.1_long]=""
)
default="dense fixed_0.1 fixed_0.3 fixed_0.5 range range_untold annealed annealed_only any annealed_slow annealed_log_uniform annealed_sandwich annealed_shuffled annealed_lambda_5 annealed_per_image annealed_diverse annealed_detached annealed_half_dense warm_half dense_0.1 dense_0.3 dense_0.5"
read -r -a variants <<<"${VARIANTS:-$default}"

arguments() { # variant, seed -> run, length, run_width
    local variant=$1 seed=$2 share checkpoint
    [[ $variant != *_long ]] || length=$((epochs * 3 / 2))
    [[ $variant != existing_* ]] || length=${variant##*_}
    if [[ $variant == dense* ]]; then
        share=${variant%_long} share=${share#dense}
        [ -z "$share" ] || run_width=$(narrow "${share#_}")
        run=("${dense[@]}")
        return
    fi
    read -r -a run <<<"$dual $gated ${overrides[$variant]}"
    if [[ $variant == existing_* ]]; then
        checkpoint=$(finished "$out/dense/seed_$seed")/last.ckpt || { echo "needs dense, seed $seed" >&2; return 1; }
        run+=(pretrained="$checkpoint" gating.warmup_epochs=0 scheduler.warmup_epochs=0)
    fi
}

make_all "$@"
