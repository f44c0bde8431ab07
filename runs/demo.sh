#!/usr/bin/env bash
# A small GPT-2 from corpus to answers on a CPU, in about ten minutes on two cores:
# corpus -> pre-training -> loss graph -> instruction tuning -> loss graph -> answers.
#   bash runs/demo.sh [--rlhf] [output folder; default: a new one under out/]
# --rlhf adds policy optimization, a few minutes more. If interrupted, the same command with the
# same folder resumes.
set -euo pipefail
rlhf=
if [[ ${1:-} == --rlhf ]]; then rlhf=1; shift; fi
out=${1:-out/demo-$(date +%Y%m%d-%H%M%S)}
[[ -z ${1:-} || $out == /* ]] || out=$PWD/$out  # relative to the caller's folder
source "$(dirname "$0")/setup.sh" requirements.txt
start=$SECONDS
step() { echo; echo "== [$((SECONDS - start)) s] $1"; }

dtype=float32  # bfloat16 is faster where the processor supports it natively
if grep -qsw avx512_bf16 /proc/cpuinfo; then dtype=bfloat16; fi

step "1/5 a corpus: the documentation of Python, NumPy and PyTorch on this machine"
python pretrain_data/pydocs_corpus.py --out-dir "$out/corpus" --shard-tokens 32768

step "2/5 pre-training, 5.5M parameters ($dtype)"
python trainer.py --resume --data-dir "$out/corpus" --out-dir "$out/pretrain" --device cpu \
  --dtype "$dtype" \
  --n-layer 6 --n-head 4 --n-embd 96 --block-size 256 --sequence-length 256 \
  --micro-batch-size 4 --total-batch-size 1024 --max-steps 700 --warmup-steps 30 \
  --max-lr 4e-3 --min-lr 4e-4 --eval-interval 175 --save-interval 350 \
  --sample-prompt "Return a new array" --loss-graph "$out/pretrain_loss.png"

step "3/5 questions about that documentation, in Alpaca's format"
python finetune_data/pydocs_questions.py --out "$out/questions.json" --rows 4000

step "4/5 instruction tuning, 2 epochs"
python finetune.py --resume --checkpoint "$out/pretrain" --data "$out/questions.json" \
  --out-dir "$out/finetune" --device cpu --dtype "$dtype" --batch-size 16 --micro-batch-size 16 \
  --max-lr 2e-3 --eval-interval 120 --loss-graph "$out/finetune_loss.png"

step "5/5 answers"
python inference.py --checkpoint "$out/finetune" --device cpu --temperature 0.3 --max-steps 60 \
  "What does the Python function json.dumps do?" \
  "What does the Python function email.message.Message.get_payload do?" \
  "What does the Python function numpy.linalg.norm do?" \
  "What is the Python class torch.nn.modules.linear.Linear?" \
  "What is the Python class threading.Thread?" \
  "What is the Python module random for?"

if [[ $rlhf ]]; then
  step "policy optimization: a reward of 1 for an answer of at most 7 words"
  python rlhf.py --resume --checkpoint "$out/finetune" --prompts "$out/questions.json" \
    --out-dir "$out/rlhf" --device cpu --advantage group --reward function:at_most_words=7 \
    --kl-coef 0.3 --steps 60 --batch-size 64 --max-response 48 --max-lr 2e-4 --eval-interval 15
  python image/plot_frontier.py "$out/rlhf" --out "$out/rlhf.png"
  python inference.py --checkpoint "$out/rlhf" --device cpu --temperature 0.3 --max-steps 60 \
    "What does the Python function json.dumps do?" "What is the Python class threading.Thread?"
fi

step "done: $out"
echo "loss graphs: $out/pretrain_loss.png and $out/finetune_loss.png"
echo "ask more:    $(command -v python) chat.py --checkpoint $out/finetune"
