#!/usr/bin/env bash
# Two tables of the poster "Contrastive Dual Gating" (CVPR 2022): linear evaluation of SimCLR with each kind
# of gates on CIFAR-10, and of dense SimCLR and SCDG on CIFAR-10 and CIFAR-100. The poster does not say how
# long it trains; the configs have solo-learn's 1,000 epochs. --datasets is of the second table; --budgets is
# not used: what is skipped follows from a target of τ (gating.gate_kwargs.target).
#
#   bash bash_scripts/reproduce/poster.sh --data cifar10=PATH --data cifar100=PATH [options]
set -euo pipefail
source "$(dirname "$0")/common.sh"

of_simclr() { # kind of gates, or "" for none, and data set
    local name="simclr${1:+_$1}"
    pretrain "$name-$2" "$name" "$2"
    linear "$name-$2" "$2"
    [ -z "$1" ] || policy "$name-$2" "$2" # prints FLOPs as the poster counts them, too
}

for kind in cdg fbs dgc cgnet; do of_simclr "$kind" cifar10; done
for dataset in $(datasets "cifar10 cifar100"); do
    of_simclr "" "$dataset"
    of_simclr scdg "$dataset"
done
report
