"""Fault tolerance: signals, lost ranks, non-finite losses, out of memory."""

import contextlib
import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta

import torch
import torch.distributed as dist

from minigpt2.config import UserError, discard, first_line, is_out_of_memory
from minigpt2.distributed import Launch, autocast, start
from minigpt2.loss import on_cpu
from model import GPT

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")  # USR1: SLURM's early warning
REPEAT_SECONDS = 3.0  # torchrun forwards a Ctrl-C that the terminal has sent to us already
HEARTBEAT_SECONDS = 1.0
SILENT_SECONDS = 30.0  # a rank with no heartbeat for this long is lost
MAX_SKIPPED = 3  # consecutive steps
RESUME_HINT = "--resume continues from the newest checkpoint"
CPU_MICRO_BATCH = 16  # sequences: on a CPU, more are not faster
HEADROOM_BYTES = 512 * 2**20  # which a trial leaves free, for evaluation and sampling


class IgnoreBrokenPipe:
    """A text stream that ignores write errors: Ctrl-C also ends the `tee` of `| tee log`."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            try:
                self.stream.flush()
            except BrokenPipeError:
                discard(self.stream)


class StopRequest(contextlib.ExitStack):
    """While entered, a stop signal is only recorded; a second Ctrl-C ends the process at once."""

    name, since = None, 0.0  # of the signal; the stack restores signal handlers, output streams

    def requested(self) -> bool:
        return self.name is not None

    def handle(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # os.write: print() is not reentrant
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self.name}: saving; Ctrl-C again stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.since > REPEAT_SECONDS:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.callback(signal.signal, number, signal.signal(number, self.handle))
        out, err = (stream and IgnoreBrokenPipe(stream) for stream in (sys.stdout, sys.stderr))
        self.enter_context(contextlib.redirect_stdout(out))
        self.enter_context(contextlib.redirect_stderr(err))
        for stream in filter(None, (out, err)):
            self.callback(stream.flush)
        return self


class RankMonitor(contextlib.AbstractContextManager):
    """A thread that ends this process when another rank fails, its torchrun is killed, or a rank
    no longer increments its counter in torchrun's store, as all do once a second."""

    def __init__(self):
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.rank, self.world_size, self.store = 0, 1, None  # until the ranks have met
        self.leaving = threading.Event()
        self.store_thread = ThreadPoolExecutor(1)  # a store on a dead node may never answer
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()  # torchrun may die before the ranks have met

    def watch(self, launch: Launch) -> None:
        """Starts to watch the other ranks as well."""
        if launch.store is not None:
            self.rank, self.world_size = launch.rank, launch.world_size
            store = launch.store.clone()  # the connection of the process group may be blocked
            store.set_timeout(timedelta(seconds=SILENT_SECONDS))
            self.store = dist.PrefixStore("monitor", store)

    def __exit__(self, kind, error, traceback) -> None:
        is_cause = error is not None and not self.leaving.is_set()
        self.leaving.set()
        if self.store is not None and is_cause:
            status, name = (2, "") if kind is UserError else (1, f"{kind.__name__}: ")
            with contextlib.suppress(RuntimeError):  # the store itself may be lost
                self.store.set("failed", f"{status}rank {self.rank}: {name}{first_line(error)}")
        self.thread.join(HEARTBEAT_SECONDS)

    def heartbeat(self) -> tuple[list[int], str | None]:
        """All counters, and the exit status (one digit) and message of a failed rank."""
        self.store.add(f"alive/{self.rank}", 1)
        counts = [self.store.add(f"alive/{rank}", 0) for rank in range(self.world_size)]
        return counts, (self.store.get("failed").decode() if self.store.check(["failed"]) else None)

    def run(self) -> None:
        unchanged = {}  # (rank, its counter) -> for how many heartbeats
        while not self.leaving.wait(HEARTBEAT_SECONDS):
            if self.parent not in (None, os.getppid()):
                self.end(f"the torchrun that started rank {self.rank} was killed. {RESUME_HINT}")
            if self.store is None:
                continue
            try:
                beat = self.store_thread.submit(self.heartbeat)
                for _ in range(round(SILENT_SECONDS / HEARTBEAT_SECONDS)):  # no clock, see below
                    wait([beat], HEARTBEAT_SECONDS)
                counts, failed = beat.result(0)
            except (RuntimeError, TimeoutError) as error:
                self.leaving.wait(HEARTBEAT_SECONDS)  # rank 0 may host the store, and have finished
                self.end(f"rank 0's node does not answer ({first_line(error):.60}). {RESUME_HINT}")
                return
            if failed is not None:
                self.end(failed[1:], int(failed[0]))
            unchanged = {seen: unchanged.get(seen, -1) + 1 for seen in enumerate(counts)}
            for (rank, _), beats in unchanged.items():  # no clock: all may have been suspended
                if beats * HEARTBEAT_SECONDS > SILENT_SECONDS:
                    self.end(f"rank {rank} is lost: no heartbeat for {SILENT_SECONDS:.0f} s "
                             f"(killed, or its node is down). {RESUME_HINT}")

    def end(self, why: str, status: int = 1) -> None:
        """Exits at once, even if other threads are blocked; no effect during a normal exit."""
        if self.leaving.is_set():
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node, below the progress bar
            print(f"\n{os.path.basename(sys.argv[0])}: error: {why}", file=sys.stderr, flush=True)
        os._exit(status)


