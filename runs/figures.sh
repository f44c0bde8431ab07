#!/usr/bin/env bash
# Redraws every figure in image/ from the logs in image/logs/, one line per figure.
#   bash runs/figures.sh [FOLDER]    # FOLDER for the figures (default: image)
set -euo pipefail
out=${1:-$(dirname "$0")/../image}
mkdir -p "$out"
out=$(realpath "$out")
source "$(dirname "$0")/setup.sh" requirements.txt
cd image/logs
draw() { python "../plot_$1.py" "${@:3}" --out "$out/$2.png"; }  # SCRIPT FIGURE LOG... [flags]
draw loss pretrain_loss stories_pretrain.jsonl --title "Pre-training on simple stories"
draw loss finetune_loss stories_finetune.jsonl --title "Tuning on requests for stories"
draw loss recipes recipes/gpt2_*.jsonl recipes/fast_*.jsonl --group \
  --title "Two recipes, three seeds each; 4,096 tokens per step"
draw report judge judge.json
draw report stories_rlhf stories_judge.json
draw samples stories stories_base.txt stories_tuned.txt stories_aligned.txt
draw frontier frontier rlhf_short_fast.jsonl rlhf_short.jsonl --successes frontier.json
