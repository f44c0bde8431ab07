"""Instruction tuning: an epoch of finetune.py against the same rows in Hugging Face's loop.

    python bench/finetune.py --quick                                       # half a minute
    python bench/finetune.py --data finetune_data/alpaca.json --log image/logs/bench_finetune.jsonl

Both run in processes of their own, in turn. Hugging Face's loop takes the rows in a random order,
pads micro-batches on the right to their longest row, and divides by the number of valid tokens of a
step. Tokens are those of the rows, without padding. Losses are compared in steps of all rows.
"""

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

from bench.harness import BenchConfig, Step, record, run_bench, run_script, run_step, start_worker
from bench.train import ADAMW, SIZES
from dataloader import read_rows, split_rows
from minigpt2.checkpoint import save_checkpoint
from minigpt2.config import UserError, flag
from minigpt2.distributed import autocast
from minigpt2.loss import IGNORE_INDEX
from minigpt2.metrics import read_log
from minigpt2.tokenizer import encode_example
from model import GPT

LOSS_EPOCHS, LR = 4, 5e-5
FLAGS = {"val_fraction": 0, "max_lr": LR, "min_lr": LR, "warmup_fraction": 0, "device": "cpu",
         "weight_decay": ADAMW["weight_decay"]}  # of finetune.py; a constant learning rate


@dataclass(frozen=True)
class FinetuneBenchConfig(BenchConfig):
    data: str | None = flag(None, "rows of instruction, input and output (default: made up)",
                            is_path=True)
    model: Literal["tiny", "30M", "124M"] = flag("124M", "size of the model")
    dtype: Literal["float32", "bfloat16"] = flag("float32", "autocast dtype")
    rows: int = flag(128, "rows of an epoch (with --quick: 24)", minimum=2)
    batch_size: int = flag(64, "rows per step", minimum=1)
    micro_batch_size: int = flag(16, "rows per micro-step", minimum=1)
    repeats: int = flag(3, "timed epochs", minimum=1)


def make_hugging_face(folder: pathlib.Path, rows: list[dict], batch_size: int,
                      micro_batch_size: int, epochs: int, dtype: torch.dtype) -> Step:
    """Trains for `epochs`; returns the losses of all steps."""
    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained(folder).train()  # without dropout
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW | {"lr": LR})
    examples = [[*map(torch.tensor, encode_example(**row))] for row in rows]

    def loss_of(micro_batch: list, num_valid_tokens: int) -> torch.Tensor:
        ids, masks, labels = (pad_sequence([*tensors], batch_first=True, padding_value=padding)
                              for tensors, padding in zip(zip(*(
                                  (ids := torch.cat(example), torch.ones_like(ids), torch.cat(
                                      [torch.full_like(example[0], IGNORE_INDEX), example[1]]))
                                  for example in micro_batch), strict=True),
                                  (0, 0, IGNORE_INDEX), strict=True))  # (B, T) each
        with autocast(ids.device, dtype):
            return model(ids, attention_mask=masks, labels=labels, use_cache=False,
                         num_items_in_batch=num_valid_tokens).loss
