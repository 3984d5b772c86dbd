#!/usr/bin/env bash
# Pre-training by torchrun, on one machine or on several that reach each other.
#
#   bash bash_scripts/cluster/torchrun.sh --config-name vicreg_dual_imagenet100 [key=value ...]
#
# Start it on every machine. From the environment: NODES (default 1), NODE_RANK (0 ... NODES − 1),
# MASTER (the first machine's address and port, default 127.0.0.1:29500), PROCESSES (on each
# machine, one per GPU; default 8), PYTHON. On one machine `devices=8 strategy=ddp` does without torchrun.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,/^[^#]/{/^#/p}' "$0"; exit 2; }
source bash_scripts/environment.sh
nodes=${NODES:-1} processes=${PROCESSES:-8} master=${MASTER:-127.0.0.1:29500}
exec "$python" -m torch.distributed.run --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "$processes" --master-addr "${master%:*}" --master-port "${master##*:}" \
    -m solo_gating.main_pretrain "$@" num_nodes="$nodes" devices="$processes" strategy=ddp \
    auto_resume.enabled=true
