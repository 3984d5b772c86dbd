#!/usr/bin/env bash
# One run for every budget, or one for each? Trains variants of VICReg-Dual-Gating and their rivals with
# several seeds, evaluates both paths (1-NN, and logistic regression on standardised features) at given
# shares of the FLOPs, and prints a table (mean ± std). docs/results/every_budget.md has the results.
#
#   bash research/every_budget/study.sh digits [key=value ...]
#   DATA=FOLDER bash research/every_budget/study.sh cifar10 [key=value ...]
#
# FOLDER holds train*.npz and test.npz, as for validate_cifar.sh. Further arguments override every
# run's config. From the environment: OUT (default trained_models/study_<data>), SEEDS ("0 1 2"),
# VARIANTS (default: all; names as below), SHARES ("0.1 0.3 0.5 0.8"), WIDTH (16), EPOCHS (digits 60,
# cifar10 20), PIXELS (cifar10: the images are made smaller first; 16), JOBS (1) runs at once. What is
# finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=${1:-}; shift || true
read -r -a seeds <<<"${SEEDS:-0 1 2}"
read -r -a shares <<<"${SHARES:-0.1 0.3 0.5 0.8}"
width=${WIDTH:-16} pixels=${PIXELS:-16}
source bash_scripts/environment.sh
source bash_scripts/cells.sh

common=(precision=32-true final_knn.enabled=true knn_eval.enabled=false enable_progress_bar=false)
case $data in
digits)
    epochs=${EPOCHS:-60}
    [ -e datasets/digits/train.npz ] || "$python" -m solo_gating.data.digits datasets/digits
    dual=vicreg_dual_digits
    dense=(vicreg_dual_digits method=vicreg backbone.name=resnet18_plain '~gating')
    ;;
cifar10)
    epochs=${EPOCHS:-20}
    [ -d "${DATA:-}" ] || { echo "error: DATA: '${DATA:-}' is not a folder of train*.npz and test.npz" >&2; exit 2; }
    dual=vicreg_dual_cifar10
    dense=(vicreg_cifar10)
    view="{crop_size:$pixels,num_crops:1,rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},\
color_jitter:{prob:0.8,brightness:0.4,contrast:0.4,saturation:0.2,hue:0.1},grayscale:{prob:0.2},\
gaussian_blur:{prob:0.0},solarization:{prob:0.1},equalization:{prob:0.0},horizontal_flip:{prob:0.5}}"
    images=datasets/study_cifar10_$pixels
    [ -e "$images/test.npz" ] || "$python" research/every_budget/study.py shrink "$DATA" "$images" "$pixels"
    common+=(optimization=adamw data.format=npz "data.train_path='$images/train*.npz'"
        "data.val_path='$images/test.npz'" data.pipeline=device "augmentations=[$view,$view]"
        optimizer.batch_size=64 optimizer.lr=6e-3 scheduler.warmup_epochs=$((epochs / 10))
        method_kwargs.proj_hidden_dim=512 method_kwargs.proj_output_dim=512)
    ;;
*) sed -n '2,/^[^#]/{/^#/p}' "$0"; exit 2 ;;
esac
out=${OUT:-trained_models/study_$data}

