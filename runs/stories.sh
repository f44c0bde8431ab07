#!/usr/bin/env bash
# A small GPT-2 that tells stories, on a CPU (docs/results.md has its results): pre-training, tuning
# on requests for stories, and policy optimization for short stories about what was asked for.
#   bash runs/stories.sh STORIES [output folder]    # about two and a half hours on two cores
# STORIES: a parquet file of simple stories (TinyStories), column `text`. If interrupted, the same
# command resumes.
set -euo pipefail
stories=$(realpath "${1:?usage: bash runs/stories.sh STORIES [output folder]}")
out=${2:-$(dirname "$0")/../out/stories}
mkdir -p "$out"
out=$(realpath "$out")
source "$(dirname "$0")/setup.sh" requirements.txt
dtype=float32  # bfloat16 is faster where the processor supports it natively
if grep -qsw avx512_bf16 /proc/cpuinfo; then dtype=bfloat16; fi
settings=(--resume --device cpu --dtype "$dtype" --keep-last 2)

python pretrain_data/text_to_shards.py "$stories" --out-dir "$out/data"

# Requests: each asks for the two things that its story mentions most. The last 1,000 are prompts for
# the policy.
python - "$stories" "$out" << 'END'
import collections, json, pathlib, random, re, sys
import pyarrow.parquet as pq
THINGS = set("""ball bear bed bench bird boat book box branch bug bunny bus butterfly cake car castle
    cat chair cookie cow dog doll door dragon duck farm fish flower forest fox friend frog garden
    gift hat hill horse house king kitchen kite lake lion monkey mouse park party pig pond prince
    princess puppy queen rabbit river robot rock room school shoe squirrel star store swing table
    tower toy train tree truck turtle wolf""".split())
rows = []
for story in filter(None, pq.read_table(sys.argv[1], columns=["text"])["text"].to_pylist()):
    words = collections.Counter(re.findall("[a-z]+", story))
    things = [word for word, _ in words.most_common() if word in THINGS]
    if 50 <= len(story.split()) <= 160 and len(things) >= 2:
        request = "Write a story about a {} and a {}.".format(*things)
        rows.append({"instruction": request, "output": story})
if len(rows) < 5000:
    sys.exit(f"{sys.argv[1]} has {len(rows):,} stories of 50 to 160 words with two things to ask "
             "for, expected at least 5,000")
random.Random(0).shuffle(rows)
for name, some in (("requests", rows[:-1000]), ("prompts", rows[-1000:])):
    (pathlib.Path(sys.argv[2]) / f"{name}.json").write_text(json.dumps(some), encoding="utf-8")
END

python trainer.py "${settings[@]}" --data-dir "$out/data" --out-dir "$out/pretrain" \
  --n-layer 8 --n-head 4 --n-embd 256 --block-size 256 --sequence-length 256 \
  --micro-batch-size 8 --total-batch-size 4096 --max-steps 2600 --warmup-steps 50 \
  --optimizer muon --muon-lr 0.015 --max-lr 0.02 --min-lr 0 --schedule linear --zero-init \
  --eval-interval 250 --eval-tokens 65536 --save-interval 250 \
  --sample-prompt "Once upon a time" --sample-tokens 100
python finetune.py "${settings[@]}" --checkpoint "$out/pretrain" --data "$out/requests.json" \
  --out-dir "$out/finetune" --template question --epochs 1 --batch-size 32 --eval-interval 25 \
  --sample-tokens 100

cat > "$out/rewards.py" << 'END'
import re


def short_tale(row, story):
    """Half a point for 60 to 150 words, a quarter for each of the two things asked for."""
    things = re.findall(r"\ba (\w+)", row["instruction"].removeprefix("Write a story"))
    words = set(re.findall("[a-z]+", story.casefold()))
    return 0.5 * (60 <= len(story.split()) <= 150) + 0.25 * len(words.intersection(things))
END
python rlhf.py "${settings[@]}" --checkpoint "$out/finetune" --prompts "$out/prompts.json" \
  --out-dir "$out/rlhf" --advantage group --reward "$out/rewards.py:short_tale" --max-tokens 200 \
  --batch-size 64 --kl-coef 0.05 --max-lr 7e-5 --max-steps 45 --eval-interval 15 --epochs 1 \
  --val-fraction 0.1
python judge.py "$out/finetune" "$out/rlhf" --data "$out/prompts.json" --out-dir "$out/judge" \
  --device cpu --proxy "$out/rewards.py:short_tale" --max-tokens 200 --samples 4 --best-of 4 \
  --val-fraction 0.1

# Five stories of each model. The base model gets a beginning, since it continues text.
for model in pretrain finetune rlhf; do
  form="Write a story about a %s and a %s.\n"
  if [[ $model == pretrain ]]; then form="Once upon a time, there was a %s who had a %s.\n"; fi
  echo "== $model"
  printf "$form" fox kite mouse boat cat cookie bunny cake frog party | python inference.py \
    --checkpoint "$out/$model" --device cpu --temperature 0.8 --seed 0 --max-tokens 200 \
    | tee "$out/$model.txt"
done
