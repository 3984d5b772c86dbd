#!/usr/bin/env bash
# Does it learn, on real images? Trains a narrow network on CIFAR arrays, plain VICReg and
# VICReg-Dual-Gating at target budgets 0.1, 0.3, 0.5, and prints 1-NN accuracy and FLOPs cut.
#
#   bash bash_scripts/validate_cifar.sh DATA [key=value ...]
#
# DATA holds train*.npz and test.npz (`images` uint8 N×32×32×3, `labels`); its name says how many
# classes: cifar100... or cifar10.... Further arguments override the config, e.g. max_epochs=100
# backbone.kwargs.width=32 accelerator=gpu. OUT (default: trained_models/validate_cifar) gets the
# runs, OUT/table.md the table. A finished run is not repeated; JOBS (default 1) runs at once.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,/^[^#]/{/^#/p}' "$0"; exit 2; }
data=$1; shift
[ -d "$data" ] || { echo "error: DATA: '$data' is not a folder of train*.npz and test.npz" >&2; exit 2; }
case "$(basename "$data")" in cifar100*) dataset=cifar100 ;; *) dataset=cifar10 ;; esac
out=${OUT:-trained_models/validate_cifar}
source bash_scripts/environment.sh
source bash_scripts/cells.sh

pretrain() { # name, config, overrides
    local name=$1 config=$2; shift 2
    if finished "$out/$name" >/dev/null; then echo "$name: done before"; return; fi
    # A short run wants AdamW instead of LARS and many small steps; see also the gates below.
    "$python" -m solo_gating.main_pretrain --config-name "${config}_$dataset" \
        optimization=adamw name="$name" checkpoint.dir="$out/$name" auto_resume.enabled=true \
        data.format=npz "data.train_path='$data/train*.npz'" "data.val_path='$data/test.npz'" \
        data.num_workers=1 max_epochs=30 precision=32-true log_every_n_steps=10 \
        optimizer.batch_size=64 optimizer.lr=6e-3 scheduler.warmup_epochs=3 \
        check_val_every_n_epoch=5 method_kwargs.proj_hidden_dim=512 \
        method_kwargs.proj_output_dim=512 backbone.kwargs.width=16 \
        final_knn.enabled=true "$@"
}

runs=("vicreg vicreg")
for budget in 0.1 0.3 0.5; do
    # ... a heavier budget loss than the papers' 5, and an encoder that has begun to learn before
    # its gates do.
    runs+=("vicreg_dual_$budget vicreg_dual gating.target_budget=$budget gating.sparsity_weight=100 gating.warmup_epochs=6")
done
for run in "${runs[@]}"; do
    read -r -a words <<<"$run"
    pretrain "${words[@]}" "$@" &
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
done
wait
for run in "${runs[@]}"; do # whatever became of it
    finished "$out/${run%% *}" >/dev/null || { unfinished "$out/${run%% *}"; exit 1; }
done
"$python" bash_scripts/validation_table.py "$out" | tee "$out/table.md"