# The last two as in the runs of docs/results/every_budget.md.
gated="gating.sparsity_weight=100 gating.warmup_epochs=$((epochs / 10)) gating.bound_gradient=all gating.weight_decay=1e-4"
range="gating.target_budget=[0.05,0.9]"
distilled="$range gating.budget_anneal=0.5 gating.budget_per_image=true method=vicreg_distilled"
annealed="$range gating.gate_kwargs.bias=4 gating.budget_anneal=0.5"
declare -A overrides=(
    [fixed_0.1]="gating.target_budget=0.1" [fixed_0.3]="gating.target_budget=0.3" [fixed_0.5]="gating.target_budget=0.5"
    [range]="$range"
    [range_untold]="$range gating.budget_embedding=false"
    [annealed]="$annealed"
    [annealed_only]="$range gating.budget_anneal=0.5"
    [any]="$range gating.budget_anneal=0.5 gating.budget_per_image=true"  # vicreg_any_*
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
    [distilled_half]="$distilled gating.distillation_images=0.5"
    [distilled_quarter]="$distilled gating.distillation_images=0.25"
    [distilled_no_anneal]="$distilled gating.budget_anneal=0"
    [distilled_late]="$distilled gating.warmup_epochs=$((epochs / 2)) gating.budget_anneal=0.25"
    [distilled_0.3]="$distilled gating.target_budget=0.3 gating.budget_per_image=false"
    [distilled_top_k]="$distilled gating.gate=top_k"
    [distilled_slimmable]="$distilled gating.gate=fixed"  # universally slimmable, between convolutions
    [distilled_projections]="$distilled method=vicreg_distilled_projections"
    [distilled_across_views]="$distilled method=vicreg_distilled_across_views"
    [distilled_gates]="$distilled method=vicreg_distilled_gates"
    [any_long]="$range gating.budget_anneal=0.5 gating.budget_per_image=true"
    # The dense run of the same seed made gated, in so many epochs: gates alone, or all weights.
    [existing_gates_1]="$distilled gating.train=gates" [existing_gates_3]="$distilled gating.train=gates"
    [existing_gates_10]="$distilled gating.train=gates"
    [existing_all_3]="$distilled gating.train=all" [existing_all_10]="$distilled gating.train=all"
    # Dense networks of the FLOPs that the shares mean: width × √share.
    [dense]="" [dense_0.1]="" [dense_0.3]="" [dense_0.5]="" [dense_long]="" [dense_0.3_long]="" [dense_0.1_long]=""
)
default="dense fixed_0.1 fixed_0.3 fixed_0.5 range range_untold annealed annealed_only any annealed_slow annealed_log_uniform annealed_sandwich annealed_shuffled annealed_lambda_5 annealed_per_image annealed_diverse annealed_detached annealed_half_dense warm_half dense_0.1 dense_0.3 dense_0.5"
read -r -a variants <<<"${VARIANTS:-$default}"
for variant in "${variants[@]}"; do
    [ -n "${overrides[$variant]+known}" ] || { echo "error: VARIANTS: found $variant, expected one of ${!overrides[*]}" >&2; exit 2; }
done

study() { # variant, seed, overrides
    local variant=$1 seed=$2 folder words checkpoint run_width=$width length=$epochs share; shift 2
    [[ $variant != *_long ]] || length=$((epochs * 3 / 2))
    [[ $variant != existing_* ]] || length=${variant##*_}
    folder="$out/$variant/seed_$seed"
    local run=(name="$variant" seed="$seed" checkpoint.dir="$folder" auto_resume.enabled=true "${common[@]}"
        max_epochs="$length" check_val_every_n_epoch="$length")
    if [[ $variant == dense* ]]; then
        run=("${dense[@]}" "${run[@]}")
        share=${variant%_long} share=${share#dense}
        [ -z "$share" ] || run_width=$("$python" -c "print(round($width * ${share#_} ** 0.5))")
    else
        read -r -a words <<<"$gated ${overrides[$variant]}"
        run=("$dual" "${run[@]}" "${words[@]}")
        if [[ $variant == existing_* ]]; then
            checkpoint=$(finished "$out/dense/seed_$seed")/last.ckpt || { echo "needs dense, seed $seed" >&2; return 1; }
            run+=(pretrained="$checkpoint" gating.warmup_epochs=0 scheduler.warmup_epochs=0)
        fi
    fi
    finished "$folder" >/dev/null ||
        "$python" research/every_budget/ablations.py --config-name "${run[@]}" backbone.kwargs.width="$run_width" "$@" ||
        return # `set -e` is off where a failure is waited for
    checkpoint=$(finished "$folder")/last.ckpt || { unfinished "$folder"; return 1; }
    evaluated "$folder/accuracies.json" "$checkpoint" ||
        "$python" research/every_budget/study.py evaluate "$checkpoint" "$folder/accuracies.json" "${shares[@]}"
}

mkdir -p "$out"
for seed in "${seeds[@]}"; do
    for variant in "${variants[@]}"; do
        study "$variant" "$seed" "$@" >"$out/$variant-$seed.log" 2>&1 || echo "failed, see $out/$variant-$seed.log" >&2 &
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n; done
    done
done
wait
"$python" research/every_budget/study.py table "$out" "${shares[@]}" | tee "$out/table.md"
for seed in "${seeds[@]}"; do
    for variant in "${variants[@]}"; do
        folder="$out/$variant/seed_$seed"
        run=$(finished "$folder") && evaluated "$folder/accuracies.json" "$run/last.ckpt" ||
            { echo "error: $folder is not finished; the same command continues" >&2; exit 1; }
    done
done
