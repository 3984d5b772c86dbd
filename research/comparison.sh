#!/usr/bin/env bash
# The papers' comparison systems and the rivals of today, in one setting: dense and narrow networks, dual
# gating, distillation, every kind of gate under SimCLR, a universally slimmable network, and students of
# the gated one's policy. docs/results/comparison.md has the results, and what differs from each original.
#
#   DATA=FOLDER bash research/comparison.sh [key=value ...]
#
# FOLDER holds train*.npz and test.npz, as for validate_cifar.sh. Further arguments override every run's
# config. From the environment: VARIANTS (default: all), and what research/setting.sh names. What is
# finished is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
study=comparison
source research/setting.sh
prepare cifar10

rest="gating.warmup_epochs=$((epochs / 10))"
channel="gating.sparsity_weight=100 $rest gating.bound_gradient=all gating.weight_decay=1e-4"  # as in every_budget.sh
any="vicreg_any_cifar10 $channel"
distilled="$any method=vicreg_distilled gating.relative_budget_loss=true"  # as vicreg_distilled_*
slimmable="us3l_cifar10 optimizer.weight_decay=0 scheduler.interval=step method_kwargs.pred_hidden_dim=512"
declare -A overrides=(
    [dense]=vicreg_cifar10 [dense_0.1]=vicreg_cifar10 [dense_0.3]=vicreg_cifar10 [dense_0.5]=vicreg_cifar10
    [dense_3x]=vicreg_cifar10  # three times as long: US3L makes three steps a batch
    [dual_0.3]="vicreg_dual_cifar10 $channel gating.target_budget=0.3"
    [gated_0.3]="vicreg_gated_cifar10 $channel gating.target_budget=0.3"  # both views, as the SimCLR kinds
    [any]="$any"
    [distilled]="$distilled" [distilled_3x]="$distilled" [distilled_fixed]="$distilled gating.gate=fixed"
    [simclr]=simclr_cifar10 [simclr_0.3]=simclr_cifar10
    [simclr_channel_0.3]="simclr_cdg_cifar10 recipe=simclr_gated $channel gating.target_budget=0.3"
    [simclr_channel_0.5]="simclr_cdg_cifar10 recipe=simclr_gated $channel gating.target_budget=0.5"
    [simclr_dual_0.3]="simclr_cdg_cifar10 recipe=simclr_gated method=simclr_dual $channel gating.target_budget=0.3"
    [simclr_fbs_0.3]="simclr_fbs_cifar10 $rest gating.target_budget=0.3"
    [simclr_fbs_0.5]="simclr_fbs_cifar10 $rest gating.target_budget=0.5"
    [simclr_dgc_0.3]="simclr_dgc_cifar10 gating.target_budget=0.3"
    [simclr_dgc_0.5]="simclr_dgc_cifar10 gating.target_budget=0.5"
    [us3l]="$slimmable"
    [us3l_per_batch]="$slimmable method_kwargs.optimizer_steps=per_batch"
    # Students of `any`: its dense path teaches, its policy at 30 % of the FLOPs says the widths.
    [simreg]=simreg_cifar10 [seed]=seed_cifar10
)
# Their thresholds decide how much is skipped: Φ(τ) of what is not the base. In runs this short they stay
# near their start, which is therefore their target.
for kind in cgnet cdg scdg; do
    for target in 0 0.55; do
        overrides[simclr_${kind}_$target]="simclr_${kind}_cifar10 $rest gating.gate_kwargs.target=$target gating.gate_kwargs.init=$target"
    done
done

arguments() { # variant, seed -> run, length, run_width
    local variant=$1 seed=$2 share=${1##*_} teacher policy
    read -r -a run <<<"${overrides[$variant]}"
    [[ $variant != *_3x ]] || length=$((epochs * 3))
    case $variant in
    dense_0* | simclr_0*) run_width=$(narrow "$share") ;;
    simreg | seed)
        teacher=$(finished "$out/any/seed_$seed")/last.ckpt || { echo "needs any, seed $seed" >&2; return 1; }
        policy="$out/any/seed_$seed/policy"
        evaluated "$policy/policy.json" "$teacher" || "$python" -m solo_gating.main_policy checkpoint="$teacher" \
            calibrate=0.3 budget=0.3 output="$policy" data.num_workers=0 || return
        # One view; the queue is an eighth of the images, where the original's is a twentieth.
        run+=(method_kwargs.teacher="$teacher" backbone.kwargs.policy="$policy/policy.json" "$one_view")
        projector=()
        [ "$variant" = simreg ] || run+=(method_kwargs.queue_size=640)
        ;;
    esac
}

default=""
for variant in dense dense_0.1 dense_0.3 any distilled distilled_fixed us3l us3l_per_batch simclr \
    simclr_{channel,fbs,dgc}_{0.3,0.5} simclr_{cdg,scdg,cgnet}_{0,0.55} simreg seed \
    {dual,gated,simclr_dual}_0.3; do
    default+=" $variant"
done
read -r -a variants <<<"${VARIANTS:-$default}"
make_all "$@"
