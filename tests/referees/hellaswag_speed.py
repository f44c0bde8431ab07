"""Rows of HellaSwag per second: our scoring against lm-evaluation-harness, in turn, in float32.

    python tests/referees/hellaswag_speed.py --file hellaswag_val.parquet --quick
    python tests/referees/hellaswag_speed.py --file hellaswag_val.parquet --checkpoint gpt2

A step reads nothing but rows that are in memory or in the harness's cache, and ends with the
accuracies, which are compared. The harness's batches have a fixed size: its "auto" begins at 512
rows, which no CPU has the memory for. Without --checkpoint, the model has random weights.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness import BenchConfig, Step, compare, record, run_bench
from bench.train import SIZES
from dataloader import read_rows
from minigpt2.benchmarks import choice_figures, make_questions, multiple_choice, score
from minigpt2.checkpoint import find_checkpoint, load_model, save_checkpoint
from minigpt2.config import UserError, flag
from minigpt2.distributed import start
from model import GPT


@dataclass(frozen=True)
class SpeedConfig(BenchConfig):
    file: str | None = flag(None, "HellaSwag as JSON Lines or parquet", is_path=True)
    checkpoint: str | None = flag(None, "folder or hub name", is_path=True)
    model: str = flag("124M", f"size of a random model: {', '.join(SIZES)}")
    rows: int = flag(100, "the first rows of the file", minimum=1)
    repeats: int = flag(3, "timed repetitions", minimum=1)
    harness_batch_size: int = flag(16, "rows per batch of the harness", minimum=1)


def make_scoring(way: str, checkpoint: Path, path: Path, batch_size: int, max_length: int) -> Step:
    """Evaluates the file; returns the accuracy of the summed log-probabilities."""
    if way == "lm_eval":
        from harness_tasks import load_harness
        evaluate = load_harness(checkpoint, "hellaswag", path, batch_size=batch_size,
                                max_length=max_length)
        return lambda: evaluate()["results"]["hellaswag"]["acc,none"]
    launch, model = start("cpu"), load_model(checkpoint)

    def step() -> float:
        questions = make_questions(path, read_rows(path), multiple_choice, max_length)
        pairs = [pair for question in questions for pair in question.pairs]
        scores = score(model, pairs, launch, torch.float32)
        return choice_figures(questions, scores)["accuracy_summed"]
    return step


def measure_hellaswag(config: SpeedConfig) -> None:
    if config.file is None:
        raise UserError("no rows given: --file eval_data/hellaswag_val.parquet")
    os.environ["HF_HUB_OFFLINE"] = "1"  # for the worker processes
    name = "tiny" if config.quick else config.model
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = (find_checkpoint(config.checkpoint) if config.checkpoint else
                      save_checkpoint(Path(folder), 0, GPT(SIZES[name])))
        path, count = Path(folder) / "rows.jsonl", 8 if config.quick else config.rows
        rows = [row for _, row in read_rows(Path(config.file))][:count]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        timings = compare(("ours", "lm_eval"), config.rounds + 1, make_scoring, checkpoint, path,
                          config.harness_batch_size, 1024)
    ours, theirs = timings.values()
    record(config, "hellaswag", model=config.checkpoint or name, rows=len(rows),
           harness_batch_size=config.harness_batch_size, threads=torch.get_num_threads(),
           ours_rows_per_sec=len(rows) / ours.seconds,
           lm_eval_rows_per_sec=len(rows) / theirs.seconds, ratio=theirs.seconds / ours.seconds,
           ours_accuracy=ours.results[0], lm_eval_accuracy=theirs.results[0],
           ours_bytes=ours.peak, lm_eval_bytes=theirs.peak)


if __name__ == "__main__":
    run_bench(measure_hellaswag, SpeedConfig, __doc__)
