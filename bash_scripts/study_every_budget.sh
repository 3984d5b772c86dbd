#!/usr/bin/env bash
# One run for every budget, or one for each? Trains variants of VICReg-Dual-Gating and their rivals with
# several seeds, evaluates both paths at given shares of the FLOPs, and prints a table (mean ± std).
#
#   bash bash_scripts/study_every_budget.sh digits [key=value ...]
#   DATA=FOLDER bash bash_scripts/study_every_budget.sh cifar10 [key=value ...]
#
# FOLDER holds train*.npz and test.npz, as for validate_cifar.sh. Further arguments override every
# run's config. From the environment: OUT (default trained_models/study_<data>), SEEDS ("0 1 2"),
# VARIANTS (default: all; names as below), SHARES ("0.1 0.3 0.5"), WIDTH (16), EPOCHS (digits 60,
# cifar10 30), JOBS (1) runs at once. What is finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-}; shift || true
read -r -a seeds <<<"${SEEDS:-0 1 2}"
read -r -a shares <<<"${SHARES:-0.1 0.3 0.5}"
width=${WIDTH:-16}
source bash_scripts/environment.sh

common=(precision=32-true final_knn.enabled=true knn_eval.enabled=false backbone.kwargs.width="$width")
case $data in
digits)
    epochs=${EPOCHS:-60}
    [ -e datasets/digits/train.npz ] || "$python" -m solo_gating.data.digits datasets/digits
    dual=vicreg_dual_digits
    dense=(vicreg_dual_digits method=vicreg backbone.name=resnet18_plain '~gating')
    ;;
cifar10)
    epochs=${EPOCHS:-30}
    [ -d "${DATA:-}" ] || { echo "error: DATA: '${DATA:-}' is not a folder of train*.npz and test.npz" >&2; exit 2; }
    dual=vicreg_dual_cifar10
    dense=(vicreg_cifar10)
    common+=(optimization=adamw data.format=npz "data.train_path='$DATA/train*.npz'"
        "data.val_path='$DATA/test.npz'" data.num_workers=1 optimizer.batch_size=64 optimizer.lr=6e-3
        scheduler.warmup_epochs=3 method_kwargs.proj_hidden_dim=512 method_kwargs.proj_output_dim=512)
    ;;
*) sed -n '2,13p' "$0"; exit 2 ;;
esac
out=${OUT:-trained_models/study_$data}
common+=(max_epochs="$epochs" check_val_every_n_epoch="$epochs")

gated="gating.sparsity_weight=100 gating.warmup_epochs=$((epochs / 10))"
range="gating.target_budget=[0.05,0.9]"
declare -A overrides=(
    [fixed_0.1]="gating.target_budget=0.1" [fixed_0.3]="gating.target_budget=0.3" [fixed_0.5]="gating.target_budget=0.5"
    [range]="$range"
    [range_log_uniform]="$range gating.budget_sampling=log_uniform"
    [range_sandwich]="$range gating.budget_sampling=sandwich"
    [range_untold]="$range gating.budget_embedding=false"
    [range_annealed]="$range gating.open_start=true gating.budget_anneal_epochs=$((epochs / 2))"
    [range_annealed_shuffled]="$range gating.open_start=true gating.budget_anneal_epochs=$((epochs / 2)) gating.shuffle_views=true"
    [range_lambda_5]="$range gating.sparsity_weight=5"
    # Dense networks of the FLOPs that the shares mean: width × √share.
    [dense]="" [dense_0.1]="" [dense_0.3]="" [dense_0.5]=""
)
default="dense fixed_0.1 fixed_0.3 fixed_0.5 range range_annealed range_annealed_shuffled range_log_uniform range_sandwich range_untold range_lambda_5 dense_0.1 dense_0.3 dense_0.5"
read -r -a variants <<<"${VARIANTS:-$default}"
for variant in "${variants[@]}"; do
    [ -n "${overrides[$variant]+known}" ] || { echo "error: VARIANTS: found $variant, accepted are $default" >&2; exit 2; }
done

checkpoint() { compgen -G "$1/*/*/last.ckpt" | head -1; }

study() { # variant, seed, overrides
    local variant=$1 seed=$2 folder words path share; shift 2
    folder="$out/$variant/seed_$seed"
    local run=(name="$variant" seed="$seed" checkpoint.dir="$folder" auto_resume.enabled=true "${common[@]}")
    if [[ $variant == dense* ]]; then
        run=("${dense[@]}" "${run[@]}")
        if [ "$variant" != dense ]; then
            run+=(backbone.kwargs.width="$("$python" -c "print(round($width * ${variant#dense_} ** 0.5))")")
        fi
    else
        read -r -a words <<<"$gated ${overrides[$variant]}"
        run=("$dual" "${run[@]}" "${words[@]}")
    fi
    if ! compgen -G "$folder/*/*/metrics.json" >/dev/null; then
        "$python" -m solo_gating.main_pretrain --config-name "${run[@]}" "$@"
    fi
    path=$(checkpoint "$folder")
    [ -e "$folder/linear/dense/metrics.json" ] ||
        "$python" -m solo_gating.main_linear pretrained_feature_extractor="$path" path=dense augment=false seeds=1 \
            enable_progress_bar=false output="$folder/linear/dense"
    [[ $variant != dense* ]] || return 0
    [ -e "$folder/sweep/metrics.json" ] ||
        "$python" -m solo_gating.main_policy pretrained_feature_extractor="$path" --sweep "shares=[$(IFS=,; echo "${shares[*]}")]" \
            output="$folder/sweep"
    for share in "${shares[@]}"; do
        if [ ! -e "$folder/linear/$share/metrics.json" ]; then
            read -r -a words <<<"$("$python" bash_scripts/study_table.py position "$folder/sweep/metrics.json" "$share")"
            "$python" -m solo_gating.main_linear pretrained_feature_extractor="$path" path=gated augment=false seeds=1 \
                enable_progress_bar=false output="$folder/linear/$share" "${words[@]}"
        fi
    done
}

mkdir -p "$out"
for seed in "${seeds[@]}"; do
    for variant in "${variants[@]}"; do
        study "$variant" "$seed" "$@" >"$out/$variant-$seed.log" 2>&1 || echo "failed, see $out/$variant-$seed.log" >&2 &
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n; done
    done
done
wait
"$python" bash_scripts/study_table.py table "$out" "${shares[@]}" | tee "$out/table.md"
