"""How bench.py measures: A and B in turn inside one run, each in a process of its own if it should
not profit from the other's settings; medians; one JSON object a line in a log."""

import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt2.config import UserError, flag


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = flag((), "what to measure", positional=True)
    quick: bool = flag(False, "a small model and few repetitions: whether it runs, not how fast")
    repeats: int = flag(7, "measurements of each kind, in turn", minimum=1)
    files: str | None = flag(None, "data: documents, as a quoted glob or a folder (default: the "
                                   "embedded corpus)")
    max_documents: int = flag(40_000, "data: of them, so many are used", minimum=1)
    workers: int = flag(2, "data: the most processes that tokenize", minimum=1)
    data_dir: str | None = flag(None, "recipes: token shards with 2.2M tokens or more")
    out_dir: str = flag("out/recipes", "recipes: where the runs go")
    log: str | None = flag(None, "append the figures to this file, one JSON object a line")

    @property
    def rounds(self) -> int:
        """Measurements of each kind that count."""
        return 2 if self.quick else self.repeats


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def in_turn(repeats: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of every measure, taken A, B, C, A, B, C, ... after one unmeasured round."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(repeats + 1):
        for name, measure in measures.items():
            value = measure()
            if round_:
                values[name].append(value)
    return {name: statistics.median(taken) for name, taken in values.items()}


def record(config: BenchConfig, name: str, **figures) -> None:
    """Prints the figures and, with --log, appends them to that file."""
    print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else
                                  f"{key} {value}" for key, value in figures.items()), flush=True)
    if config.log:
        with open(config.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"bench": name, **figures}) + "\n")


def machine() -> dict:
    """What the figures were measured on."""
    facts = {"cores": os.cpu_count(), "processor": processor(),
             "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def processor() -> str:
    """The name that the processor gives itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def held_bytes() -> int:
    """The most bytes that this process has held so far, in memory (VmHWM) and, where it used one,
    on a GPU: of the two, the one that it was about."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("no /proc here, where the peak of a process's memory is read")
    return 1024 * int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0])


class Contestant:
    """A process of its own, which makes a step once, `make(*arguments)`, and takes it on request:
    its allocator, its settings and its peak of memory are not those of the others."""

    def __init__(self, make: Callable[..., Callable[[], float]], *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.results: list[float] = []  # what the steps returned

    def step(self) -> float:
        """Takes one step; returns its seconds."""
        taken, result = self.ask(True)
        self.results.append(result)
        return taken

    def stop(self) -> int:
        """Ends the process; returns the most bytes that it held."""
        peak = self.ask(False)
        self.process.join()
        return peak

    def ask(self, go_on: bool):
        try:
            self.pipe.send(go_on)
            return self.pipe.recv()
        except (EOFError, OSError):  # it is gone
            self.process.join()
            raise UserError("a process that was measured ended with "
                            f"{self.process.exitcode}: what it printed says why") from None


@dataclass(frozen=True)
class Taken:
    """What a contestant took: the seconds of every step but the first, what all steps returned, the
    most bytes it held."""

    seconds: list[float]
    results: list[float]
    peak: int

    def rate(self, count: int) -> float:
        """Of `count` things a step, how many a second: the median."""
        return count / statistics.median(self.seconds)


def contest(steps: int, runs: dict[str, Contestant]) -> dict[str, Taken]:
    """So many steps of each, in turn: A, B, C, A, B, C, ..."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            taken[name].append(run.step())
    return {name: Taken(taken[name][1:], run.results, run.stop()) for name, run in runs.items()}


def serve(pipe, make: Callable[..., Callable[[], float]], arguments: tuple) -> None:
    step = make(*arguments)
    while pipe.recv():
        begun = time.perf_counter()
        result = step()
        pipe.send((time.perf_counter() - begun, result))
    pipe.send(held_bytes())


def peak_memory(command: list[str]) -> float | None:
    """The most MiB that a command and its children held together, looked at every 20 ms; pages that
    they share are counted once. None where there is no /proc."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                     start_new_session=True), 0
    while process.poll() is None:
        held = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.getpgid(int(path.name)) == process.pid:
                    text = (path / "smaps_rollup").read_text(encoding="utf-8")
                    held += int(text.split("Pss:")[1].split()[0]) if "Pss:" in text else 0
        peak = max(peak, held)
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with {process.returncode}")
    return peak / 1024


def run_quietly(command: list[str], **environment: str) -> None:
    """Runs a command without showing what it prints. Raises UserError with its last line if it
    fails."""
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"{Path(command[1]).name} ended with {done.returncode}: {last}")


def python_script(name: str, *flags: object) -> list[str]:
    """The command line of one of the scripts beside this file."""
    return [sys.executable, str(Path(__file__).resolve().parents[1] / name), *map(str, flags)]
