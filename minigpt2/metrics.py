"""The run log (JSON Lines) and its graphs, run metadata, and the peak FLOP/s of GPUs."""

import contextlib
import hashlib
import json
import math
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

from minigpt2.config import ROOT, UserError
from minigpt2.files import atomic_write

# Dense bf16 peak with fp32 accumulation (V100, T4: fp16), from data sheets; the longest name wins
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "A100": 312,
    "A40": 149.7, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71, "V100": 125, "T4": 65}
PANELS = {("hellaswag", "accuracy_per_token"): "HellaSwag", ("train", "lr"): "learning rate",
          ("train", "grad_norm"): "gradient norm"}  # below the losses


def peak_flops(device: torch.device) -> float | None:
    """The data-sheet peak of a GPU in FLOP/s; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    words = set(re.split("[-_ ]", torch.cuda.get_device_name(device)))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words
             and not words & {"D", "Laptop", "MIG", "NVL", "Ti"} - set(name.split())]  # other chips
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def run_metadata(config, *, world_size: int, device: torch.device, data: dict | list) -> dict:
    """What reproduces a run. `git_commit` ends with "+changes" if tracked files are modified."""
    files = [*sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("minigpt2/*.py"))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    describe = ["git", "-C", str(ROOT), "--no-optional-locks", "describe", "--always",
                "--abbrev=64", "--exclude=*", "--dirty=+changes"]
    commit = None
    with contextlib.suppress(OSError):  # git is not installed
        commit = subprocess.run(describe, text=True, capture_output=True).stdout.strip() or None
    return vars(config) | {
        "python": platform.python_version(), "torch": str(torch.__version__),
        "numpy": np.__version__, "cuda": torch.version.cuda, "git_commit": commit,
        "code_sha256": code, "data_sha256": hashlib.sha256(canonical).hexdigest(),
        "world_size": world_size, "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda" else f"{device.type} {platform.machine()}"}


class RunLog:
    """Appends records to a JSON Lines file, emptied first if `fresh`. A run log is else checked."""

    def __init__(self, path: Path, fresh: bool = False):
        if path.name == "metrics.jsonl" and path.exists() and not fresh:  # graphs are drawn from it
            read_log(path)
        self.file = open(path, "w+b" if fresh else "a+b", buffering=0)  # noqa: SIM115
        self.close = self.file.close
        self.file.seek(0)
        self.file.truncate(self.file.read().rfind(b"\n") + 1)  # drop a line that a kill cut short

    def write(self, step: int, kind: str, **values) -> None:
        """Appends a record; non-finite numbers become null. Raises OSError on a full disk."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        line = json.dumps({"step": step, "kind": kind, **finite}).encode() + b"\n"
        try:
            while line:  # an almost full disk accepts a part; the next write raises
                line = line[self.file.write(line):]
        except OSError as error:
            error.filename = str(self.file.name)
            raise


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """The records of a run log as {kind: {step: record}}; the last of a step wins. A "run" record
    of step S discards what the run repeats. Raises UserError for a damaged line but the last."""
    records: dict[str, dict[int, dict]] = {}
    lines = path.read_bytes().split(b"\n")[:-1]  # the last one is empty or incomplete
    for n, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step, kind = int(record["step"]), str(record["kind"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path} line {n} is no record, delete it: {error!r:.99}") from None
        if kind == "run":
            for other, old in records.items():
                records[other] = {s: old[s] for s in old if s < step + (other != "train")}
        records.setdefault(kind, {})[step] = record
    return records


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
