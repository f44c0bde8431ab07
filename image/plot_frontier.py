"""Draws runs of rlhf.py with a reward of 0 or 1 beside the exact optimum.

    python image/plot_frontier.py out/rlhf --out out/rlhf/frontier.png
    python image/plot_frontier.py out/rlhf --out again.png --successes out/rlhf/frontier.json

The best policy for a reward r is reference x exp(r / kl_coef) / Z. For r in {0, 1} it depends on
the reference only by p0, its probability of success: p* = p0 e / (1 - p0 + p0 e), e = exp(1 /
kl_coef), at the divergence kl(p* || p0) of two coins. No policy succeeds as often with less. p0 is
estimated for every held-out prompt from samples of the reference; all figures are means over these
prompts, and what a run reached on them is in its log. The estimates are written beside the figure;
with --successes, they are read, and no checkpoint is needed. A single value stands for the mean of
all prompts: the curve is then a lower bound of the KL, since kl is convex.
"""

import json
import math
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from dataloader import load_prompts
from image.plot_report import check_image
from inference import sample_responses
from minigpt2.checkpoint import load_model, shared_template, weights_sha256
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch
from minigpt2.files import atomic_write, write_json
from minigpt2.kernels import prepare_to_sample
from minigpt2.metrics import points, read_log
from minigpt2.rewards import Reward

# Settings that determine the frontier
SHARED = ("reference_sha256", "reward_sha256", "data_sha256", "max_tokens", "unstopped_score",
          "val_fraction", "eval_rows")


@dataclass(frozen=True)
class FrontierConfig:
    runs: tuple[str, ...] = flag((), "OUT_DIRs of rlhf.py, or their metrics.jsonl", positional=True,
                                 is_path=True)
    out: str = flag("frontier.png", "PNG file to write", is_path=True)
    samples: int = flag(32, "responses of the reference per held-out prompt", minimum=2)
    successes: str | None = flag(None, "JSON list of p0 per held-out prompt, instead of samples",
                                 is_path=True)


def settings_of(path: pathlib.Path, log: dict[str, dict[int, dict]]) -> dict:
    """The settings in a run's log. Raises UserError unless it is of rlhf.py, with a validation."""
    settings = log.get("run", {}).get(min(log.get("run", {}), default=0), {})
    if "max_response" in settings:  # its name in earlier versions
        settings = settings | {"max_tokens": settings["max_response"]}
    if not (settings.keys() >= set(SHARED) and points(log, "val", "score")[0]):
        raise UserError(f"{path} is not the log of a run of rlhf.py with a validation")
    return settings


def check_comparable(paths: list[pathlib.Path], settings: list[dict]) -> None:
    """Raises UserError if runs differ in what the frontier is made of."""
    for path, other in zip(paths, settings, strict=True):
        for name in SHARED:
            if other[name] != settings[0][name]:
                raise UserError(f"{path} has {name} {other[name]}, {paths[0]} {settings[0][name]}: "
                                "draw runs with other tasks apart")


def success_of_reference(settings: dict, samples: int) -> np.ndarray:
    """p0 (n,) of the held-out prompts that a run validated on, from its settings. Raises UserError
    if the reference or the reward has changed since, or if the reward is not of 0 and 1."""
    device = torch.device("cpu")
    reference = load_model(settings["checkpoint"], device)
    reward = Reward(settings["reward"], "--reward", device, settings["unstopped_score"])
    for name, expected, found in (
            ("checkpoint", settings["reference_sha256"], weights_sha256(reference)),
            ("reward", settings["reward_sha256"], reward.sha256)):
        if found != expected:
            raise UserError(f"the {name} {settings[name]} has changed since the run: restore it, "
                            "or draw the run with its --successes")
    _, held_out, _ = load_prompts(settings["prompts"], "--prompts", reference.config.block_size,
                                  settings["max_tokens"], settings["val_fraction"],
                                  shared_template(settings["checkpoint"]),
                                  settings.get("columns", ""))
    rows = [row for row in held_out[: settings["eval_rows"]] for _ in range(samples)]
    launch = Launch(0, 1, device)
    responses = sample_responses(
        prepare_to_sample(reference), [row.ids for row in rows], list(range(len(rows))),
        settings["max_tokens"], launch, label="samples of the reference")
    scores = reward(responses, rows, launch, torch.float32)
    if not set(scores.tolist()) <= {0.0, 1.0}:
        raise UserError(f"the reward {settings['reward']} has other values than 0 and 1, for which "
                        "alone the optimum is known: choose such a function")
    return scores.view(-1, samples).mean(1).numpy()


