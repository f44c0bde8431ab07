"""What ends a run before its last update: a signal, a rank that is gone, no memory, a loss that is
no number. Each gets one line, all ranks decide alike, and none waits for ever."""

import contextlib
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from minigpt2.checkpoint import list_checkpoints, step_of
from minigpt2.config import UserError, first_line
from minigpt2.distributed import Launch, connect_store, start, stop
from minigpt2.memory import is_out_of_memory

# torchrun's and SLURM's, Ctrl-C, SLURM's warning, a terminal that is gone
STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
AGAIN_SECONDS = 3.0  # torchrun passes a Ctrl-C on that the terminal sent to us already
BEAT_SECONDS = 1.0  # between two looks at the other ranks
SILENT_SECONDS = 30.0  # a rank that has not been heard of for so long is gone
MAX_SKIPPED = 3  # updates in a row
GO_ON = "--resume goes on from the newest checkpoint"


class Unbroken:
    """A text stream that goes on when its reader is gone: Ctrl-C also ends `| tee log`."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class StopRequest:
    """Remembers, while it is entered, that a signal asked this process to stop. The loop looks at
    `requested()` once an update; a second Ctrl-C ends the process at once."""

    def __init__(self):
        self.name: str | None = None  # of the signal
        self.since = 0.0
        self.before: dict = {}  # the handlers that were there

    def requested(self) -> bool:
        return self.name is not None

    def flag(self, device: torch.device) -> torch.Tensor:
        """() fp32, 1 if this process was asked to stop: to be summed over all ranks."""
        return torch.full((), float(self.requested()), device=device)

    def report(self, step: int, max_steps: int, folder: Path) -> str:
        return (f"{self.name or 'a signal to another rank'}: stopped after {step:,} of "
                f"{max_steps:,} updates: {folder}. {GO_ON}")

    def handle(self, number: int, frame) -> None:
        if self.name is None:
            self.name, self.since = signal.Signals(number).name, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # print() may be interrupted in its own middle
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{self.name}: saving, then stopping; Ctrl-C again after "
                                f"{AGAIN_SECONDS:.0f} s stops at once\n".encode())
        elif number == signal.SIGINT and time.monotonic() - self.since > AGAIN_SECONDS:
            raise KeyboardInterrupt

    def __enter__(self) -> "StopRequest":
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has not all of them
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                self.before[number] = signal.signal(number, self.handle)  # SIGHUP: not under nohup
        self.streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (stream and Unbroken(stream) for stream in self.streams)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        sys.stdout, sys.stderr = self.streams
        for number, handler in self.before.items():
            signal.signal(number, handler)


class LostRankError(UserError):
    """Another rank is gone: what this one fails of, but not the cause."""


class RankMonitor:
    """A thread that ends this process when another rank failed or fell silent, or when the torchrun
    that started it is gone: NCCL would wait for half an hour, and an orphan for ever.

    Every rank counts up a number in torchrun's store once a second and looks at those of the
    others. No clocks are compared, and a rank that is only slow goes on counting.
    """

    def __init__(self):
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.rank, self.world_size = 0, 1
        self.store: dist.Store | None = None
        self.leaving = threading.Event()
        self.asker = ThreadPoolExecutor(1)  # a store on a dead node may never answer
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> "RankMonitor":
        self.thread.start()  # torchrun may be gone before all ranks have met
        return self

    def watch(self, launch: Launch) -> None:
        """Begins to watch the other ranks, too. All ranks call this."""
        if launch.world_size > 1:
            self.rank, self.world_size = launch.rank, launch.world_size
            # no key of an attempt that torchrun restarted; and a connection of its own, since the
            # other one may be blocked
            prefix = launch.broadcast(secrets.token_hex(8))
            store = connect_store(timedelta(seconds=SILENT_SECONDS))
            self.store = dist.PrefixStore(prefix, store)

    def __exit__(self, kind, error, traceback) -> None:
        self.leaving.set()
        if self.store is not None and error is not None and kind is not LostRankError:
            name = "" if kind is UserError else f"{kind.__name__}: "
            with contextlib.suppress(RuntimeError):  # the store may be what is gone
                self.store.set("failed", f"rank {self.rank}: {name}{first_line(error)}")
        self.thread.join(BEAT_SECONDS)

    def ask(self) -> tuple[list[int], str | None]:
        """Counts this rank up; the counts of all ranks, and what one that failed has said."""
        self.store.add(f"alive/{self.rank}", 1)
        counts = [self.store.add(f"alive/{rank}", 0) for rank in range(self.world_size)]
        return counts, (self.store.get("failed").decode() if self.store.check(["failed"]) else None)

    def run(self) -> None:
        last, heard, looked = [], [], time.monotonic()
        while not self.leaving.wait(BEAT_SECONDS):
            if self.parent not in (None, os.getppid()):
                self.end(f"the torchrun that started rank {self.rank} is gone. {GO_ON}")
            if self.store is None:
                continue
            try:
                counts, failed = self.asker.submit(self.ask).result(SILENT_SECONDS)
            except (RuntimeError, TimeoutError) as error:
                self.end(f"the node of rank 0 does not answer ({first_line(error):.60}). {GO_ON}")
                return
            if failed is not None:
                self.end(failed)
            now = time.monotonic()
            if not last or now - looked > 5 * BEAT_SECONDS:
                # the first look; or this process slept, and the others perhaps as well
                last, heard = [-1] * self.world_size, [now] * self.world_size
            heard = [now if count != before else since
                     for count, before, since in zip(counts, last, heard, strict=True)]
            last, looked = counts, now
            if now - min(heard) > SILENT_SECONDS:
                self.end(f"rank {heard.index(min(heard))} has not been heard of for "
                         f"{SILENT_SECONDS:.0f} s: it was killed, or its node is gone. {GO_ON}")

    def end(self, why: str) -> None:
        """Ends this process, whatever its other threads wait for, unless it ends by itself."""
        if self.leaving.is_set():
            return
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node, not in the progress bar's
            print(f"\n{os.path.basename(sys.argv[0])}: error: {why}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(1)


@contextlib.contextmanager
def launched(device: str, deterministic: bool = False) -> Iterator[Launch]:
    """A process of the run, from joining the others to leaving them; see `distributed.start`.

    Raises UserError in place of what PyTorch says when memory is out or another rank is gone."""
    with RankMonitor() as watch:
        try:
            launch = start(device, deterministic)
            watch.watch(launch)
            yield launch
            launch.barrier()  # none leaves, and falls silent, while another still writes
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise UserError(
                    f"out of memory ({first_line(error):.120}): lower --micro-batch-size, or let "
                    "--micro-batch-size auto find the largest that fits") from error
            if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
                raise LostRankError("the connection to another rank broke: it was killed, or its "
                                    f"node is gone. {GO_ON}") from error
            raise
    stop()  # not after an error: it would wait for ranks that wait for this one


def agree(loss_sum: torch.Tensor, grad_norm: torch.Tensor, request: StopRequest,
          launch: Launch) -> tuple[float, float, bool]:
    """What all ranks know of an update before they make it: its loss, the mean of their `loss_sum`
    (), the gradient norm () as it is, and whether any of them was asked to stop.

    One small reduction, and the one host synchronization of an update. The gradients are
    all-reduced already, so that no rank decides otherwise than another.
    """
    sums = torch.stack([loss_sum, request.flag(launch.device)])  # (2,)
    loss, stopping = launch.sum(sums).tolist()
    return loss / launch.world_size, grad_norm.item(), stopping > 0


def count_skipped(skipped: int, step: int, loss: float, grad_norm: float,
                  scaler: torch.amp.GradScaler, out_dir: Path) -> int:
    """How many updates in a row were skipped, after update `step` of this loss and gradient norm,
    which are the same on all ranks. Raises UserError, on all of them, when there were too many.

    float16's scaler begins too high on purpose and halves with every overflow: while it still can,
    an overflow of the gradients alone is no fault, and neither counted nor said.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return 0
    if scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() >= 1:
        return skipped
    if skipped + 1 < MAX_SKIPPED:
        return skipped + 1
    before = [path for path in list_checkpoints(out_dir) if step_of(path) <= step - skipped]
    good = f"the last checkpoint before them is {before[-1]}" if before else "none is older"
    raise UserError(f"the run has diverged: {MAX_SKIPPED} updates in a row were skipped, since the "
                    f"loss ({loss}) or the gradient norm ({grad_norm}) was not finite; lower "
                    f"--max-lr ({good})")
