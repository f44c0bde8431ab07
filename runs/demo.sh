#!/usr/bin/env bash
# A small GPT-2 from corpus to answers on a CPU, in 10 to 20 minutes on two cores:
# corpus -> pre-training -> loss graph -> instruction tuning -> loss graph -> answers.
#   bash runs/demo.sh [--rlhf] [output folder; default: a new one under out/]
# --rlhf adds policy optimization, a few minutes more. If interrupted, the same command with the
# same folder resumes.
set -euo pipefail
rlhf=
if [[ ${1:-} == --rlhf ]]; then rlhf=1; shift; fi
if [[ $# -gt 1 || ${1:-} == -* ]]; then
  echo "usage: bash runs/demo.sh [--rlhf] [folder]" >&2
  exit 2
fi
out=${1:-out/demo-$(date +%Y%m%d-%H%M%S)}
[[ -z ${1:-} || $out == /* ]] || out=$PWD/$out  # relative to the caller's folder
source "$(dirname "$0")/setup.sh" requirements.txt
start=$SECONDS
echo "results: $out; to resume an interrupted run: bash runs/demo.sh ${rlhf:+--rlhf }$(printf %q "$out")"
step() { echo; echo "== [$((SECONDS - start)) s] $1"; }

# bfloat16 is faster where the processor supports it natively: there, more steps fit into the time
dtype=${DTYPE:-float32} steps=280
if [[ -z ${DTYPE:-} ]] && grep -qsw avx512_bf16 /proc/cpuinfo; then dtype=bfloat16; fi
if [[ $dtype == bfloat16 ]]; then steps=640; fi

step "1/5 a corpus: the documentation of Python, NumPy and PyTorch on this machine"
python pretrain_data/pydocs_corpus.py --out-dir "$out/corpus" --shard-tokens 32768

step "2/5 pre-training: 16M parameters, $steps steps of 2,048 tokens ($dtype)"
python trainer.py --resume --data-dir "$out/corpus" --out-dir "$out/pretrain" --device cpu \
  --dtype "$dtype" \
  --n-layer 4 --n-head 4 --n-embd 256 --block-size 256 --sequence-length 256 \
  --micro-batch-size 8 --total-batch-size 2048 --max-steps "$steps" --warmup-steps 20 \
  --optimizer muon --muon-lr 0.02 --max-lr 0.025 --min-lr 0 --schedule linear --zero-init \
  --eval-interval $((steps / 4)) --save-interval $((steps / 4)) --keep-last 1 \
  --sample-prompt "Return a new array"

step "3/5 questions about the 300 best-known names of the standard library, in five wordings"
python finetune_data/pydocs_questions.py --out "$out/questions.json" --names 300

step "4/5 instruction tuning, 5 epochs: enough to know the answers by heart"
python finetune.py --resume --checkpoint "$out/pretrain" --data "$out/questions.json" \
  --out-dir "$out/finetune" --device cpu --dtype "$dtype" --epochs 5 --batch-size 16 \
  --micro-batch-size 16 --max-lr 4e-3 --eval-interval 80 --keep-last 1

step "5/5 answers: ten questions that it was trained on, three about names it was not"
cat > "$out/asked.txt" << 'END'
What does the Python function json.dumps do?
What does the Python function os.walk do?
What does the Python function copy.deepcopy do?
What does the Python function functools.lru_cache do?
What does the Python function glob.glob do?
What is the Python class collections.Counter?
What is the Python class subprocess.Popen?
What is the Python class threading.Thread?
What is the Python module zipfile for?
What is the Python module pickle for?
What does the Python function random.shuffle do?
What does the Python function shutil.copytree do?
What does the Python function numpy.linalg.norm do?
END
python inference.py --checkpoint "$out/finetune" --device cpu --temperature 0 --max-tokens 60 \
  --batch-size 13 --json < "$out/asked.txt" > "$out/answers.jsonl"
python - "$out" << 'END'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
rows = json.loads((out / "questions.json").read_text(encoding="utf-8"))
known, right = {row["instruction"]: row["output"] for row in rows}, 0
for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines():
    one = json.loads(line)
    expected = known.get(one["prompt"])
    mark = "not trained" if expected is None else "right" if one["response"] == expected else "wrong"
    right += mark == "right"
    print(f"{one['prompt']}\n    {one['response']}  [{mark}]")
print(f"{right} of {sum(one in known for one in (out / 'asked.txt').read_text().splitlines())} "
      "answers from the training rows are right")
END

if [[ $rlhf ]]; then
  step "--rlhf, about 6 minutes: policy optimization, a reward of 1 for at most 7 words"
  python rlhf.py --resume --checkpoint "$out/finetune" --prompts "$out/questions.json" \
    --out-dir "$out/rlhf" --device cpu --advantage group --reward function:at_most_words=7 \
    --kl-coef 0.3 --max-steps 60 --batch-size 64 --max-tokens 48 --max-lr 2e-4 --eval-interval 15
  python image/plot_frontier.py "$out/rlhf" --out "$out/rlhf.png"
  echo "(success: the share of answers that get the reward, before and after; docs/alignment.md)"
  echo "answers of the aligned model:"
  python inference.py --checkpoint "$out/rlhf" --device cpu --temperature 0.3 --max-tokens 60 \
    "What does the Python function json.dumps do?" "What is the Python class threading.Thread?"
fi

step "done: $out"
echo "loss graphs:  $out/pretrain/pretrain_loss.png and $out/finetune/finetune_loss.png"
echo "ask more:     $(command -v python) chat.py --checkpoint $out/finetune --temperature 0"
echo "base model:   $(command -v python) inference.py --checkpoint $out/pretrain \"Return a new\""
if [[ $rlhf ]]; then
  echo "aligned:      $(command -v python) chat.py --checkpoint $out/rlhf; figure: $out/rlhf.png"
fi
echo "your text:    docs/data.md; your questions: docs/training.md; rewards: docs/alignment.md"
