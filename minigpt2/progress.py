"""The progress bar of all scripts. This file does not import torch: the data scripts use it too."""

import os
import sys
from collections import deque
from collections.abc import Iterable
from statistics import fmean
from threading import Thread
from time import perf_counter, sleep

from tqdm import tqdm

LINE_SECONDS = 20.0  # between two lines


class Pace:
    """Seconds of steps, and of parts such as validating, which recur every n steps."""

    def __init__(self, milestones: Iterable[int] = ()):
        self.milestones, self.overhead_s = set(milestones), 0.0  # of all parts but steps
        self.steps = deque(maxlen=100)  # seconds of the last usual ones
        self.parts = {}  # (name, every) -> seconds of the last time
        self.part, self.every, self.since = "", 0, perf_counter()  # in progress; "": a step
        self.doing, self.is_usual = "first step", False

    def begin(self, part: str = "", every: int = 0) -> None:
        """Ends the part in progress and begins another, or steps."""
        now = perf_counter()
        if self.part:
            self.parts[self.part, self.every] = now - self.since
            self.overhead_s += now - self.since
        if self.part or part:
            self.doing = part or ("" if self.is_usual else "first step")
            self.part, self.every, self.since = part, every, now

    def end_step(self) -> float:
        """Returns its seconds; those of the first step, and of one that compiles, are unusual."""
        seconds = perf_counter() - self.since
        if self.is_usual:
            self.steps.append(seconds)
        self.doing, self.is_usual, self.since = "", True, self.since + seconds
        return seconds

    def compiling(self, *_) -> None:
        self.doing, self.is_usual = "compiling", False

    def left(self, step: int, last: int) -> float | None:
        """The seconds from `step` to the `last` step; None before a usual step."""
        if not self.steps:
            return None
        usual = fmean(self.steps)
        in_progress = self.parts.get((self.part, self.every), 0.0) if self.part else usual
        left = (last - step) * usual + (in_progress if self.part else 0.0)
        for (_, every), seconds in [*self.parts.items()]:  # another thread may add one
            if every:
                others = sum(step < one and one % every > 0 for one in self.milestones)
                left += seconds * (last // every - step // every + others)
        return max(0.0, left - min(in_progress, perf_counter() - self.since))


class Bar(tqdm):
    """A tqdm bar; with a `pace`, that of a run, which a thread draws, however long a step takes."""

    def __init__(self, *arguments, pace: Pace | None, seconds: float, **options):
        self.pace = pace
        super().__init__(*arguments, mininterval=float("inf") if pace else seconds, **options)
        if pace is not None and not self.disable:
            Thread(target=self.draw, args=[seconds], daemon=True).start()

    def draw(self, seconds: float) -> None:
        while not self.disable:  # as a closed bar is
            sleep(seconds)
            self.refresh()

    @property
    def format_dict(self) -> dict:
        if self.pace is None:
            return super().format_dict
        left, timed = self.pace.left(self.n, self.total), {name for name, _ in [*self.pace.parts]}
        more = "" if "validating" in timed else " + validations"  # none yet after --resume
        return super().format_dict | {
            "bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {left} left{postfix}]",
            "left": "?" if left is None else self.format_interval(left) + more,
            "prefix": ", ".join(filter(None, (self.desc, self.pace.doing)))}


class Lines:
    """Standard error, in whole lines: for a bar that is not on a terminal."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def progress_bar(total: int, initial: int, label: str, *, unit: str = "step", enabled: bool = True,
                 over: Iterable | None = None, pace: Pace | None = None) -> Bar:
    """A bar, over the items of `over` if given. Without a terminal, a line every 20 s."""
    # A terminal without a size, as some containers have, would show nothing
    is_drawn = sys.stderr and sys.stderr.isatty() and os.get_terminal_size(2).columns
    options = ({"seconds": 0.5, "dynamic_ncols": True} if is_drawn else
               {"seconds": LINE_SECONDS, "ncols": 120, "ascii": True, "file": Lines()})
    return Bar(over, total=total, initial=initial, desc=label, unit=unit, pace=pace,
               disable=not enabled, unit_scale=unit == "token", smoothing=0.05, **options)
