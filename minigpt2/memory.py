"""`--micro-batch-size auto`: the largest micro-batch that fits into memory."""

import gc
import re

import torch

from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast
from minigpt2.loss import on_cpu
from model import GPT

CPU_MICRO_BATCH = 16  # sequences: on a CPU, more are not faster
HEADROOM_BYTES = 512 * 2**20  # which a trial leaves free, for evaluation and sampling
OUT_OF_MEMORY = re.compile(  # CUDA, MPS, NCCL, Triton; PyTorch on a CPU; C++; Python; cuBLAS
    "out of memory|DefaultCPUAllocator|bad_alloc|can't start new thread|CUBLAS_STATUS_ALLOC_FAILED"
    "|could not create a primitive")  # oneDNN, which gives no reason


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is an out-of-memory error of any device."""
    return error is not None and (
        isinstance(error, torch.OutOfMemoryError | MemoryError) or is_out_of_memory(error.__cause__)
        or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))))


def find_micro_batch(model: GPT, candidates: list[int], *, launch: Launch, dtype: torch.dtype,
                     compiled: bool, sequence_length: int, optimizer_bytes: int) -> int:
    """The first of `candidates` (sequences, largest first) whose training step fits on every rank;
    on a CPU, without a trial, the first of at most CPU_MICRO_BATCH. A collective, before the model
    is wrapped in DDP. Raises UserError if no candidate fits."""
    if on_cpu(launch.device):
        return next((size for size in candidates if size <= CPU_MICRO_BATCH), candidates[-1])
    for size in candidates:
        fits = step_fits(model, size, sequence_length, launch.device, dtype, optimizer_bytes)
        model.zero_grad(set_to_none=True)
        gc.collect()  # the frames of an error may hold tensors in a reference cycle
        torch.cuda.empty_cache()
        failed_ranks = launch.sum(torch.tensor(0.0 if fits else 1.0)).item()
        if compiled and (failed_ranks or launch.world_size > 1):
            # Compile the next size for itself, not for dynamic shapes. Under DDP the compiler
            # splits the graph differently, so that gradients can be reduced early.
            torch.compiler.reset()
        if not failed_ranks:
            return size
    raise UserError(f"not even a micro-batch of {candidates[-1]} x {sequence_length} tokens fits "
                    f"on {launch.device}: try --activation-checkpointing or shorter sequences")


def step_fits(model: GPT, size: int, sequence_length: int, device: torch.device,
              dtype: torch.dtype, optimizer_bytes: int) -> bool:
    """Whether there is memory for a forward and backward pass, gradients, moments that do not exist
    yet (`optimizer_bytes`) and some headroom. Leaves gradients."""
    try:
        ballast = torch.empty(optimizer_bytes + HEADROOM_BYTES, dtype=torch.uint8, device=device)
        for parameter in model.parameters():  # as in most micro-steps; DDP's buckets
            parameter.grad = torch.zeros_like(parameter)
        tokens = torch.zeros(2, size, sequence_length, dtype=torch.int64, device=device)
        with autocast(device, dtype):
            _, loss = model(*tokens, reduction="sum", return_logits=False)
        loss.backward()
        del ballast
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
