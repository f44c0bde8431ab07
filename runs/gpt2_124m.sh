#!/usr/bin/env bash
# GPT-2 124M from scratch: FineWeb, pre-training on 8 GPUs, instruction tuning, two answers.
#   bash runs/gpt2_124m.sh [number of GPUs] [further flags of trainer.py]
# Needs a network and 40 GB of disk; on smaller GPUs add --micro-batch-size auto.
# If interrupted, rerun the same command to resume.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
gpus=8
if [[ ${1:-} =~ ^[0-9]+$ ]]; then gpus=$1; shift; fi
out=out/gpt2_124m

python pretrain_data/fineweb_downloader.py --out-dir pretrain_data/fineweb
torchrun --standalone --nproc-per-node="$gpus" trainer.py --data-dir pretrain_data/fineweb \
  --out-dir "$out/pretrain" --resume "$@"

python finetune_data/alpaca_downloader.py
torchrun --standalone --nproc-per-node="$gpus" finetune.py --checkpoint "$out/pretrain" \
  --data finetune_data/alpaca.json --out-dir "$out/finetune" --resume

python inference.py --checkpoint "$out/finetune" \
  "What are the places I can visit in New York?" "Who was the first president of the United States?"
