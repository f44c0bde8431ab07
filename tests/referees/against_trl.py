"""What the benchmarks against TRL share: the folder of the model, rows of pairs, and runs in turn.

Ours and TRL's read the same weights and token ids, train in float32 with the same batches,
micro-batches and number of threads, and alternate, each in a process of its own. What counts is
the time of the training loop, without loading, validation and checkpoints. The first run of each
warms up; the others' medians are compared.
"""

import json
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import BenchConfig, compare, record
from dataloader import load_pairs
from minigpt2.checkpoint import find_checkpoint, load_model, save_checkpoint
from minigpt2.config import flag
from minigpt2.files import atomic_write
from minigpt2.metrics import read_log
from minigpt2.tokenizer import ALPACA, decode
from model import GPT, GPTConfig

MODEL, ROWS = "model", "rows.jsonl"  # in the folder that both read
SIZES = GPTConfig(block_size=512, n_layer=6, n_head=4, n_embd=256)  # 17.8M parameters
QUICK_SIZES = GPTConfig(block_size=512, n_layer=1, n_head=1, n_embd=16)
Trial = Callable[[], dict[str, float]]  # trains once; seconds, and what was counted


@dataclass(frozen=True)
class AgainstTRLConfig(BenchConfig):
    repeats: int = flag(3, "timed runs of each", minimum=1)
    checkpoint: str | None = flag(None, "checkpoint to train (default: 17.8M random parameters)")
    data: str | None = flag(None, "pairs (default: made up, as long as Alpaca's rows)")
    threads: int = flag(2, "threads of each process", minimum=1)


def made_rows(count: int) -> list[dict[str, str]]:
    """Prompts and responses with lengths like those of Alpaca's rows."""
    rng, words = random.Random(0), "the a river king dog ran slept cafe 1984 quickly".split()

    def text(median: float) -> str:
        length = round(min(median * rng.lognormvariate(0, 0.8), 250))
        return " ".join(rng.choices(words, k=1 + length))

    return [{"instruction": f"{i} {text(12)}", "chosen": f"{text(45)} {i}", "rejected": text(35)}
            for i in range(count)]


def write_folder(config: AgainstTRLConfig, folder: Path, count: int) -> GPT:
    """Writes the model, and the first `count` usable rows of --data, or made-up ones, as plain JSON
    Lines; returns the model."""
    torch.manual_seed(0)
    model = (load_model(config.checkpoint) if config.checkpoint else
             GPT(QUICK_SIZES if config.quick else SIZES))
    save_checkpoint(folder / MODEL, 1, model)
    rows = made_rows(count)
    if config.data:
        pairs, _ = load_pairs(config.data, "--data", model.config.block_size, ALPACA)
        rows = [{"instruction": pair.instruction, "input": pair.input,
                 "chosen": decode(pair.chosen[:-1]), "rejected": decode(pair.rejected[:-1])}
                for pair in pairs[:count]]
    with atomic_write(folder / ROWS, text=True) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return model


def our_trial(train: Callable[[str], object], folder: Path) -> tuple[dict[str, float], list[dict]]:
    """Trains into a folder of its own: the seconds of the loop, and the run log's training
    records."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        train(out)
        log = read_log(Path(out) / "metrics.jsonl")
    (end,) = log["end"].values()
    return {"seconds": end["seconds"] - end["overhead_s"]}, list(log["train"].values())


def trl_trial(trainer: type, settings: type, folder: Path, rows: list[dict], *,
              micro_batch_size: int, trainer_options: dict | None = None,
              **options) -> tuple[dict[str, float], list[dict]]:
    """The same with one of TRL's trainers, in float32, on a model that it reads from the folder,
    and without output."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    checkpoint = find_checkpoint(str(folder / MODEL))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        built = trainer(
            model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"),
            args=settings(out, use_cpu=True, bf16=False, gradient_checkpointing=False,
                          report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
                          learning_rate=1e-6, per_device_train_batch_size=micro_batch_size,
                          **options),
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            **trainer_options or {})
        result = built.train()
    return {"seconds": result.metrics["train_runtime"]}, built.state.log_history[:-1]


def run_in_turn(config: AgainstTRLConfig, name: str, folder: Path, model: GPT,
                make: Callable[..., Trial], unit: str) -> None:
    """Runs `make(system, config, folder)` of both systems in turn, and records the medians of their
    figures, those per `unit`, a key of the figures that counts, and the ratio."""
    timings = compare(("ours", "trl"), 1 + config.rounds, make, config, folder)
    per_unit = {}
    for system, timing in timings.items():
        trials = timing.results[1:]
        medians = {key: statistics.median(trial[key] for trial in trials) for key in trials[0]}
        per_unit[system] = statistics.median(trial["seconds"] / trial[unit] for trial in trials)
        record(config, f"{name} run", system=system, **medians,
               **{f"seconds_per_{unit.removesuffix('s')}": per_unit[system]},
               all_seconds=[round(trial["seconds"], 3) for trial in trials],
               peak_mb=timing.peak / 2**20)
    record(config, name, speedup=per_unit["trl"] / per_unit["ours"], per=unit.removesuffix("s"),
           threads=config.threads, parameters=model.num_parameters(), runs=config.rounds,
           checkpoint=config.checkpoint, data=config.data)
