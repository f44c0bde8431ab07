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
    curves = [points(log, kind, "loss") for _, log in logs for kind in ("train", "val")]
    if not any(steps for steps, _ in curves):
        raise UserError(f"no loss to plot in {', '.join(str(path) for _, path in runs)}")
    panels = [panel for panel in PANELS if any(points(log, *panel)[0] for _, log in logs)]
    figure = Figure(figsize=(8, 4.2 + 1.1 * len(panels)), dpi=120, layout="constrained")
    loss, *below = figure.subplots(1 + len(panels), squeeze=False, sharex=True,
                                   height_ratios=[3.5, *[1] * len(panels)])[:, 0]
    colors = {label: f"C{i}" for i, label in enumerate(dict(logs))}
    for label, log in logs:
        draw_loss(loss, label, log, colors[label])
        for axes, panel in zip(below, panels, strict=True):
            axes.plot(*points(log, *panel), color=colors[label], linewidth=0.8,
                      marker="" if panel[0] == "train" else ".")
            axes.set_ylabel(PANELS[panel])
    loss.set_ylabel(loss_name)
    handles = {line.get_label(): line for line in loss.lines}  # legend() omits labels like "_a"
    for text in (loss.set_title(title), *loss.legend(handles.values(), handles.keys()).texts):
        text.set_parse_math(False)  # $ is only a character
    # Leave out a fall in the first tenth of the steps that would take over half of the axis
    steps, losses = np.concatenate([np.array(curve) for curve in curves], axis=1)  # (N,) each
    low, high = losses.min(), losses[steps >= steps.max() / 10].max()
    if losses.max() - low > 2 * (high - low) > 0:
        loss.set_ylim(1.05 * low - 0.05 * high, 1.05 * high - 0.05 * low)
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
