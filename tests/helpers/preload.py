"""What the fork server loads once: the scripts, and what they import and cache later on."""

import gc
import tempfile
from pathlib import Path

import torch._dynamo  # noqa: F401

from helpers import ranks  # noqa: F401
from minigpt2.metrics import draw_runs

with tempfile.TemporaryDirectory() as folder:  # the first graph loads matplotlib and its fonts
    log = Path(folder) / "metrics.jsonl"
    log.write_text('{"step": 0, "kind": "train", "loss": 1.0, "lr": 1.0, "grad_norm": 1.0}\n')
    draw_runs([("", log)], Path(folder) / "graph.png", "Loss")
gc.freeze()  # else every fork copies the heap at its first garbage collection
