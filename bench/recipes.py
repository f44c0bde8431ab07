"""Compares the trainer's recipes by the tokens they need: every recipe with its own best learning
rate, found here, then with three seeds; gpt2 gets 2M tokens, fast half of them.

A run is `python trainer.py` of a small GPT-2 on one thread; as many runs at a time as there are
cores. All of them stay in --out-dir: the same command goes on where it stopped.
"""

import json
import os
import shutil
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import BenchConfig, python_script, record, run_quietly
from minigpt2.config import UserError
from minigpt2.graphs import draw_runs
from minigpt2.metrics import read_log

PROXY = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "sequence_length": 256,
         "micro_batch_size": 16, "total_batch_size": 4096, "warmup_steps": 40, "device": "cpu",
         "dtype": "bfloat16", "eval_tokens": 65_536, "sample_steps": 0, "keep_last": 1}
RECIPES = {"gpt2": {}, "fast": {"optimizer": "muon", "schedule": "linear", "zero_init": True,
                                 "min_lr": 0.0}}
UPDATES = {"gpt2": 488, "fast": 244}  # of 4,096 tokens: 2.0M, and half of them
# What is tried of each, with the first seed; then the best with the others
TRIALS = {
    "gpt2": [{"max_lr": lr, "min_lr": lr / 10} for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3)],
    "fast": [{"max_lr": lr, "muon_lr": muon_lr}
             for lr, muon_lr in ((6e-3, 6e-3), (1.2e-2, 6e-3), (1.2e-2, 1.2e-2))],
}
SEEDS = (1, 2, 3)
FIGURE = Path(__file__).resolve().parents[1] / "image" / "recipes.png"
LOGS = FIGURE.parent / "logs" / "recipes"


def run_name(recipe: str, updates: int, trial: dict, seed: int) -> str:
    rates = [f"{name}{value:g}" for name, value in trial.items() if name != "min_lr"]
    return "_".join([recipe, f"{updates}updates", *rates, f"seed{seed}"])


def updates_of(config: BenchConfig, recipe: str) -> int:
    return 4 if config.quick else UPDATES[recipe]


def final_loss(log: Path, updates: int) -> float | None:
    """The validation loss after the last update; None of a run that is not done."""
    return read_log(log).get("val", {}).get(updates, {}).get("loss") if log.exists() else None


def run(config: BenchConfig, recipe: str, trial: dict, seed: int) -> float:
    """Trains, or finds that it was done; returns the final validation loss."""
    updates = updates_of(config, recipe)
    settings = PROXY | RECIPES[recipe] | trial | {"seed": seed, "max_steps": updates,
                                "eval_interval": updates // 4, "save_interval": updates // 4}
    if config.quick:
        settings |= {"n_layer": 1, "n_head": 1, "n_embd": 32, "eval_tokens": 4096}
    folder = Path(config.out_dir) / run_name(recipe, updates, trial, seed)
    loss = final_loss(folder / "metrics.jsonl", updates)
    if loss is None:
        flags = [part for name, value in settings.items() for part in
                 ([f"--{name.replace('_', '-')}"] if value is True else
                  [f"--{name.replace('_', '-')}", value])]
        run_quietly(python_script("trainer.py", "--data-dir", config.data_dir, "--out-dir", folder,
                                  "--resume", *flags), OMP_NUM_THREADS="1")
        loss = final_loss(folder / "metrics.jsonl", updates)
        if loss is None:
            raise UserError(f"{folder.name} was stopped: the same command goes on with it")
    record(config, "recipe run", recipe=recipe, seed=seed, tokens=updates * 4096, loss=loss,
           **trial)
    return loss


def copy_log(log: Path, copy: Path) -> None:
    """A run log without the paths that mean something on this machine only."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for entry in records:
        for name in ("data_dir", "out_dir"):
            entry.pop(name, None)
    copy.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")


def draw_recipes(image: Path) -> None:
    """The curves of the committed logs, a colour a recipe."""
    logs = sorted(LOGS.glob("*.jsonl"), reverse=True)  # gpt2 first
    draw_runs([(log.name.partition("_")[0], log) for log in logs], image,
              "Two recipes, three seeds each; 4,096 tokens an update")


def bench_recipes(config: BenchConfig) -> None:
    if config.data_dir is None:
        raise UserError("recipes are compared on token shards: give --data-dir")
    best, found, logs = {}, {}, []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        trials = {recipe: [pool.submit(run, config, recipe, trial, SEEDS[0]) for trial in trials]
                  for recipe, trials in TRIALS.items()}
        for recipe, futures in trials.items():
            first = min(futures, key=lambda future: future.result())
            best[recipe] = TRIALS[recipe][futures.index(first)]
            found[recipe] = [first, *(pool.submit(run, config, recipe, best[recipe], seed)
                                      for seed in SEEDS[1:])]
        losses = {recipe: [future.result() for future in found[recipe]] for recipe in TRIALS}
    finally:
        pool.shutdown(cancel_futures=True)
    for recipe, values in losses.items():
        updates = updates_of(config, recipe)
        record(config, "recipe", recipe=recipe, **best[recipe], tokens=updates * 4096,
               losses=[round(value, 4) for value in values], mean=statistics.mean(values),
               deviation=statistics.stdev(values))
        logs += [Path(config.out_dir) / run_name(recipe, updates, best[recipe], seed) /
                 "metrics.jsonl" for seed in SEEDS]
    record(config, "recipes", token_ratio=UPDATES["fast"] / UPDATES["gpt2"],
           fast_minus_gpt2=statistics.mean(losses["fast"]) - statistics.mean(losses["gpt2"]),
           every_fast_below_every_gpt2=max(losses["fast"]) <= min(losses["gpt2"]))
    if config.log and not config.quick:
        shutil.rmtree(LOGS, ignore_errors=True)
        LOGS.mkdir(parents=True)
        for log in logs:
            copy_log(log, LOGS / f"{log.parent.name}.jsonl")
        draw_recipes(FIGURE)
