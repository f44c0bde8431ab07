"""Instruction tuning: finetune.py against the same rows in Hugging Face's loop.

    python bench/finetune.py --data finetune_data/alpaca.json --quick    # half a minute
    python bench/finetune.py --data finetune_data/alpaca.json --log image/logs/bench_finetune.jsonl

Hugging Face's loop takes the rows in a random order, pads micro-batches on the right to the longest
row, and divides by the number of valid tokens of a step. Tokens are those of the rows, without
padding. Losses are compared in steps of all rows, which have no order.
"""

import functools
import json
import pathlib
import random
import sys
import tempfile
from dataclasses import dataclass
from statistics import median
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

OPTIMIZER = ADAMW | {"weight_decay": 0.0}
FLAGS = {"max_lr": OPTIMIZER["lr"], "min_lr": OPTIMIZER["lr"], "warmup_fraction": 0,
         "weight_decay": 0, "val_fraction": 0, "device": "cpu"}  # a constant learning rate
LOSS_STEPS = 3


@dataclass(frozen=True)
class FinetuneBenchConfig(BenchConfig):
    data: str | None = flag(None, "rows of instruction, input and output", is_path=True)
    model: Literal["tiny", "30M", "124M"] = flag("124M", "model size")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "autocast dtype")
    rows: int = flag(128, "rows of an epoch", minimum=2)
    batch_size: int = flag(64, "rows per step", minimum=1)
    micro_batch_size: int = flag(16, "rows per micro-step", minimum=1)
    repeats: int = flag(3, "timed epochs", minimum=1)


Example = tuple[torch.Tensor, torch.Tensor]  # ids and labels (T,) of a row
Result = tuple[float, list[float]]  # seconds of all steps, and the loss of each


def load_rows(config: FinetuneBenchConfig, count: int) -> list[dict]:
    """A random sample of the rows that have an answer and fit into the context."""
    if config.data is None:
        raise UserError("no rows to train on: give --data")
    rows = [{name: row.get(name) or "" for name in ("instruction", "input", "output")}
            for _, row in read_rows(pathlib.Path(config.data))]
    random.Random(0).shuffle(rows)
    fitting = [row for row in rows if row["output"].strip()
               and sum(map(len, encode_example(**row))) <= SIZES[config.model].block_size]
    return fitting[:count]


def make_finetuning(way: str, folder: pathlib.Path, rows: list[dict], epochs: int, batch_size: int,
                    micro_batch_size: int, dtype: str) -> functools.partial:
    """Trains the checkpoint in `folder` on the rows; returns a Result."""
    settings = {"epochs": epochs, "batch_size": batch_size, "micro_batch_size": micro_batch_size}
    if way == "ours":
        return functools.partial(run_finetune, folder, rows, settings | {"dtype": dtype})
    trained, _, _ = split_rows([(row["instruction"], row["input"]) for row in rows], 0)
    pairs = [[*map(torch.tensor, encode_example(**rows[i]))] for i in trained]
    examples = [(torch.cat([prompt, response]),
                 torch.cat([torch.full_like(prompt, IGNORE_INDEX), response]))
                for prompt, response in pairs]
    return functools.partial(run_hugging_face, folder, examples, **settings,
                             dtype=getattr(torch, dtype))


def run_finetune(folder: pathlib.Path, rows: list[dict], settings: dict) -> Result:
    """finetune.py itself, by its log: without start-up, validation and checkpoints."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data, out_dir = pathlib.Path(name) / "rows.json", pathlib.Path(name) / "out"
        data.write_text(json.dumps(rows), encoding="utf-8")
        run_script("finetune.py", FLAGS | settings | {"checkpoint": folder, "data": data,
                                                      "out_dir": out_dir})
        log = read_log(out_dir / "metrics.jsonl")
    end, = log["end"].values()
    return end["seconds"] - end["overhead_s"], [one["loss"] for one in log["train"].values()]


def run_hugging_face(folder: pathlib.Path, examples: list[Example], epochs: int, batch_size: int,
                     micro_batch_size: int, dtype: torch.dtype) -> Result:
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder).train()  # the checkpoint sets no dropout
    optimizer, losses = torch.optim.AdamW(model.parameters(), **OPTIMIZER), []

    def train() -> None:
        for batch in (batch for _ in range(epochs)
                      for batch in torch.randperm(len(examples)).split(batch_size)):
            rows, loss_sum = [examples[i] for i in batch], 0.0
            valid = sum((labels[1:] != IGNORE_INDEX).sum() for _, labels in rows)
            for first in range(0, len(rows), micro_batch_size):
                ids, labels = zip(*rows[first : first + micro_batch_size], strict=True)
                inputs = {"input_ids": pad_sequence(ids, True), "attention_mask": pad_sequence(
                    [torch.ones_like(row) for row in ids], True)}  # (B, T) each
                with autocast(torch.device("cpu"), dtype):
                    loss = model(**inputs, labels=pad_sequence(labels, True, IGNORE_INDEX),
                                 num_items_in_batch=valid, use_cache=False).loss
                loss.backward()
                loss_sum += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss_sum)
    return seconds(train), losses


def bench_finetune(config: FinetuneBenchConfig) -> None:
    name, count = ("tiny", 24) if config.quick else (config.model, config.rows)
    rows = load_rows(config, count)
    B, micro_B = (min(size, count // 3) for size in (config.batch_size, config.micro_batch_size))
    tokens = sum(len(ids) for row in rows for ids in encode_example(**row))
    with tempfile.TemporaryDirectory() as root:
        folder = save_checkpoint(pathlib.Path(root), 0, GPT(SIZES[name]))
        same = compare(("ours", "hugging_face"), 1, make_finetuning, folder, rows[: 2 * micro_B],
                       LOSS_STEPS, count, micro_B, config.dtype)
        epochs = compare(("ours", "hugging_face"), config.rounds + 1, make_finetuning, folder, rows,
                         1, B, micro_B, config.dtype)
    losses = [timing.results[0][1] for timing in same.values()]
    ours, other = (median(taken for taken, _ in timing.results[1:]) for timing in epochs.values())
    record(config, "fine-tuning", model=name, dtype=config.dtype, rows=len(rows), tokens=tokens,
           batch_size=B, micro_batch_size=micro_B, threads=torch.get_num_threads(),
           ours_tokens_per_sec=tokens / ours, hugging_face_tokens_per_sec=tokens / other,
           ratio=other / ours, losses=losses[0], loss_differs=max(
               abs(a - b) / b for a, b in zip(*losses, strict=True)))


if __name__ == "__main__":
    run_bench(bench_finetune, FinetuneBenchConfig, __doc__)
