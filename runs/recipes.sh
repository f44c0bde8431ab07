#!/usr/bin/env bash
# Two recipes on a 16M model, with the learning rates that were best for seed 1 (docs/LOG.md): the
# defaults of trainer.py on 2.0M tokens, and those of runs/fast.sh on half of them.
#   bash runs/recipes.sh DATA_DIR [further flags of trainer.py]    # an hour on two cores
# DATA_DIR holds token shards with at least 2.2M tokens. Each run ends with its validation loss. If
# interrupted, rerun the same command to resume.
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/recipes.sh DATA_DIR [flags of trainer.py]}")
source "$(dirname "$0")/setup.sh" requirements.txt
train() {  # NAME [flags]
  echo "== $1"
  python trainer.py --data-dir "$data" --out-dir "out/recipes/$1" --resume --device cpu \
    --dtype bfloat16 --n-layer 4 --n-head 4 --n-embd 256 --block-size 256 --sequence-length 256 \
    --micro-batch-size 16 --total-batch-size 4096 --warmup-steps 40 --eval-interval 61 \
    --eval-tokens 65536 --sample-tokens 0 --keep-last 1 "${@:2}"
}
for seed in 1 2 3; do
  train "gpt2_seed$seed" --seed "$seed" --max-steps 488 --max-lr 0.0015 --min-lr 0.00015 "${@:2}"
  train "fast_seed$seed" --seed "$seed" --max-steps 244 --optimizer muon --muon-lr 0.006 \
    --schedule linear --zero-init --max-lr 0.012 --min-lr 0 "${@:2}"
done
python image/plot_loss.py out/recipes/gpt2_* out/recipes/fast_* --group --out out/recipes/recipes.png
