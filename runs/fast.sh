#!/usr/bin/env bash
# The fast recipe: GPT-2 124M with Muon on the blocks' matrices, a linear decay to 0, and blocks
# that start as the identity.
#   bash runs/fast.sh [number of GPUs] [further flags of trainer.py]
# If interrupted, rerun the same command to resume. The learning rates are the best of a 16M proxy
# (docs/benchmarks.md); they were not tried at 124M.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
gpus=8
if [[ ${1:-} =~ ^[0-9]+$ ]]; then gpus=$1; shift; fi
torchrun --standalone --nproc-per-node="$gpus" trainer.py --out-dir out/fast --resume \
  --optimizer muon --muon-lr 0.006 --schedule linear --zero-init \
  --max-lr 0.012 --min-lr 0 --warmup-steps 250 "$@"
