"""Plots the calibration of a reward model on held-out pairs, from what reward.py has written.

    python image/plot_reward.py out/reward/reward.json --out image/calibration.png

The accuracy of each bin, with its interval, against the confidence; a calibrated model lies on the
diagonal.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import atomic_write
from minigpt2.graphs import check_image


@dataclass(frozen=True)
class PlotRewardConfig:
    report: tuple[str, ...] = flag((), "reward.json of a run of reward.py", positional=True,
                                   is_path=True)
    out: str = flag("calibration.png", "PNG file to write", is_path=True)


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
    config = parse_config(PlotRewardConfig, description=__doc__)
    if len(config.report) != 1:
        raise UserError("expected one report: python image/plot_reward.py out/reward/reward.json")
    image, report = pathlib.Path(config.out), pathlib.Path(config.report[0])
    check_image(image, "--out")
    try:
        draw_calibration(json.loads(report.read_text(encoding="utf-8"))["calibration"], image)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{report} is not a report of reward.py ({error})") from None


if __name__ == "__main__":
    run_main(main)
