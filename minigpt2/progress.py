"""The progress bar of all scripts. This file does not import torch: the data scripts use it too."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(total: int, initial: int, description: str, *, unit: str = "step",
                 enabled: bool = True, over: Iterable | None = None) -> tqdm:
    """A tqdm bar, over the items of `over` if given. Without a terminal, a line every 20 s."""
    interactive = sys.stderr.isatty()
    return tqdm(over, total=total, initial=initial, desc=description, unit=unit,
                disable=not enabled, dynamic_ncols=interactive, ncols=None if interactive else 120,
                mininterval=0.5 if interactive else 20, ascii=None if interactive else True,
                unit_scale=unit != "step", smoothing=0.05)
