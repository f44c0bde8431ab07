"""What a run reports: a JSONL log, throughput and MFU, and the loss graph."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

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

    def __init__(self, path: Path, fresh: bool = False):
        """`fresh` begins anew, over what a run left that did not get to its first checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115, closed by `close`
        self.drop_half_written_line()

    def drop_half_written_line(self) -> None:
        """A run killed while it wrote a line leaves a part of one: cut it off before appending."""
        self.file.seek(0)
        whole = self.file.read().rfind(b"\n") + 1
        self.file.truncate(whole)

    def write(self, step: int, kind: str, **values) -> None:
        """Appends a record; a number that is not finite, which JSON has not, becomes null."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in values.items()}
        line = json.dumps({"step": step, "kind": kind, **finite}, ensure_ascii=False)
        self.file.write(line.encode("utf-8") + b"\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_log(path: Path) -> dict[str, dict[int, dict]]:
    """kind -> step -> record. The last record of a step counts: a resumed run writes it again."""
    records: dict[str, dict[int, dict]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the run log {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError(f"step is {record['step']!r}")
            records.setdefault(record["kind"], {})[record["step"]] = record
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} line {number} is no record of a run log ({error!r})") from None
    return records


def check_image(image: Path) -> None:
    """Raises UserError where no PNG can be written, before the hours that it is to show."""
    if image.suffix != ".png":
        raise UserError(f"{image} does not end in .png, which is what is drawn")
    above = next(folder for folder in image.absolute().parents if folder.exists())
    if image.is_dir() or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{image} cannot be written there: choose another file")


def draw_loss_graph(runs: Sequence[tuple[str, Path]], image: Path, title: str) -> None:
    """Draws the training and validation loss of one or several (label, run log) into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: only when needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, path in runs:
        records = read_log(path)
        for kind, style in (("train", {"alpha": 0.5, "linewidth": 1}), ("val", {"marker": "o"})):
            losses = {step: record.get("loss") for step, record in records.get(kind, {}).items()}
            points = [(step, loss) for step, loss in sorted(losses.items())
                      if isinstance(loss, int | float)]
            if points:
                name = f"{label} {kind}" if len(runs) > 1 else kind
                axes.plot(*zip(*points, strict=True), label=plain(name), **style)
    if not axes.lines:
        raise UserError(f"no loss in {', '.join(str(path) for _, path in runs)}: nothing to draw")
    axes.set(title=plain(title), xlabel="updates", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(image) as file:
        FigureCanvasAgg(figure).print_png(file)


def plain(text: str) -> str:
    """For matplotlib, which would take what stands between dollars for a formula."""
    return text.replace("$", r"\$")
