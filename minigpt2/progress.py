"""The progress bar. In a file of its own, without torch, for scripts that do not need that."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress_bar(total: int, initial: int, description: str, *, unit: str = "step",
                 enabled: bool = True, over: Iterable | None = None) -> tqdm:
    """A bar with time left: redrawn in place on a terminal, now and then elsewhere. It counts what
    it is told by `update`, or the items of `over`."""
    interactive = sys.stderr.isatty()
    return tqdm(over, total=total, initial=initial, desc=description, unit=unit,
                disable=not enabled, dynamic_ncols=interactive, ncols=None if interactive else 120,
                mininterval=0.5 if interactive else 20, ascii=None if interactive else True,
                unit_scale=unit != "step", smoothing=0.05)
