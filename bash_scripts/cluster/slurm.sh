#!/usr/bin/env bash
# Pre-training on several machines under SLURM, continued by itself when the time limit is reached.
#
#   sbatch bash_scripts/cluster/slurm.sh --config-name vicreg_dual_imagenet100 [key=value ...]
#
# Ask for one task per GPU; change the lines below to your cluster. Code, environment and the folder of
# checkpoints must be on a file system that all machines share. PYTHON says which environment.
#SBATCH --job-name=solo-gating
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}"
source bash_scripts/environment.sh

# Two minutes before the limit SLURM signals this script only. The last epoch's checkpoint is whole, and
# auto_resume finds it: nothing but the epoch that has begun is lost.
again() {
    scontrol requeue "$SLURM_JOB_ID"
    kill -TERM "$steps"
}
trap again USR1

srun --kill-on-bad-exit=1 "$python" -m solo_gating.main_pretrain "$@" \
    num_nodes="$SLURM_JOB_NUM_NODES" devices="$SLURM_NTASKS_PER_NODE" strategy=ddp \
    auto_resume.enabled=true auto_resume.max_hours=168 enable_progress_bar=false &
steps=$!
wait "$steps"
