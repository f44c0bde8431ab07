"""One process or many: torchrun's environment, devices, dtypes, and the few collectives used."""

import contextlib
import ctypes
import functools
import os
import re
import sys
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from minigpt2.config import UserError
from minigpt2.loss import IGNORE_INDEX
from minigpt2.progress import progress_bar
from model import GPT

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
SamplingDtype = Literal[Dtype, "int8"]
POLL_SECONDS = 0.05  # between two reads of the store while ranks find each other


@dataclass(frozen=True)
class Launch:
    """Rank, world size and device of this process; rank 0 of 1 outside torchrun."""

    rank: int  # among all processes of all nodes
    world_size: int
    device: torch.device
    store: dist.Store | None = None  # of several ranks, for this attempt only

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def print0(self, *values) -> None:
        if self.is_master:
            print(*values)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks; a collective, as are the next three."""
        if self.world_size > 1:
            tensor = tensor.to(self.device, copy=True)  # on the device of the process group
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """A picklable value from every rank, by rank. No rank returns before all have called it."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def check_same(self, facts: dict, except_for: Iterable[str] = ()) -> None:
        """Raises UserError, on every rank, if one of the facts differs between ranks."""
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, 1):
            for name in sorted(first.keys() - {"device", "device_name", "git_commit", *except_for}):
                if theirs.get(name) != first[name]:
                    raise UserError(
                        f"{name} differs: {first[name]!r:.80} on rank 0, {theirs.get(name)!r:.80} "
                        f"on rank {rank}; all nodes need the same code, flags, packages and data")

    def first_choice(self, key: str, choice: str) -> str:
        """The first choice, other than "", of any rank under this key. Waits for no other rank."""
        return choice if self.store is None else self.store.compare_set(key, "", choice).decode()


def start(device: str, deterministic: bool = False) -> Launch:
    """Joins torchrun's process group, NCCL on GPUs, gloo elsewhere. Raises UserError."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required by cuBLAS
        torch.use_deterministic_algorithms(True)
    rank, local_rank, world_size, local_world_size = read_launch()
    if world_size > 1 and re.fullmatch(r"cuda:\d+", device):
        raise UserError(f"--device {device} would put every process on one GPU: use --device cuda")
    torch_device = pick_device(device, local_rank, local_world_size)
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
    elif torch_device.type == "cpu":
        keep_freed_memory()
        use_fastest_exact_matmul()
    store = None
    if world_size > 1:
        backend, gpu = ("nccl", torch_device) if torch_device.type == "cuda" else ("gloo", None)
        timeout = timedelta(minutes=30)  # rank 0 may read a checkpoint from a slow disk meanwhile
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                              is_master=hosts, timeout=timeout, wait_for_workers=False)
        store = dist.PrefixStore(agree_on_attempt(store, rank, world_size), store)
        # The groups of two backends would wait for each other's ranks until the timeout
        store.set(f"backend/{rank}", backend)
        if any(store.get(f"backend/{other}") != backend.encode() for other in range(world_size)):
            raise UserError(f"--device {device}: only some ranks have a usable GPU: see nvidia-smi")
        dist.init_process_group(backend, rank=rank, world_size=world_size, store=store,
                                timeout=timeout, device_id=gpu)
    return Launch(rank, world_size, torch_device, store)


def read_launch() -> tuple[int, int, int, int]:
    """torchrun's rank, also on this node, and numbers of ranks; else (0, 0, 1, 1). UserError."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not given.keys() & set(names[:3]):
        return 0, 0, 1, 1  # MASTER_ADDR and MASTER_PORT alone do no harm
    with contextlib.suppress(KeyError, ValueError):  # missing, or not a number
        rank, local_rank, world_size = (int(given[name]) for name in names[:3])
        meet = world_size == 1 or (given["MASTER_ADDR"] and 0 < int(given["MASTER_PORT"]) < 2**16)
        if meet and 0 <= local_rank <= rank < world_size:
            return rank, local_rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    raise UserError(f"launch variables {given} are missing or invalid: use torchrun or unset them")


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory: zeroing new pages for every large tensor is slow."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX in malloc.h
        mallopt(-1, -1)  # M_TRIM_THRESHOLD


def use_fastest_exact_matmul() -> None:
    """Uses oneDNN for float32 products on a CPU, twice as fast as MKL on AMD. PyTorch does so only
    under "medium" precision, where AMX may round to bfloat16: a trial product decides."""
    torch.set_float32_matmul_precision("medium")
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    if (a @ b - exact).norm() > 2e-6 * exact.norm():  # in bfloat16 the error is 2e-3
        torch.set_float32_matmul_precision("highest")


