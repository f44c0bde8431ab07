#!/usr/bin/env bash
#SBATCH --job-name=minigpt2 --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=24:00:00 --signal=USR1@300 --open-mode=append
# Pre-training on several nodes under SLURM, from the repository's root:
#   sbatch runs/slurm.sh [flags of trainer.py; --data-dir and --out-dir on a shared disk]
# Five minutes before its time limit the job saves and stops (SIGUSR1); the same sbatch resumes it.
# After a lost rank all ranks restart from the newest checkpoint, up to three times.
set -euo pipefail
export MINIGPT2_HOST
MINIGPT2_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One task a node gets one core by default, and its ranks share it: it is given all of the node's.
# SLURM signals every process of the step: torchrun itself has to ignore it
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" bash -c '
  trap "" USR1
  exec torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$MINIGPT2_HOST:29500" \
    trainer.py --resume "$@"' - "$@"