@contextlib.contextmanager
def launched(device: str, deterministic: bool = False) -> Iterator[Launch]:
    """Joins the process group. Out of memory, a lost rank or a failed compiler raise UserError."""
    with RankMonitor() as monitor:
        try:
            launch = start(device, deterministic)
            monitor.watch(launch)
            yield launch
            launch.gather(None)  # no rank falls silent while another is still writing
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(f"out of memory ({first_line(error):.120}): lower "
                                "--micro-batch-size, --batch-tokens or --max-tokens (trainer.py, "
                                "finetune.py: --micro-batch-size auto)") from error
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                monitor.leaving.set()  # a consequence: the cause is reported by another rank
                raise UserError("lost the connection to another rank: it was killed, or its node "
                                f"is down. {RESUME_HINT} ({str(error)[-200:]!r})") from error
            if isinstance(error, torch._dynamo.exc.TorchDynamoException):  # a missing compiler
                raise UserError(f"torch.compile failed ({' '.join(str(error).split()):.400}): "
                                "install what it lacks, or train with --no-compile") from error
            raise
    if dist.is_initialized():  # not after an error: it would wait for ranks that wait for this one
        dist.destroy_process_group()


def count_skipped(skipped: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler) -> int:
    """The number of consecutive skipped steps after another step. Raises UserError at MAX_SKIPPED.
    The float16 scaler starts too high: down to a scale of 1, gradient overflows do not count."""
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return 0
    if scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1:
        return skipped
    if skipped + 1 < MAX_SKIPPED:
        return skipped + 1
    raise UserError(f"the run has diverged: {MAX_SKIPPED} consecutive steps had a non-finite loss "
                    f"({loss}) or gradient norm ({grad_norm}); such updates are skipped: lower "
                    f"--max-lr; {RESUME_HINT}")


def find_micro_batch(model: GPT, candidates: list[int], *, launch: Launch, dtype: torch.dtype,
                     compiled: bool, sequence_length: int, optimizer_bytes: int) -> int:
    """The first of `candidates` (sequences, largest first) whose step fits on every rank; on a CPU,
    the first of at most CPU_MICRO_BATCH. A collective, before DDP. Raises UserError."""
    if on_cpu(launch.device):
        return next((size for size in candidates if size <= CPU_MICRO_BATCH), candidates[-1])
    for size in candidates:
        launch.print0(f"--micro-batch-size auto: trying {size} x {sequence_length} tokens")
        fits = step_fits(model, size, sequence_length, launch.device, dtype, optimizer_bytes)
        model.zero_grad(set_to_none=True)
        gc.collect()  # the frames of an error may hold tensors in a reference cycle
        torch.cuda.empty_cache()
        failed_ranks = launch.sum(torch.tensor(0.0 if fits else 1.0)).item()
        if compiled and (failed_ranks or launch.world_size > 1):
            torch.compiler.reset()  # each size has its own graph, and DDP splits it differently
        if not failed_ranks:
            return size
    raise UserError(f"not even a micro-batch of {candidates[-1]} x {sequence_length} tokens fits "
                    f"on {launch.device}: try --activation-checkpointing or shorter sequences")


def step_fits(model: GPT, size: int, sequence_length: int, device: torch.device,
              dtype: torch.dtype, optimizer_bytes: int) -> bool:
    """Whether a step fits beside `optimizer_bytes` still to come and headroom; leaves gradients."""
    try:
        _ballast = torch.empty(optimizer_bytes + HEADROOM_BYTES, dtype=torch.uint8, device=device)
        for parameter in model.parameters():  # as in most micro-steps; DDP's buckets
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.zeros(2, size, sequence_length, dtype=torch.int64, device=device)
        with autocast(device, dtype):
            _, loss = model(*tokens, reduction="sum", return_logits=False)
        loss.backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
