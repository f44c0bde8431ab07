"""Plots of run logs: loss, learning rate, gradient norm."""

import math
from pathlib import Path

import numpy as np

from minigpt2.config import UserError
from minigpt2.files import atomic_write
from minigpt2.metrics import read_log

PANELS = {("hellaswag", "accuracy_per_token"): "HellaSwag", ("train", "lr"): "learning rate",
          ("train", "grad_norm"): "gradient norm"}  # below the losses


def draw_runs(runs: list[tuple[str, Path]], image: Path, title: str,
              loss_name: str = "cross-entropy, nats per token") -> None:
    """Plots (label, run log)s into a PNG, one color per label. Raises UserError without losses."""
    from matplotlib.figure import Figure  # slow to import
    logs = [(f"{label} " if len(runs) > 1 else "", read_log(path)) for label, path in runs]
    if not any(points(log, kind, "loss")[0] for _, log in logs for kind in ("train", "val")):
        raise UserError(f"no loss to plot in {', '.join(str(path) for _, path in runs)}")
    panels = [panel for panel in PANELS if any(points(log, *panel)[0] for _, log in logs)]
    figure = Figure(figsize=(8, 4.2 + 1.1 * len(panels)), dpi=120, layout="constrained")
    loss, *below = figure.subplots(1 + len(panels), squeeze=False, sharex=True,
                                   height_ratios=[3.5, *[1] * len(panels)])[:, 0]
    labels = list(dict.fromkeys(label for label, _ in logs))
    for label, log in logs:
        color = f"C{labels.index(label)}"
        draw_loss(loss, label, log, color)
        for axes, panel in zip(below, panels, strict=True):
            axes.plot(*points(log, *panel), color=color, linewidth=0.8,
                      marker="" if panel[0] == "train" else ".")
            axes.set_ylabel(PANELS[panel])
    loss.set_ylabel(loss_name)
    handles = {line.get_label(): line for line in loss.lines}  # legend() omits labels like "_a"
    for text in (loss.set_title(title), *loss.legend(handles.values(), handles.keys()).texts):
        text.set_parse_math(False)  # $ is only a character
    limit_loss(loss, [points(log, kind, "loss") for _, log in logs for kind in ("train", "val")])
    norms = [norm for _, log in logs for norm in points(log, "train", "grad_norm")[1]]
    if norms and max(norms) > 10 * min(norms) > 0:
        below[-1].set_yscale("log")
        below[-1].yaxis.set_major_formatter("{x:g}")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.align_ylabels()
    with atomic_write(image) as file:
        figure.savefig(file, format="png")


def limit_loss(axes, curves: list[tuple[list[int], list[float]]]) -> None:
    """Leaves out a fall in the first tenth of the steps that would take over half of the axis."""
    found = np.concatenate([np.array(curve).T for curve in curves])  # (N, 2) steps, losses
    low, high = found[:, 1].min(), found[found[:, 0] >= found[:, 0].max() / 10, 1].max()
    if found[:, 1].max() - low > 2 * (high - low) > 0:
        axes.set_ylim(1.05 * low - 0.05 * high, 1.05 * high - 0.05 * low)


def draw_loss(axes, label: str, log: dict, color: str) -> None:
    """Plots the losses of a run, with crosses at the bottom for skipped steps."""
    for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.5}),
                        ("val", {"linewidth": 1.8, "marker": "o", "markersize": 5, "zorder": 3})):
        steps, losses = points(log, kind, "loss")
        if steps:
            axes.plot(steps, losses, color=color, label=label + kind, **style)
    skipped = [step for step, record in sorted(log.get("train", {}).items())
               if record.get("skipped") or record.get("loss", 0) is None]
    if skipped:
        axes.plot(skipped, [0.03] * len(skipped), "x", color=color, label=label + "skipped",
                  transform=axes.get_xaxis_transform())  # y is a fraction of the axis, not a loss


def points(log: dict, kind: str, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of all finite numbers logged under `name`."""
    found = {step: record[name] for step, record in sorted(log.get(kind, {}).items())
             if isinstance(record.get(name), int | float) and math.isfinite(record[name])}
    return list(found), list(found.values())
