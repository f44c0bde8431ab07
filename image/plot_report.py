"""Plots what judge.py or reward.py has written: their own figures, drawn again.

    python image/plot_report.py out/judge/judge.json --out out/judge.png
    python image/plot_report.py out/reward/reward.json --out out/calibration.png

Of judge.py: the rewards of policies against their KL to the reference, gold filled and solid, proxy
hollow and dashed. Rewards are drawn against sqrt(KL); a success rate, the mean of a reward that is
0 or 1, against KL, with the least KL that it takes. Of reward.py: the accuracy of each bin, with
its interval, against the confidence; a calibrated model lies on the diagonal.
"""

import json
import math
import pathlib
import sys
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import atomic_write, check_folder


@dataclass(frozen=True)
class PlotReportConfig:
    report: tuple[str, ...] = flag((), "judge.json or reward.json", positional=True, is_path=True)
    out: str = flag("report.png", "PNG file to write", is_path=True)


def check_image(image: pathlib.Path) -> None:
    """Raises UserError, before any work is done, if --out is no path for a new PNG."""
    if image.suffix != ".png" or image.is_dir():
        raise UserError(f"--out {image} is a folder or another format, expected a file NAME.png")
    check_folder(image.parent, f"--out {image}")


def binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of two coins, in nats: the least of policies with such success rates."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)  # 0 at p = 0
            + torch.xlogy(1 - p, 1 - p) - torch.xlogy(1 - p, 1 - q))


def draw_policies(results: dict[str, dict], image: pathlib.Path) -> None:
    """Plots the `results` of judge.py, of which the first is the reference, into a PNG."""
    from matplotlib.figure import Figure  # slow to import
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes, reference = figure.subplots(), next(iter(results.values()))
    is_success = "kl_lower_bound" in reference
    for kind, line, fill in (("proxy", "--", "none"), ("gold", "-", "full")):
        curve = []
        for i, (name, row) in enumerate(results.items()):
            kl = 0.0 if i == 0 else row["kl"] if "kl" in row else row["kl_upper_bound"]
            kl = max(0.0, kl)  # estimates vary
            x = kl if is_success else math.sqrt(kl)
            if kind in row and "kl_upper_bound" in row:
                curve.append((x, row[kind]))
            elif kind in row:
                axes.errorbar(x, row[kind], row.get(f"{kind}_stderr"), fmt="o", fillstyle=fill,
                              color=f"C{i}", zorder=3, label=f"{kind} of {name}")
        if curve:
            axes.plot(*zip(*curve, strict=True), f".{line}", color="gray",
                      label=f"{kind} of best of n")
    if is_success:
        p0 = torch.tensor(reference.get("gold", reference.get("proxy")), dtype=torch.float64)
        p = torch.linspace(p0.item(), 1, 200, dtype=torch.float64)
        axes.plot(binary_kl(p, p0), p, "k", linewidth=0.8, label="least possible KL")
    axes.set(xlabel="KL to the reference, nats" if is_success else "sqrt(KL to the reference)",
             ylabel="mean reward")
    for text in figure.legend(loc="outside lower center", ncols=2).texts:
        text.set_parse_math(False)  # $ is only a character
    with atomic_write(image) as file:
        figure.savefig(file, format="png")


def draw_calibration(bins: list[dict], image: pathlib.Path) -> None:
    """Plots the `calibration` of a report of reward.py into a PNG."""
    from matplotlib.figure import Figure  # slow to import
    x, y, low, high = ([row[name] for row in bins]
                       for name in ("confidence", "accuracy", "low", "high"))
    figure = Figure(figsize=(5, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=0.8)
    axes.vlines(x, low, high)
    axes.plot(x, y, "o")
    axes.set(xlabel="confidence, sigmoid(|margin|)", ylabel="accuracy on held-out pairs")
    with atomic_write(image) as file:
        figure.savefig(file, format="png")


def main() -> None:
    config = parse_config(PlotReportConfig, description=__doc__)
    if len(config.report) != 1:
        raise UserError("expected one report: python image/plot_report.py out/judge/judge.json")
    [path], image = config.report, pathlib.Path(config.out)
    check_image(image)
    try:
        report = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if "calibration" in report:
            draw_calibration(report["calibration"], image)
        else:
            draw_policies(report["results"], image)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is not a report of judge.py or reward.py ({error!r})") from None


if __name__ == "__main__":
    run_main(main)
