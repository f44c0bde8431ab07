"""Plots the loss, learning rate and gradient norm of one or more run logs into one PNG.

    python image/plot_loss.py out/pretrain                          # out/pretrain/loss.png
    python image/plot_loss.py out/a out/b --out a_and_b.png
    python image/plot_loss.py image/logs/recipes/*.jsonl --group --out image/recipes.png
"""

import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from image.plot_report import check_image
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.metrics import draw_runs


@dataclass(frozen=True)
class PlotConfig:
    logs: tuple[str, ...] = flag((), "metrics.jsonl files, or folders with one", positional=True,
                                  is_path=True)
    out: str | None = flag(None, "PNG file to write (default: loss.png beside the first log)",
                           is_path=True)
    title: str = flag("Loss", "title of the figure")
    group: bool = flag(False, "one color for all logs whose names agree up to the first _")


def main() -> None:
    config = parse_config(PlotConfig, description=__doc__)
    if not config.logs:
        raise UserError("no run log given: pass one or more metrics.jsonl files")
    paths = [path / "metrics.jsonl" if path.is_dir() else path
             for path in map(pathlib.Path, config.logs)]
    image = pathlib.Path(config.out or paths[0].parent / "loss.png")
    check_image(image)
    # label OUT_DIR/metrics.jsonl by its folder and other logs by their file name; if two labels
    # are equal, use whole paths
    runs = [(path.parent.name if path.stem == "metrics" else path.stem, path) for path in paths]
    if config.group:
        runs = [(label.partition("_")[0], path) for label, path in runs]
    elif len({label for label, _ in runs}) < len(runs):
        runs = [(str(path.parent if path.stem == "metrics" else path), path) for path in paths]
    draw_runs(runs, image, config.title)
    print(f"wrote {image}")


if __name__ == "__main__":
    run_main(main)
