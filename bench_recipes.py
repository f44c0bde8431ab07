"""Compares the trainer's recipes by the tokens they need: every recipe with its own best learning
rate, found here, then with three seeds; AdamW's gets 2M tokens, Muon's half of them.

A run is `python trainer.py` of a small GPT-2 on one thread; as many runs at a time as there are
cores. All of them stay in --out-dir: the same command goes on where it stopped.
"""

import os
import shutil
import statistics
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from config import UserError
from graphs import draw_runs
from measure import BenchConfig, python_script, record
from metrics import read_log

PROXY = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "sequence_length": 256,
         "micro_batch_size": 16, "total_batch_size": 4096, "warmup_steps": 40, "device": "cpu",
         "dtype": "bfloat16", "eval_tokens": 65_536, "sample_steps": 0, "keep_last": 1}
UPDATES = {"gpt2": 488, "fast": 244}  # of 4,096 tokens: 2.0M, and half of them
# What is tried of each, with the first seed; then the best with the others
TRIALS = {
    "gpt2": [{"max_lr": lr, "min_lr": lr / 10} for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3)],
    "fast": [{"max_lr": lr, "muon_lr": muon_lr}
             for lr, muon_lr in ((6e-3, 6e-3), (1.2e-2, 6e-3), (1.2e-2, 1.2e-2))],
}
SEEDS = (1, 2, 3)
FIGURE = Path(__file__).resolve().parent / "image" / "recipes.png"
LOGS = FIGURE.parent / "logs" / "recipes"


def run_name(recipe: str, trial: dict, seed: int) -> str:
    return "_".join([recipe, *(f"{name}{value:g}" for name, value in trial.items()
                               if name != "min_lr"), f"seed{seed}"])


def final_loss(log: Path, updates: int) -> float | None:
    """The validation loss after the last update; None of a run that is not done."""
    return read_log(log).get("val", {}).get(updates, {}).get("loss") if log.exists() else None


def run(config: BenchConfig, recipe: str, trial: dict, seed: int) -> float:
    """Trains, or finds that it was done; returns the final validation loss."""
    updates = UPDATES[recipe] if not config.quick else 4
    settings = PROXY | trial | {"recipe": recipe, "seed": seed, "max_steps": updates,
                                "eval_interval": updates // 4, "save_interval": updates // 4}
    if config.quick:
        settings |= {"n_layer": 1, "n_head": 1, "n_embd": 32, "eval_tokens": 4096}
    folder = Path(config.out_dir) / run_name(recipe, trial, seed)
    loss = final_loss(folder / "metrics.jsonl", updates)
    if loss is None:
        flags = [part for name, value in settings.items()
                 for part in (f"--{name.replace('_', '-')}", value)]
        done = subprocess.run(python_script("trainer.py", "--data-dir", config.data_dir,
                                            "--out-dir", folder, "--resume", *flags),
                              env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                              text=True)
        if done.returncode:
            raise UserError(f"{folder.name}: {done.stderr.strip() or done.returncode}")
        loss = final_loss(folder / "metrics.jsonl", updates)
    record(config, "recipe run", recipe=recipe, seed=seed, tokens=updates * 4096, loss=loss,
           **trial)
    return loss


def bench_recipes(config: BenchConfig) -> None:
    if config.data_dir is None:
        raise UserError("recipes are compared on token shards: give --data-dir")
    best, waiting = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        trials = {recipe: [pool.submit(run, config, recipe, trial, SEEDS[0]) for trial in trials]
                  for recipe, trials in TRIALS.items()}
        for recipe, futures in trials.items():
            losses = [future.result() for future in futures]
            best[recipe] = TRIALS[recipe][losses.index(min(losses))]
            waiting[recipe] = [pool.submit(run, config, recipe, best[recipe], seed)
                               for seed in SEEDS[1:]]
        losses = {recipe: [run(config, recipe, best[recipe], SEEDS[0]),  # it is there
                           *(future.result() for future in waiting[recipe])] for recipe in TRIALS}
    runs = []
    for recipe, values in losses.items():
        record(config, "recipe", recipe=recipe, **best[recipe], tokens=UPDATES[recipe] * 4096,
               losses=[round(value, 4) for value in values], mean=statistics.mean(values),
               deviation=statistics.stdev(values))
        runs += [(recipe, Path(config.out_dir) / run_name(recipe, best[recipe], seed) /
                  "metrics.jsonl") for seed in SEEDS]
    record(config, "recipes", token_ratio=UPDATES["fast"] / UPDATES["gpt2"],
           fast_minus_gpt2=statistics.mean(losses["fast"]) - statistics.mean(losses["gpt2"]),
           every_fast_below_every_gpt2=max(losses["fast"]) <= min(losses["gpt2"]))
    if config.log and not config.quick:
        LOGS.mkdir(parents=True, exist_ok=True)
        for _, log in runs:
            shutil.copyfile(log, LOGS / f"{log.parent.name}.jsonl")
        draw_runs(runs, FIGURE, "Two recipes, three seeds each")
