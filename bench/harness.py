"""How the benchmarks measure: A and B alternate within one run, and their medians are compared.

What needs its own settings, allocator or memory peak runs in its own process. Every result is
printed and, with --log, appended to a file as one JSON object per line.
"""

import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from minigpt2.config import ROOT, UserError, flag, flag_name, parse_config, run_main, share_cores
from minigpt2.distributed import start
from minigpt2.metrics import run_metadata

Step = Callable[[], float]
WORKER: dict[str, Step] = {}  # in a worker process: the step that it runs


@dataclass(frozen=True)
class BenchConfig:
    quick: bool = flag(False, "smoke test: a small model, two repetitions")
    repeats: int = flag(7, "timed repetitions", minimum=1)
    log: str | None = flag(None, "append the results to this JSON Lines file", is_path=True)

    @property
    def rounds(self) -> int:
        return 2 if self.quick else self.repeats


def run_bench(bench: Callable[[BenchConfig], None], cls: type[BenchConfig], doc: str) -> None:
    """The `main` of every benchmark. The first record has machine, settings and versions."""
    def main() -> None:
        config = parse_config(cls, description=doc)
        share_cores()  # inherited by the processes that import PyTorch anew
        cpuinfo = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8")
                         if cpuinfo.exists() else "")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record(config, "machine", cores=os.cpu_count(),
               processor=name[1] if name else platform.processor(),
               **run_metadata(config, world_size=1, device=device, data={}))
        bench(config)
    run_main(main)


def measure_limits(config: BenchConfig, device: torch.device, dtypes: Iterable[torch.dtype],
                   size: int, num_bytes: int) -> list[float]:
    """The FLOP/s of square matrix products in each dtype, and the bytes per second read by a sum:
    what no model on this machine can exceed."""
    start(str(device))  # the product that training uses
    threads, rates = torch.get_num_threads(), {}

    def median(code: str, x: torch.Tensor) -> float:
        timer = Timer(code, globals={"x": x}, num_threads=threads)
        return timer.blocked_autorange(min_run_time=2).median  # synchronizes with a GPU

    bandwidth = num_bytes / median("x.sum()", torch.ones(num_bytes // 4, device=device))
    for dtype in dtypes:
        x = torch.randn(size, size, device=device).to(dtype)
        rates[dtype] = 2 * size**3 / median("x @ x", x)
    record(config, "limits", device=device.type, threads=threads, size=size,
           read_gb_per_sec=bandwidth / 1e9,
           **{f"{str(dtype)[6:]}_gflops": rate / 1e9 for dtype, rate in rates.items()})
    return list(rates.values())


def record(config: BenchConfig, name: str, **figures) -> None:
    """Prints the figures and, with --log, appends them to that file."""
    figures = {key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
               for key, value in figures.items()}
    print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else
                                  f"{key} {value}" for key, value in figures.items()))
    if config.log:
        with open(config.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"bench": name, **figures}) + "\n")


def seconds(call: Callable[[], object]) -> float:
    t0 = time.perf_counter()
    call()
    return time.perf_counter() - t0


def alternate(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Runs A, B, A, B, ...; returns the median seconds of each after one warm-up round."""
    durations = [[seconds(call) for call in calls.values()] for _ in range(rounds + 1)]
    return dict(zip(calls, map(statistics.median, zip(*durations[1:], strict=True)), strict=True))


def start_worker(make: Callable[..., Step], *arguments) -> ProcessPoolExecutor:
    """A process that builds `step = make(*arguments)`; submit `run_step` to it. A name that ends
    with "spinning" gets the default of GNU's OpenMP, without `share_cores`."""
    spinning = str(arguments[:1]).endswith("spinning',)")
    worker = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exit_with_benchmark)
    with unittest.mock.patch.dict(os.environ, {"GOMP_SPINCOUNT": "300000"} if spinning else {}):
        worker.submit(build_step, make, arguments).result()
    return worker


def exit_with_benchmark() -> None:
    """As exit_with_parent of pretrain_data.corpus, whose imports would count in every peak."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def build_step(make: Callable[..., Step], arguments: tuple) -> None:
    WORKER["step"] = make(*arguments)


def run_step() -> tuple[float, float]:
    """In a worker process: the seconds of one step, and its result."""
    t0 = time.perf_counter()
    result = WORKER["step"]()
    return time.perf_counter() - t0, result


def peak_bytes() -> int:
    """Peak memory of this process: on the GPU if it used one, else resident."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":  # where it also counts the process before `exec`
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@dataclass(frozen=True)
class Timing:
    seconds: float  # median of all steps but the first, which warms up; of a single step, its own
    results: list[float]  # of all steps
    peak: int  # bytes


def compare(names: Iterable[str], steps: int, make: Callable[..., Step],
            *arguments) -> dict[str, Timing]:
    """Runs alternating steps of `make(name, *arguments)`, with one process per name. Raises the
    error of a step that fails, and UserError if a process dies."""
    if "hugging_face" in names and importlib.util.find_spec("transformers") is None:
        raise UserError("the comparison needs Hugging Face: pip install -r requirements-test.txt")
    workers, taken = {}, {name: [] for name in names}
    try:
        for name in names:
            workers[name] = start_worker(make, name, *arguments)
        for name in [*names] * steps:
            taken[name].append(workers[name].submit(run_step).result())
        peaks = {name: worker.submit(peak_bytes).result() for name, worker in workers.items()}
    except BrokenProcessPool:
        raise UserError("a benchmark process died; its output is above") from None
    finally:
        for worker in workers.values():
            worker.shutdown()
    return {name: Timing(statistics.median([duration for duration, _ in pairs[1:] or pairs]),
                         [result for _, result in pairs], peaks[name])
            for name, pairs in taken.items()}


def run_script(script: str, flags: dict[str, object]) -> None:
    """Runs `python script --flag value ...` silently. Raises UserError with its last error line."""
    words = [str(word) for name, value in flags.items() for word in (flag_name(name), value)]
    result = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True,
                            text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no error message"])[-1]
        raise UserError(f"{script} ended with {result.returncode}: {last}")
