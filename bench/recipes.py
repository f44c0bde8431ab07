"""Recipes: how many tokens the flags of runs/fast.sh save over the trainer's defaults.

    python bench/recipes.py --data-dir DIR --log image/logs/bench_recipes.jsonl    # one hour

Both recipes train a small GPT-2, with several learning rates on the first seed and with the best
one on the others; `gpt2`, the defaults, on 2M tokens, `fast` on half of them. The same command
resumes. image/logs/recipes holds metrics.jsonl of the runs with the best learning rates.
"""

import os
import pathlib
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import record, run_bench, run_script
from minigpt2.config import UserError, flag
from minigpt2.graphs import draw_runs
from minigpt2.metrics import read_log

PROXY = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "sequence_length": 256,
         "micro_batch_size": 16, "total_batch_size": 4096, "warmup_steps": 40, "device": "cpu",
         "dtype": "bfloat16", "eval_tokens": 65_536, "sample_steps": 0, "keep_last": 1}
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 32, "eval_tokens": 4096}  # for --quick
RECIPES = {"gpt2": {},
           "fast": {"optimizer": "muon", "schedule": "linear", "zero_init": True, "min_lr": 0.0}}
STEPS = {"gpt2": 488, "fast": 244}  # 2.0M tokens, and half of them
TRIALS = {"gpt2": [{"max_lr": lr, "min_lr": lr / 10} for lr in (7.5e-4, 1.5e-3, 3e-3, 6e-3)],
          "fast": [{"max_lr": lr, "muon_lr": muon_lr}
                   for lr, muon_lr in ((6e-3, 6e-3), (1.2e-2, 6e-3), (1.2e-2, 1.2e-2))]}
SEEDS = (1, 2, 3)
LOGS = pathlib.Path(__file__).resolve().parents[1] / "image" / "logs" / "recipes"


@dataclass(frozen=True)
class RecipesConfig:
    data_dir: str | None = flag(None, "token shards with at least 2.2M tokens")
    out_dir: str = flag("out/recipes", "folder of the runs")
    quick: bool = flag(False, "smoke test: a tiny model, four steps")
    log: str | None = flag(None, "append the results to this JSON Lines file")


def train_recipe(config: RecipesConfig, recipe: str, trial: dict, seed: int) -> float:
    """Trains, unless that is done already; returns the final validation loss."""
    steps = 4 if config.quick else STEPS[recipe]
    rates = [f"{name}{value:g}" for name, value in trial.items() if name != "min_lr"]
    name = "_".join([recipe, f"{steps}steps", *rates, f"seed{seed}"])
    log = pathlib.Path(config.out_dir) / name / "metrics.jsonl"

    def final_loss() -> float | None:
        return read_log(log).get("val", {}).get(steps, {}).get("loss") if log.exists() else None

    if final_loss() is None:
        flags = {"data_dir": config.data_dir, "out_dir": log.parent, "resume": True, "seed": seed,
                 "max_steps": steps, "eval_interval": steps // 4, "save_interval": steps // 4}
        run_script("trainer.py", flags | PROXY | RECIPES[recipe] | trial
                   | (TINY if config.quick else {}), OMP_NUM_THREADS="1")
    loss = final_loss()
    if loss is None:
        raise UserError(f"{name} was stopped: the same command resumes it")
    record(config, "recipe run", recipe=recipe, seed=seed, tokens=4096 * steps, loss=loss, **trial)
    return loss


def draw_recipes(image: pathlib.Path) -> None:
    """Draws image/logs/recipes, one color per recipe."""
    logs = sorted(LOGS.glob("*.jsonl"), reverse=True)  # gpt2 first
    draw_runs([(log.name.partition("_")[0], log) for log in logs], image,
              "Two recipes, three seeds each; 4,096 tokens per step")


def bench_recipes(config: RecipesConfig) -> None:
    if config.data_dir is None:
        raise UserError("recipes train on token shards: give --data-dir")
    best, runs, pool = {}, {}, ThreadPoolExecutor(os.cpu_count())
    try:
        tried = {recipe: [pool.submit(train_recipe, config, recipe, trial, SEEDS[0])
                          for trial in trials] for recipe, trials in TRIALS.items()}
        for recipe, futures in tried.items():
            first = min(futures, key=lambda future: future.result())
            best[recipe] = TRIALS[recipe][futures.index(first)]
            runs[recipe] = [first, *(pool.submit(train_recipe, config, recipe, best[recipe], seed)
                                     for seed in SEEDS[1:])]
        losses = {recipe: [run.result() for run in futures] for recipe, futures in runs.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    means = {recipe: statistics.mean(values) for recipe, values in losses.items()}
    for recipe, values in losses.items():
        record(config, "recipe", recipe=recipe, **best[recipe],
               tokens=4096 * (4 if config.quick else STEPS[recipe]), mean=means[recipe],
               losses=[round(loss, 4) for loss in values], deviation=statistics.stdev(values))
    record(config, "recipes", token_ratio=STEPS["fast"] / STEPS["gpt2"],
           fast_minus_gpt2=means["fast"] - means["gpt2"],
           every_fast_below_every_gpt2=max(losses["fast"]) <= min(losses["gpt2"]))


if __name__ == "__main__":
    run_bench(bench_recipes, RecipesConfig, __doc__)