def agree_on_attempt(store: dist.Store, rank: int, world_size: int) -> str:
    """A key prefix of this attempt: a restarted gloo group would read addresses of dead processes.
    Every rank announces a random number; rank 0 offers its own with those seen until all have found
    theirs. None waits in the store, where signal handlers do not run."""
    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    mine = os.urandom(8).hex()
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        while mine not in (offer := read("offer").split()):
            time.sleep(POLL_SECONDS)
        store.set(f"seen/{rank}", offer[0])
        return offer[0]
    while any(read(f"seen/{other}") != mine for other in range(1, world_size)):
        store.set("offer", " ".join([mine, *(read(f"hello/{r}") for r in range(1, world_size))]))
        time.sleep(POLL_SECONDS)
    return mine


def pick_device(device: str, local_rank: int = 0, ranks: int = 1) -> torch.device:
    """"auto": CUDA, else CPU. Raises UserError, on all `ranks` of a node unless each sees 1 GPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d?))?", device):
        raise UserError(f"--device {device} is unknown, expected auto, cpu, cuda, cuda:N or mps")
    picked = torch.device("cuda", local_rank) if device == "cuda" else torch.device(device)
    count = torch.get_device_module(picked).device_count()
    if count < (needed := max((picked.index or 0) + 1, ranks * (device == "cuda" and count > 1))):
        raise UserError(f"--device {device}: {needed} needed, {count} visible: lower "
                        "--nproc-per-node, or use --device cpu")
    return picked


def pick_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The autocast dtype. "auto" is bfloat16 on a GPU that supports it natively, float16 on other
    GPUs, float32 elsewhere: machines agree to rounding. Warns of one that a CPU only emulates."""
    if dtype == "auto" and device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    picked = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if device.type == "cpu" and picked in (torch.bfloat16, torch.float16):
        half, full = (min(timeit.repeat(functools.partial(torch.mm, x, x), number=1, repeat=5))
                      for x in (torch.ones(512, 512, dtype=kind) for kind in (picked, torch.float)))
        if half > 1.3 * full and (os.environ.get("RANK") or "0") == "0":  # more than noise
            print(f"--dtype {dtype}: a matrix product takes {half / full:.1f} times as long as in "
                  "float32 on this processor", file=sys.stderr, flush=True)
    return picked


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of a forward pass; disabled for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a host tensor to the device without blocking; callable from any thread."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # else a new thread initializes GPU 0
            return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def data_parallel(model: torch.nn.Module, launch: Launch) -> torch.nn.Module:
    """The model in DistributedDataParallel, or itself on one rank. Gradients are views of DDP's
    buckets and must stay: set to None, micro-steps under `no_sync` allocate others."""
    if launch.world_size == 1:
        return model
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gpus = [launch.device] if launch.device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, gpus, gradient_as_bucket_view=True)


@torch.no_grad()
def mean_loss(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], launch: Launch,
              dtype: torch.dtype, should_stop: Callable[[], bool] = bool) -> float | None:
    """The mean loss over the targets of all ranks' `batches` of inputs and targets (B, T), eagerly,
    as other shapes would recompile. None, on all ranks, after a stop on any."""
    sums = torch.zeros(3, dtype=torch.float64)  # loss, targets, ranks that stop
    with torch.compiler.set_stance("force_eager"):
        for inputs, targets in batches:
            inputs, targets = to_device(inputs, launch.device), to_device(targets, launch.device)
            with autocast(launch.device, dtype):
                _, loss = model(inputs, targets, reduction="sum", return_logits=False)
            sums += torch.tensor([loss.item(), int((targets != IGNORE_INDEX).sum()), should_stop()])
            if sums[2]:
                break
    summed, count, stopped = launch.sum(sums).tolist()
    return None if stopped else summed / count


def share_rows(rows: Sequence, work: Callable[[list], Iterable], launch: Launch, *,
               size_of: Callable = lambda row: 0, batch_size: int = 32, batch_tokens: int = 0,
               should_stop: Callable[[], bool] = bool, label: str = "") -> list | None:
    """The results of work(batch), one per row, in order, on every rank. Ranks take batches of
    batch_size rows, or about batch_tokens, in turn, the largest `size_of` first, eagerly, without
    gradients. `label` shows progress. None, on all ranks, if `should_stop()` on one."""
    order = sorted(range(len(rows)), key=lambda i: size_of(rows[i]), reverse=True)
    batches = []
    while order:
        count = max(1, batch_tokens // size_of(rows[order[0]])) if batch_tokens else batch_size
        batches.append(order[:count])
        del order[:count]
    mine, found = batches[launch.rank :: launch.world_size], {}
    bar = progress_bar(len(mine), 0, label, unit="batch", over=mine,
                       enabled=bool(label) and launch.is_master)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in bar:
            if should_stop():
                break
            found |= zip(batch, work([rows[i] for i in batch]), strict=True)
    parts, stopped = zip(*launch.gather((found, should_stop())), strict=True)
    if any(stopped):
        return None
    merged = {row: result for part in parts for row, result in part.items()}
    return [merged[row] for row in range(len(rows))]


def device_time(device: torch.device) -> float:
    """Seconds of a monotonic clock, after a GPU has finished its queued work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
