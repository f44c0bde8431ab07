#!/usr/bin/env bash
# A small GPT-2 that tells stories, on a CPU (docs/results.md has its results): pre-training, tuning
# on requests for stories, and policy optimization for stories that are short and keep to the title.
#   bash runs/stories.sh STORIES REQUESTS [output folder]    # about two hours on two cores
# STORIES: what text_to_shards.py reads. REQUESTS: a parquet file with `instruction`, with titles in
# double quotes, and `output`. If interrupted, the same command resumes.
set -euo pipefail
stories=$(realpath "${1:?usage: bash runs/stories.sh STORIES REQUESTS [output folder]}")
requests=$(realpath "${2:?usage: bash runs/stories.sh STORIES REQUESTS [output folder]}")
out=$(realpath -m "${3:-out/stories}")
source "$(dirname "$0")/setup.sh" requirements.txt
mkdir -p "$out"
dtype=float32  # bfloat16 is faster where the processor supports it natively
if grep -qsw avx512_bf16 /proc/cpuinfo; then dtype=bfloat16; fi
settings=(--resume --device cpu --dtype "$dtype" --keep-last 2)

[[ -f $out/data/manifest.json ]] || python pretrain_data/text_to_shards.py "$stories" \
  --out-dir "$out/data"
python trainer.py "${settings[@]}" --data-dir "$out/data" --out-dir "$out/pretrain" \
  --n-layer 6 --n-head 4 --n-embd 256 --block-size 512 --sequence-length 512 \
  --micro-batch-size 8 --total-batch-size 4096 --warmup-steps 50 \
  --optimizer muon --muon-lr 0.015 --max-lr 0.02 --min-lr 0 --schedule linear --zero-init \
  --eval-interval 250 --eval-tokens 65536 --save-interval 250 \
  --sample-prompt "Once upon a time" --sample-tokens 100

# Short requests alone (fables come with a page of elements), and those with a title for the reward
python - "$requests" "$out" << 'END'
import json, pathlib, sys
import pyarrow.parquet as pq
rows = pq.read_table(sys.argv[1], columns=["instruction", "output"]).to_pylist()
short = [row for row in rows if len(row["instruction"].split()) < 40]
titled = [row for row in short if row["instruction"].count('"') == 2]
for name, some in (("requests", short), ("titles", titled)):
    (pathlib.Path(sys.argv[2]) / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
END
python finetune.py "${settings[@]}" --checkpoint "$out/pretrain" --data "$out/requests.json" \
  --out-dir "$out/finetune" --template question --eval-interval 10 --sample-tokens 100

cat > "$out/rewards.py" << 'END'
import re


def short_tale(row, story):
    """Half a point for 60 to 150 words, half for a word of the title (of 4 letters or more)."""
    words = re.findall("[a-z]{4,}", row["instruction"].split('"')[1].casefold())
    has_word = any(word in story.casefold() for word in words)
    return 0.5 * (60 <= len(story.split()) <= 150) + 0.5 * has_word
END
python rlhf.py "${settings[@]}" --checkpoint "$out/finetune" --prompts "$out/titles.json" \
  --out-dir "$out/rlhf" --advantage group --reward "$out/rewards.py:short_tale" --max-tokens 200 \
  --batch-size 64 --kl-coef 0.05 --max-lr 7e-5 --max-steps 24 --eval-interval 8 --epochs 1
python judge.py "$out/finetune" "$out/rlhf" --data "$out/titles.json" --out-dir "$out/judge" \
  --device cpu --proxy "$out/rewards.py:short_tale" --max-tokens 200 --rows 100 --best-of 4

# The same five requests to all three models
for model in pretrain finetune rlhf; do
  echo "== $model"
  python inference.py --checkpoint "$out/$model" --device cpu --temperature 0.8 --seed 0 \
    --max-tokens 400 << 'END' | tee "$out/$model.txt"
Write a short story for young children titled "The Little Fox and the Red Kite".
Write a short story for young children titled "A Rainy Day".
Write a short story for young children titled "The Sleepy Bear".
Tell the child-appropriate tale called "Lily's Lost Ball".
Tell the child-appropriate tale called "The Brave Mouse".
END
done
