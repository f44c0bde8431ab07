"""Draws the responses of several models side by side, from what inference.py has printed.

    python image/plot_samples.py stories_base.txt stories_tuned.txt --out samples.png

One column per file, headed by the part of its name after the last _, and one row per prompt, which
stands in gray above each response. Nothing is left out: what a response lacks, the model did not
write, or its token limit cut.
"""

import io
import pathlib
import re
import sys
import textwrap
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from image.plot_report import check_image
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import atomic_write

PRINTED = re.compile(r"prompt:   (.*?)\nresponse: (.*?)\n {10}\[(.*?)\]\n", re.DOTALL)
COLUMN, LINE, FONT = 4.0, 0.125, 7.5  # inches, inches, points
WIDTH = 64  # characters of a line


@dataclass(frozen=True)
class SamplesConfig:
    files: tuple[str, ...] = flag((), "output of inference.py, one model each", positional=True,
                                  is_path=True)
    out: str = flag("samples.png", "PNG file to write", is_path=True)


def read_samples(path: pathlib.Path) -> list[tuple[list[str], list[str]]]:
    """The lines of each prompt and of its response, wrapped. Raises UserError if there are none."""
    found = PRINTED.findall(path.read_text(encoding="utf-8", errors="replace"))
    if not found:
        raise UserError(f"{path} holds no prompt and response as inference.py prints them")
    return [(textwrap.wrap(prompt, WIDTH), [
        line for part in [*text.splitlines(), f"[{end}]"] for line in textwrap.wrap(part, WIDTH)])
        for prompt, text, end in found]


def main() -> None:
    from matplotlib.figure import Figure  # slow to import
    from PIL import Image  # which Matplotlib requires
    config = parse_config(SamplesConfig, description=__doc__)
    image, paths = pathlib.Path(config.out), list(map(pathlib.Path, config.files))
    check_image(image)
    columns = list(map(read_samples, paths))
    if len({len(column) for column in columns}) != 1:
        raise UserError("expected one file or more, with equally many prompts")
    heights = [max(len(prompt) + len(text) for prompt, text in row) + 1
               for row in zip(*columns, strict=True)]
    figure = Figure(figsize=(COLUMN * len(columns), LINE * (sum(heights) + 3)), dpi=100)
    height = figure.get_figheight()

    def write(lines: list[str], column: int, line: int, **style) -> None:
        figure.text((column + 0.03) / len(columns), 1 - LINE * (line + 1) / height,
                    "\n".join(lines), va="top", fontsize=FONT, parse_math=False,
                    linespacing=LINE * 72 / FONT, **style)

    for column, (path, samples) in enumerate(zip(paths, columns, strict=True)):
        write([path.stem.rpartition("_")[2]], column, 0, weight="bold")
        for row, (prompt, text) in enumerate(samples):
            top = 2 + sum(heights[:row])
            write(prompt, column, top, color="gray")
            write(text, column, top + len(prompt))
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with atomic_write(image) as file:  # in shades of gray, a third of the size
        Image.open(drawn).convert("L").save(file, format="png", optimize=True)
    print(f"wrote {image}")


if __name__ == "__main__":
    run_main(main)
