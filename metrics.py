"""What a run reports: a JSONL log, a progress bar, throughput and MFU, and the loss graph."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from config import UserError
from files import atomic_write
from model import GPT

# Dense bf16 (fp16 where noted) tensor-core peak in TFLOP/s with fp32 accumulation, from the
# vendors' data sheets. The longest name whose words all occur in the device's name wins.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100": 989, "H100 PCIe": 756, "H100 NVL": 835, "A100": 312,
    "A40": 149.7, "A10": 125, "A10G": 70, "L40S": 362, "L40": 181, "L4": 121, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71,
    "V100": 125, "T4": 65,  # fp16: no bf16 units
}


def peak_flops(device: torch.device) -> float | None:
    """The data-sheet peak of a GPU in FLOP/s; None for a card not in the table, and for CPUs."""
    if device.type != "cuda":
        return None
    words = set(re.split(r"[\s\-_]+", torch.cuda.get_device_name(device)))
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= words]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known else None


def flops_per_token(model: GPT, sequence_length: int) -> int:
    """Forward and backward, PaLM's count (Chowdhery et al. 2022, appendix B): 6 per parameter that
    multiplies (all but the position table) plus 12 n_layer C T for attention, not halved for
    causality. 6 x 123,653,376 + 12 x 12 x 768 x 1024 = 855,166,464 for GPT-2 124M at T = 1024."""
    config = model.config
    multiplied = model.num_parameters() - model.transformer.wpe.weight.numel()
    return 6 * multiplied + 12 * config.n_layer * config.n_embd * sequence_length


class RunLog:
    """One flat JSON object a line, appended: at least step, kind and loss."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115, closed by `close`
        self.drop_half_written_line()

    def drop_half_written_line(self) -> None:
        """A run killed while it wrote a line leaves a part of one: cut it off before appending."""
        self.file.seek(0)
        whole = self.file.read().rfind(b"\n") + 1
        self.file.truncate(whole)

    def write(self, step: int, kind: str, **values) -> None:
        line = json.dumps({"step": step, "kind": kind, **values}, ensure_ascii=False)
        self.file.write(line.encode("utf-8") + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """kind -> step -> record. The last record of a step counts: a resumed run writes it again."""
    records: dict[str, dict[int, dict]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the run log {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.setdefault(record["kind"], {})[record["step"]] = record
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number} is no record of a run log ({error!r})") from None
    return records


def progress_bar(total: int, initial: int, description: str, *, unit: str = "step",
                 enabled: bool = True) -> tqdm:
    """A bar with time left: redrawn in place on a terminal, now and then elsewhere."""
    interactive = os.isatty(2)
    return tqdm(total=total, initial=initial, desc=description, unit=unit, disable=not enabled,
                dynamic_ncols=interactive, ncols=None if interactive else 120,
                mininterval=0.5 if interactive else 20, ascii=None if interactive else True,
                unit_scale=unit != "step", smoothing=0.05)


def draw_loss_graph(runs: Sequence[tuple[str, Path]], image: Path, title: str) -> None:
    """Draws the training and validation loss of one or several (label, run log) into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only when needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, path in runs:
        records = read_log(path)
        for kind, style in (("train", {"alpha": 0.5, "linewidth": 1}), ("val", {"marker": "o"})):
            points = sorted(records.get(kind, {}).items())
            if points:
                name = f"{label} {kind}" if len(runs) > 1 else kind
                axes.plot([step for step, _ in points], [record["loss"] for _, record in points],
                          label=name, **style)
    axes.set(title=title, xlabel="updates", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(image) as file:
        FigureCanvasAgg(figure).print_png(file)
