"""Graphs of runs, drawn from their logs: losses, learning rates, gradient norms."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from minigpt2.config import UserError
from minigpt2.files import atomic_write
from minigpt2.metrics import read_log


def check_image(image: Path) -> None:
    """Raises UserError where no PNG can be written, before the hours that it is to show."""
    if image.suffix != ".png":
        raise UserError(f"{image} does not end in .png, which is what is drawn")
    above = next(folder for folder in image.absolute().parents if folder.exists())
    if image.is_dir() or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{image} cannot be written there: choose another file")


def draw_runs(runs: Sequence[tuple[str, Path]], image: Path, title: str) -> None:
    """Draws one or several (label, run log) into one PNG, a colour each label: the loss with the
    skipped updates, and, where they were logged, the learning rate and the gradient norm below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only when needed
    from matplotlib.figure import Figure

    logs = [(f"{label} " if len(runs) > 1 else "", read_log(path)) for label, path in runs]
    labels = list(dict.fromkeys(label for label, _ in logs))
    colors = [f"C{labels.index(label)}" for label, _ in logs]
    if not any(points(records, kind, "loss") for _, records in logs for kind in ("train", "val")):
        raise UserError(f"no loss in {', '.join(str(path) for _, path in runs)}: nothing to draw")
    names = [name for name in ("lr", "grad_norm")
             if any(points(records, "train", name) for _, records in logs)]
    figure = Figure(figsize=(8, 4.2 + 1.1 * len(names)), dpi=120, layout="constrained")
    loss, *below = figure.subplots(1 + len(names), squeeze=False, sharex=True,
                                   height_ratios=[3.5, *[1] * len(names)])[:, 0]
    for axes in (loss, *below):
        axes.grid(alpha=0.3)
    for (label, records), color in zip(logs, colors, strict=True):
        draw_loss(loss, label, records, color)
    loss.set(title=plain(title), ylabel="cross-entropy, nats per token")
    entries = dict(zip(*reversed(loss.get_legend_handles_labels()), strict=True))
    loss.legend(entries.values(), entries.keys())
    for axes, name in zip(below, names, strict=True):
        lines = [points(records, "train", name) or ((), ()) for _, records in logs]
        for line, color in zip(lines, colors, strict=True):
            axes.plot(*line, color=color, linewidth=0.8)
        axes.set_ylabel({"lr": "learning rate", "grad_norm": "gradient norm"}[name])
        values = [y for _, ys in lines for y in ys]
        if name == "grad_norm" and max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
    figure.axes[-1].set_xlabel("updates")
    figure.align_ylabels()
    image.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(image) as file:
        FigureCanvasAgg(figure).print_png(file)


def draw_loss(axes, label: str, records: dict[str, dict[int, dict]], color: str) -> None:
    """The losses of a run, and crosses at the bottom for updates that were skipped."""
    for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.5}),
                        ("val", {"linewidth": 1.8, "marker": "o", "markersize": 5, "zorder": 3})):
        line = points(records, kind, "loss")
        if line:
            axes.plot(*line, color=color, label=plain(label + kind), **style)
    skipped = [step for step, record in sorted(records.get("train", {}).items())
               if record.get("skipped") or record.get("loss", 0) is None]
    if skipped:
        axes.plot(skipped, [0.03] * len(skipped), "x", color=color, label=plain(label + "skipped"),
                  transform=axes.get_xaxis_transform())  # a height on the axis, not a loss


def points(records: dict[str, dict[int, dict]], kind: str, name: str) -> tuple:
    """(steps, values) of the records with a finite number under that name; () if there is none."""
    found = [(step, record[name]) for step, record in sorted(records.get(kind, {}).items())
             if isinstance(record.get(name), int | float) and math.isfinite(record[name])]
    return tuple(zip(*found, strict=True))


def plain(text: str) -> str:
    """For matplotlib, which would take what stands between dollars for a formula."""
    return text.replace("$", r"\$")
