"""Measurements, each of A against B in turn inside one run: medians, ratios, and what was equal.

    python bench.py train data decode eval --quick         # whether they run: 2.5 minutes
    python bench.py train --log image/logs/bench_train.jsonl
    python bench.py data --files 'dir/*.parquet' --log image/logs/bench_data.jsonl
    python bench.py recipes --data-dir DIR --log image/logs/bench_recipes.jsonl    # two hours
    python bench.py gpu --log image/logs/bench_gpu.jsonl   # all of it on one GPU: nine minutes

`train`: this trainer's step against the textbook's and Hugging Face's model: speed, losses, memory;
what of a run is no training; the start. `data`: tokenizing (from files to shards, against bare
loops of tiktoken over the same documents) and the loader; `encoders`, `tokenize` and `loader` are
parts of it. `decode` and `eval`: sampling and validation against Hugging Face's. `recipes`: the
tokens that --recipe fast needs for what gpt2 reaches. `memory`: what every model size needs and
which micro-batches fit on which card, computed, beside what this machine measures. `checkpoint`:
how long training waits for one. Every figure is printed and, with --log, appended to a file as one
JSON object a line.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.data import bench_data
from bench.decode import bench_decode, bench_eval
from bench.gpu import bench_gpu
from bench.harness import BenchConfig, machine, record
from bench.memory import bench_checkpoint, bench_memory
from bench.recipes import bench_recipes
from bench.train import bench_train
from minigpt2.config import UserError, parse_config, run_main

DATA = ("data", "encoders", "tokenize", "loader")


def main() -> None:
    config = parse_config(BenchConfig, description=__doc__)
    sections = {"train": bench_train, **dict.fromkeys(DATA, bench_data), "decode": bench_decode,
                "eval": bench_eval, "recipes": bench_recipes, "memory": bench_memory,
                "checkpoint": bench_checkpoint, "gpu": bench_gpu}
    unknown = [name for name in config.what if name not in sections]
    if unknown or not config.what:
        raise UserError(f"asked to measure {' '.join(unknown) or 'nothing'}, expected some of "
                        + ", ".join(sections))
    record(config, "machine", **machine())
    for section in dict.fromkeys(sections[name] for name in config.what):
        section(config)


if __name__ == "__main__":
    run_main(main)
