"""Instruction tuning: finetune.py against the same rows in Hugging Face's loop, in turn.

    python bench/finetune.py --data finetune_data/alpaca.json --quick
    python bench/finetune.py --data finetune_data/alpaca.json --log image/logs/bench_finetune.jsonl

Hugging Face's loop takes rows in random order and pads micro-batches to the longest row. Tokens are
those of the rows, without padding.
"""

import json
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, compare, record, run_bench, run_script
from bench.train import ADAMW, SIZES
from dataloader import make_examples, read_rows, split_rows, text_turns, token_ids
from minigpt2.checkpoint import read_config, save_checkpoint
from minigpt2.config import UserError, flag
from minigpt2.distributed import autocast
from minigpt2.loss import IGNORE_INDEX
from minigpt2.metrics import read_log
from model import GPT

Result = tuple[float, list[float]]  # seconds of all steps, and the loss of each
WAYS = ("ours", "hugging_face")
BATCH_SIZE, MICRO_BATCH_SIZE, LOSS_STEPS = 64, 16, 3  # the first two as finetune.py's for many rows
FLAGS = {"max_lr": ADAMW["lr"], "min_lr": ADAMW["lr"], "warmup_fraction": 0, "weight_decay": 0,
         "val_fraction": 0, "device": "cpu"}  # as in Hugging Face's loop below


@dataclass(frozen=True)
class FinetuneBenchConfig(BenchConfig):
    data: str | None = flag(None, "rows, as finetune.py reads them", is_path=True)
    model: Literal["tiny", "30M", "124M"] = flag("124M", "model size (with --quick: tiny)")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "autocast dtype")
    rows: int = flag(128, "rows, a random sample (with --quick: 24)", minimum=8)


def load_rows(path: str | None, count: int) -> list:
    """A random sample of the rows of a file."""
    if path is None:
        raise UserError("no rows to train on: give --data")
    rows = read_rows(pathlib.Path(path))
    return random.Random(0).sample(rows, min(count, len(rows)))


def trained_rows(rows: list, block_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels (T,) of the rows that finetune.py trains on: not those that it leaves out or
    holds out."""
    keys, examples, _ = make_examples([text_turns(row, place) for place, row in rows], block_size)
    trained, _, _ = split_rows(examples, keys, 0)
    labels = [[label for prompt, response in example
               for label in [IGNORE_INDEX] * len(prompt) + response] for example in trained]
    return [(torch.tensor(token_ids(example)), torch.tensor(row))
            for example, row in zip(trained, labels, strict=True)]


def make_finetuning(way: str, folder: pathlib.Path, rows: list, dtype: str, epochs: int,
                    batch_size: int, micro_batch_size: int) -> Callable[[], Result]:
    """Trains the checkpoint in `folder` on the rows. finetune.py runs as it is; its log leaves out
    start-up, validation and checkpoints."""
    def finetune() -> Result:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            path, out_dir = pathlib.Path(name) / "rows.json", pathlib.Path(name) / "out"
            path.write_text(json.dumps([row for _, row in rows]), encoding="utf-8")
            run_script("finetune.py", FLAGS | {
                "checkpoint": folder, "data": path, "out_dir": out_dir, "dtype": dtype,
                "epochs": epochs, "batch_size": batch_size, "micro_batch_size": micro_batch_size})
            log = read_log(out_dir / "metrics.jsonl")
        end, = log["end"].values()
        return end["seconds"] - end["overhead_s"], [one["loss"] for one in log["train"].values()]

    if way == "ours":
        return finetune
    examples = trained_rows(rows, read_config(folder).block_size)
    return lambda: run_hugging_face(folder, examples, getattr(torch, dtype), epochs, batch_size,
                                    micro_batch_size)


def run_hugging_face(folder: pathlib.Path, examples: list, dtype: torch.dtype, epochs: int,
                     batch_size: int, micro_batch_size: int) -> Result:
    from transformers import GPT2LMHeadModel
    model, losses = GPT2LMHeadModel.from_pretrained(folder).train(), []  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW | {"weight_decay": 0.0})
    t0 = time.perf_counter()
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
    return time.perf_counter() - t0, losses


def bench_finetune(config: FinetuneBenchConfig) -> None:
    name, count, batch_size, rounds = (("tiny", 24, 8, 1) if config.quick else
                                       (config.model, config.rows, BATCH_SIZE, config.rounds))
    rows, micro_B = load_rows(config.data, count), min(batch_size, MICRO_BATCH_SIZE)
    lengths = [len(ids) for ids, _ in trained_rows(rows, SIZES[name].block_size)]
    tokens = sum(lengths)
    with tempfile.TemporaryDirectory() as root:
        common = make_finetuning, save_checkpoint(pathlib.Path(root), 0, GPT(SIZES[name]))
        some = rows[: 2 * micro_B]  # steps of all rows: equal rows in both, in whichever order
        losses = [timing.results[0][1] for timing in compare(
            WAYS, 1, *common, some, config.dtype, LOSS_STEPS, len(some), micro_B).values()]
        timings = compare(WAYS, rounds + 1, *common, rows, config.dtype, 1, batch_size, micro_B)
    ours, other = (statistics.median(seconds for seconds, _ in timing.results[1:])
                   for timing in timings.values())
    record(config, "fine-tuning", model=name, dtype=config.dtype, rows=len(lengths), tokens=tokens,
           batch_size=batch_size, micro_batch_size=micro_B, threads=torch.get_num_threads(),
           ours_tokens_per_sec=tokens / ours, hugging_face_tokens_per_sec=tokens / other,
           ratio=other / ours, losses=losses[0],
           loss_differs=max(abs(a - b) / b for a, b in zip(*losses, strict=True)))


if __name__ == "__main__":
    run_bench(bench_finetune, FinetuneBenchConfig, __doc__)
