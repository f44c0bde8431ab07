#!/usr/bin/env bash
# The search behind the defaults of finetune.py: from a center, one flag at a time. Every run is
# evaluated on held-out rows (docs/training.md has the table).
#   bash runs/finetune_search.sh BASE_CHECKPOINT ROWS OUT_DIR
# Two runs at a time on a CPU, one thread each. If interrupted, the same command resumes.
# OUT_DIR/search.jsonl gets one line per run: its flags, and the figures of greedy answers.
set -euo pipefail
usage="usage: bash runs/finetune_search.sh BASE_CHECKPOINT ROWS OUT_DIR"
base=$(realpath "${1:?$usage}")
rows=$(realpath "${2:?$usage}")
mkdir -p "${3:?$usage}"
out=$(realpath "$3")
source "$(dirname "$0")/setup.sh" requirements.txt
dtype=float32  # bfloat16 is faster where the processor supports it natively
if grep -qsw avx512_bf16 /proc/cpuinfo; then dtype=bfloat16; fi

trial() { # the flags that differ from the center
  set -e
  trap 'exit 130' INT TERM  # bash -c has no trap of ours; a run that saved and stopped exits with 0
  local folder
  folder="$out/run$(tr -d ' ' <<< "$*")"
  if [[ ! -f $folder/figures.json ]]; then
    python finetune.py --resume --checkpoint "$base" --data "$rows" --out-dir "$folder" \
      --device cpu --dtype "$dtype" --max-lr 1e-3 --batch-size 32 --epochs 2 --weight-decay 0 \
      --eval-interval 100000 --save-interval 100000 --keep-last 1 "$@" > "$folder.log" 2>&1 ||
      { tail -n 1 "$folder.log" >&2; exit 1; }
    python judge.py "$folder" --data "$rows" --temperature 0 --device cpu \
      --out-dir "$folder/judge" > "$folder.txt" 2>&1 || { tail -n 1 "$folder.txt" >&2; exit 1; }
    cp "$folder/judge/judge.json" "$folder/figures.json"
  fi
}
export -f trial
export base rows out dtype OMP_NUM_THREADS=1

xargs -P 2 -I {} bash -c 'trial {}' << 'END'
--max-lr 1e-3
--max-lr 3e-4
--max-lr 3e-3
--max-lr 1e-4
--batch-size 16
--batch-size 64
--epochs 1
--epochs 4
--weight-decay 0.1
END
python judge.py "$base" --data "$rows" --temperature 0 --device cpu --out-dir "$out/base"
for figures in "$out"/run*/figures.json; do
  flags=$(basename "$(dirname "$figures")")
  echo "{\"run\": \"${flags#run}\", \"figures\": $(tr -d '\n' < "$figures")}"
done > "$out/search.jsonl"
cat "$out/search.jsonl"
