"""The largest micro-batch that fits into memory, found by trial."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from minigpt2 import distributed
from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast
from model import GPT

# What a trial leaves free: on a GPU for evaluation and sampling; on a CPU, as a share of the
# available memory, for fragmentation, which took up to 20 % during a run
HEADROOM_BYTES, HEADROOM_SHARE = 512 * 2**20, 0.25
OUT_OF_MEMORY_MESSAGES = (
    "out of memory",  # CUDA, MPS, NCCL, Triton
    "DefaultCPUAllocator",  # "can't allocate memory: you tried to allocate N bytes"
    "bad_alloc", "can't start new thread",  # C++, Python
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # oneDNN, which gives no reason
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of any device."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__
    return any(isinstance(error, torch.OutOfMemoryError | MemoryError)
               or (isinstance(error, RuntimeError)
                   and any(message in str(error) for message in OUT_OF_MEMORY_MESSAGES))
               for error in seen)


def optimizer_bytes(model: torch.nn.Module, ranks: int) -> int:
    """Estimates AdamW's moments per rank, 8 bytes per parameter, sharded over `ranks`: an equal
    share, but at least the largest tensor, since ZeroRedundancyOptimizer assigns whole tensors."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    return 8 * max(-(-sum(sizes) // ranks), *sizes)


def find_micro_batch(model: GPT, candidates: list[int], *, launch: Launch, dtype: torch.dtype,
                     compiled: bool, sequence_length: int, optimizer_bytes: int) -> int:
    """The first of `candidates` (sequences, largest first) whose training step fits on every rank.
    A trial runs forward and backward on random tokens while memory is held for gradients, for
    moments that do not exist yet (`optimizer_bytes`) and for some headroom. All ranks must call
    this, before the model is wrapped in DDP. It leaves no gradients and preserves the random state.
    Raises UserError if no candidate fits."""
    device = launch.device
    with limited_address_space(device):
        for size in candidates:
            fits = try_step(model, size, sequence_length, device, dtype, optimizer_bytes)
            model.zero_grad(set_to_none=True)
            gc.collect()  # the frames of an error may hold tensors in a reference cycle
            if device.type == "cuda":
                torch.cuda.empty_cache()
            elif device.type == "cpu":
                (distributed.c_function("malloc_trim") or int)(0)  # freed memory to the system
            failed_ranks = launch.sum(torch.tensor(0.0 if fits else 1.0)).item()
            if compiled and (failed_ranks or launch.world_size > 1):
                # Compile the next size for itself, not for dynamic shapes. Under DDP the compiler
                # splits the graph differently, so that gradients can be reduced early.
                torch.compiler.reset()
            if not failed_ranks:
                return size
    advice = "" if model.checkpoint_activations else "--activation-checkpointing or "
    raise UserError(f"not even a micro-batch of {candidates[-1]} x {sequence_length} tokens fits "
                    f"into the memory of {device}: try {advice}shorter sequences")


def try_step(model: GPT, size: int, sequence_length: int, device: torch.device,
             dtype: torch.dtype, optimizer_bytes: int) -> bool:
    """Whether a micro-step of `size` sequences fits. Leaves gradients behind."""
    on_gpu = device.type == "cuda"
    try:
        with torch.random.fork_rng([device] if on_gpu else []):  # autotuning draws random numbers
            ballast = torch.empty(optimizer_bytes + (HEADROOM_BYTES if on_gpu else 0),
                                  dtype=torch.uint8, device=device)
            for parameter in model.parameters():  # as in most micro-steps; DDP's buckets
                parameter.grad = torch.zeros_like(parameter)
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(model.config.vocab_size, (2, size, sequence_length),
                                   generator=generator).to(device)
            with autocast(device, dtype):
                _, loss = model(*tokens, reduction="sum", return_logits=False)
            loss.backward()
            del ballast
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


@contextlib.contextmanager
def limited_address_space(device: torch.device) -> Iterator[None]:
    """On a Linux CPU: limits this process to the available memory, less some headroom. Without a
    limit, Linux grants more memory than there is, and kills the process that uses it."""
    if device.type != "cpu" or sys.platform != "linux":
        yield
        return
    import resource  # Unix only

    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    used, free = pages * resource.getpagesize(), available_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        free = min(free, max(soft - used, 0))
    # Undo keep_freed_memory meanwhile, or a failed trial would keep its address space
    mallopt = distributed.c_function("mallopt") or (lambda *_: None)
    mallopt(distributed.M_MMAP_MAX, 65_536)  # glibc's default
    resource.setrlimit(resource.RLIMIT_AS, (used + int((1 - HEADROOM_SHARE) * free), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        distributed.keep_freed_memory()


def available_bytes() -> int:
    """This rank's share of the memory that Linux can still provide."""
    meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    kib = int(meminfo.split("MemAvailable:")[1].split()[0])
    return 1024 * kib // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this node