def load_successes(path: pathlib.Path, flag: str = "--successes") -> np.ndarray:
    """p0 (n,) from a file that an earlier call has written. Raises UserError on anything else."""
    try:
        p0 = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=float)
    except (ValueError, TypeError) as error:
        raise UserError(f"{flag} {path}: {error}") from None
    if p0.ndim != 1 or not p0.size or not ((p0 >= 0) & (p0 <= 1)).all():
        raise UserError(f"{flag} {path} is no list of fractions between 0 and 1")
    return p0


def best_policy(p0: np.ndarray, kl_coef: float) -> tuple[float, float]:
    """(KL, success) of the best policy, means over prompts with successes p0 (n,)."""
    weight = p0 * np.exp(1 / max(kl_coef, 0.002))  # finite, also without a KL
    p = weight / (1 - p0 + weight)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 is 0
        terms = np.nan_to_num(p * np.log(p / p0)) + np.nan_to_num(
            (1 - p) * np.log((1 - p) / (1 - p0)))
    return float(terms.mean()), float(p.mean())


def main() -> None:
    from matplotlib.figure import Figure  # slow to import
    config = parse_config(FrontierConfig, description=__doc__)
    if not config.runs:
        raise UserError("no run given: python image/plot_frontier.py out/rlhf")
    image = pathlib.Path(config.out)
    check_image(image)
    estimates = image.with_suffix(".json")
    if estimates.exists():
        load_successes(estimates, "the file beside --out,")  # another one is not overwritten
    paths = [path / "metrics.jsonl" if path.is_dir() else path
             for path in map(pathlib.Path, config.runs)]
    logs = [read_log(path) for path in paths]
    settings = [settings_of(path, log) for path, log in zip(paths, logs, strict=True)]
    check_comparable(paths, settings)
    if config.successes:
        p0 = load_successes(pathlib.Path(config.successes))
    else:
        p0 = success_of_reference(settings[0], config.samples)
        write_json(estimates, p0.tolist())
    figure = Figure(figsize=(9, 3.8), dpi=120, layout="constrained")
    by_step, by_kl = figure.subplots(1, 2, sharey=True)
    frontier = [best_policy(p0, kl_coef) for kl_coef in np.geomspace(0.01, 100, 200)]
    by_kl.plot(*zip(*frontier, strict=True), color="gray",
               label="exact frontier" if p0.size > 1 else "frontier if all prompts were alike")
    for number, (path, log, chosen) in enumerate(zip(paths, logs, settings, strict=True)):
        label, color = path.parent.name if path.stem == "metrics" else path.stem, f"C{number}"
        kl, best = best_policy(p0, chosen["kl_coef"])
        steps, scores = points(log, "val", "score")
        by_step.plot(steps, scores, "o-", color=color, label=label)
        by_step.axhline(best, color=color, linestyle="--", linewidth=1)
        kl_at = dict(zip(*points(log, "val", "kl"), strict=True))  # one that is not finite has none
        finite = [(kl_at[step], score) for step, score in zip(steps, scores, strict=True)
                  if step in kl_at]
        by_kl.plot([x for x, _ in finite], [y for _, y in finite], "o", color=color, label=label)
        by_kl.plot([kl], [best], "*", markersize=14, color=color,
                   label=f"optimum at kl_coef {chosen['kl_coef']:g}")
        print(f"{label}: success {scores[0]:.3f} -> {scores[-1]:.3f}, KL "
              f"{finite[-1][0] if finite else math.nan:.3f}; reference {p0.mean():.3f} on "
              f"{p0.size} prompts, optimum {best:.3f} at KL {kl:.3f}")
    by_step.set(xlabel="step", ylabel="success on held-out prompts")
    by_kl.set(xlabel="KL to the reference, nats per response")
    for axes in (by_step, by_kl):
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(image) as file:
        figure.savefig(file, format="png")
    print(f"wrote {image}")


if __name__ == "__main__":
    run_main(main)
