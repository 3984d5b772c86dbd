#!/usr/bin/env bash
# CIFAR-100 on one GPU with the fastest settings: VICReg and VICReg-Dual-Gating at three target budgets,
# 1-NN and linear evaluation of both paths, and a report beside the papers' figures (of 500 epochs).
#
#   bash bash_scripts/gpu/cifar100.sh SECONDS DATA [key=value ...]
#
# It stops cleanly after SECONDS (exit code 75 if something is left): the same command continues, and
# repeats nothing that is finished. DATA holds train*.npz and test.npz, or is torchvision's root.
# Further arguments override every pre-training's config. From the environment: OUT (default
# trained_models/gpu_cifar100), EPOCHS (200; the cosine schedule ends there), RUNS (default
# "vicreg 0.3 0.1 0.5": the dense baseline, and target budgets), LINEAR (overrides of linear
# evaluation, default "augment=false seeds=3": features without augmentation, computed once),
# BENCHMARK (options of main_benchmark_train, for the 1-minute check at the start).
set -euo pipefail
usage() { sed -n '2,/^[^#]/{/^#/p}' "$0"; exit 2; }
[ $# -ge 2 ] || usage
[[ $1 =~ ^[1-9][0-9]*$ ]] || { echo "error: SECONDS: got '$1', expected a number ≥ 1" >&2; exit 2; }
[ -d "$2" ] || { echo "error: DATA: '$2' is not a folder" >&2; exit 2; }
end=$((SECONDS + $1)) data=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/../.."
out=${OUT:-trained_models/gpu_cifar100} epochs=${EPOCHS:-200}
read -r -a runs <<<"${RUNS:-vicreg 0.3 0.1 0.5}"
read -r -a linear <<<"${LINEAR:-augment=false seeds=3}"
read -r -a benchmark <<<"${BENCHMARK:---accelerator gpu --batch 512 --precision bf16-mixed --compile --methods vicreg_dual --seconds 20}"
source bash_scripts/environment.sh
source bash_scripts/cells.sh
mkdir -p "$out"

if compgen -G "$data/train*.npz" >/dev/null; then
    images=(data.format=npz "data.train_path='$data/train*.npz'" "data.val_path='$data/test.npz'")
else
    images=("data.train_path='$data'" "data.val_path='$data'")
fi

within() { # a command, interrupted as by Ctrl-C when the time is up
    local left=$((end - SECONDS)) code=0
    [ "$left" -ge 20 ] || time_is_up # Python has hardly started by then
    timeout --foreground --signal=INT --kill-after=60 "$left" "$@" || code=$?
    [ "$code" -ne 124 ] || time_is_up
    return "$code"
}
time_is_up() { echo "time is up; the same command continues"; exit 75; }

# Correct (it refuses losses that are not finite) and fast? Rows of images/s, and the card's own peak.
[ -e "$out/benchmark/benchmark_train.json" ] ||
    within "$python" -m solo_gating.main_benchmark_train "${benchmark[@]}" --output "$out/benchmark"

for run in "${runs[@]}"; do
    config=vicreg name=vicreg gates=()
    if [ "$run" != vicreg ]; then
        config=vicreg_dual name=vicreg_dual-$run gates=("gating.target_budget=$run")
    fi
    folder=$out/$name
    finished "$folder" >/dev/null ||
        within "$python" -m solo_gating.main_pretrain --config-name "${config}_cifar100" \
            name="$name" checkpoint.dir="$folder" auto_resume.enabled=true max_epochs="$epochs" \
            "${images[@]}" data.pipeline=device performance.compile=true precision=bf16-mixed \
            check_val_every_n_epoch="$epochs" ${gates[@]+"${gates[@]}"} "$@"
    checkpoint=$(finished "$folder")/last.ckpt || { unfinished "$folder"; exit 1; }
    for kind in knn linear; do
        settings=()
        [ "$kind" = knn ] || settings=("${linear[@]}")
        evaluated "$folder/$kind/metrics.json" "$checkpoint" ||
            within "$python" -m "solo_gating.main_$kind" checkpoint="$checkpoint" \
                output="$folder/$kind" ${settings[@]+"${settings[@]}"}
    done
done
"$python" -m solo_gating.main_report "$out" --output "$out/report"
