"""Instruction tuning: finetune.py against the same rows in Hugging Face's loop, in turn.

    python bench/finetune.py --data finetune_data/alpaca.json --quick
    python bench/finetune.py --data finetune_data/alpaca.json --log image/logs/bench_finetune.jsonl

Hugging Face's loop takes the rows in a random order, pads micro-batches on the right to the longest
row, and divides by the valid tokens of the whole step. Tokens are those of the rows, not padding.
"""

import functools
import itertools
import json
import pathlib
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, compare, record, run_bench, run_script, seconds
from bench.train import ADAMW, SIZES
from dataloader import read_rows, split_rows
from minigpt2.checkpoint import save_checkpoint
from minigpt2.config import UserError, flag
from minigpt2.distributed import autocast
from minigpt2.loss import IGNORE_INDEX
from minigpt2.metrics import read_log
from minigpt2.tokenizer import encode_example
from model import GPT

LR, LOSS_STEPS = ADAMW["lr"], 3
FLAGS = {"max_lr": LR, "min_lr": LR, "warmup_fraction": 0, "weight_decay": 0, "val_fraction": 0,
         "device": "cpu"}


@dataclass(frozen=True)
class FinetuneBenchConfig(BenchConfig):
    data: str | None = flag(None, "rows of instruction, input and output", is_path=True)
    model: Literal["tiny", "30M", "124M"] = flag("124M", "model size (with --quick: tiny)")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "autocast dtype")
    rows: int = flag(128, "rows of an epoch (with --quick: 24)", minimum=8)
    batch_size: int = flag(64, "rows per step", minimum=1)
    micro_batch_size: int = flag(16, "rows per micro-step", minimum=1)
    repeats: int = flag(3, "timed epochs", minimum=1)


def load_rows(path: str | None, count: int, block_size: int) -> list[dict]:
    """A random sample of the rows that have an answer and fit into the context."""
    if path is None:
        raise UserError("no rows to train on: give --data")
    rows = [{name: row.get(name) or "" for name in ("instruction", "input", "output")}
            for _, row in read_rows(pathlib.Path(path))]
    random.Random(0).shuffle(rows)
    fitting = (row for row in rows if row["output"].strip() and num_tokens(row) <= block_size)
    return list(itertools.islice(fitting, count))


def num_tokens(row: dict) -> int:
    return sum(map(len, encode_example(**row)))


def make_finetuning(way: str, folder: pathlib.Path, rows: list[dict], epochs: int, batch_size: int,
                    micro_batch_size: int, dtype: str) -> functools.partial:
    """Trains the checkpoint in `folder`; returns the seconds of all steps, and the loss of each."""
    sizes = {"epochs": epochs, "batch_size": batch_size, "micro_batch_size": micro_batch_size}
    if way == "ours":
        return functools.partial(run_finetune, folder, rows, FLAGS | sizes | {"dtype": dtype})
    trained, _, _ = split_rows([(row["instruction"], row["input"]) for row in rows], 0)
    examples = []  # ids and labels (T,) of each row
    for prompt, response in (encode_example(**rows[i]) for i in trained):
        labels = [IGNORE_INDEX] * len(prompt) + response
        examples.append((torch.tensor(prompt + response), torch.tensor(labels)))
    return functools.partial(run_hugging_face, folder, examples, **sizes,
                             dtype=getattr(torch, dtype))


def run_finetune(folder: pathlib.Path, rows: list[dict], flags: dict) -> tuple[float, list[float]]:
    """finetune.py itself. Its log leaves out start-up, validation and checkpoints."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data, out_dir = pathlib.Path(name) / "rows.json", pathlib.Path(name) / "out"
        data.write_text(json.dumps(rows), encoding="utf-8")
        run_script("finetune.py", flags | {"checkpoint": folder, "data": data, "out_dir": out_dir})
        log = read_log(out_dir / "metrics.jsonl")
    end, = log["end"].values()
    return end["seconds"] - end["overhead_s"], [one["loss"] for one in log["train"].values()]


def run_hugging_face(folder: pathlib.Path, examples: list[tuple[torch.Tensor, torch.Tensor]],
                     epochs: int, batch_size: int, micro_batch_size: int,
                     dtype: torch.dtype) -> tuple[float, list[float]]:
    from transformers import GPT2LMHeadModel
    model, losses = GPT2LMHeadModel.from_pretrained(folder).train(), []  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW | {"weight_decay": 0.0})

    def train() -> None:
        for batch in (batch for _ in range(epochs)
                      for batch in torch.randperm(len(examples)).split(batch_size)):
            num_valid_tokens = sum((examples[i][1] != IGNORE_INDEX).sum() for i in batch)
            loss_sum = 0.0
            for part in batch.split(micro_batch_size):
                ids, labels = zip(*(examples[i] for i in part), strict=True)
                inputs = pad_sequence(ids, batch_first=True)  # (B, T), like masks and labels
                masks = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
                labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
                with autocast(inputs.device, dtype):
                    loss = model(inputs, attention_mask=masks, labels=labels, use_cache=False,
                                 num_items_in_batch=num_valid_tokens).loss
                loss.backward()
                loss_sum += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_sum)
    return seconds(train), losses


def bench_finetune(config: FinetuneBenchConfig) -> None:
    """An epoch at a time; first, losses of steps of equal rows, which are steps of all rows."""
    name, count, B = (("tiny", 24, 8) if config.quick else
                      (config.model, config.rows, config.batch_size))
    rows = load_rows(config.data, count, SIZES[name].block_size)
    tokens, micro_B = sum(map(num_tokens, rows)), min(B, config.micro_batch_size)
    with tempfile.TemporaryDirectory() as root:
        folder = save_checkpoint(pathlib.Path(root), 0, GPT(SIZES[name]))
        same, epoch = (compare(("ours", "hugging_face"), steps, make_finetuning, folder, *setting,
                               micro_B, config.dtype)
                       for steps, setting in ((1, (rows[: 2 * micro_B], LOSS_STEPS, count)),
                                              (config.rounds + 1, (rows, 1, B))))
    ours, other = (statistics.median(taken for taken, _ in timing.results[1:])
                   for timing in epoch.values())
    losses = [timing.results[0][1] for timing in same.values()]
    record(config, "fine-tuning", model=name, dtype=config.dtype, rows=len(rows), tokens=tokens,
           batch_size=B, micro_batch_size=micro_B, threads=torch.get_num_threads(),
           ours_tokens_per_sec=tokens / ours, hugging_face_tokens_per_sec=tokens / other,
           ratio=other / ours, losses=losses[0],
           loss_differs=max(abs(a - b) / b for a, b in zip(*losses, strict=True)))


if __name__ == "__main__":
    run_bench(bench_finetune, FinetuneBenchConfig, __doc__)
