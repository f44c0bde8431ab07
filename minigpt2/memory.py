"""What a training step holds in memory: computed per rank, and the largest micro-batch that fits.

`memory_per_rank` is arithmetic, checked against what PyTorch keeps (tests/test_memory.py, `python
bench.py memory`); `find_micro_batch` does not rely on it, but tries.

In the comments N = micro_batch_size * sequence_length rows, C n_embd, V the head's rows, P
parameters, e bytes of the compute dtype (2 under autocast, 4 in float32). All figures are bytes.
"""

import functools
import gc
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast, trim_memory
from minigpt2.loss import (
    HEAD_MULTIPLE,
    LOSS_ROWS_CPU,
    LOSS_ROWS_GPU,
    SOFTMAX_ROWS_CPU,
    SOFTMAX_ROWS_GPU,
)
from model import GPT, GPTConfig

# What a GPU holds besides: CUDA's context, NCCL's and cuBLAS's buffers; and what fragmentation
# makes unusable, a share of the card
RESERVE_BYTES, RESERVE_SHARE = 1_500_000_000, 0.05
# find_micro_batch leaves this free, for later steps find memory in pieces: on a GPU beside what
# evaluation and sampling had; elsewhere as a share of activations and loss (without it, a trial on
# a CPU was seen to pass, and the third step after it to fail)
HEADROOM_GPU, HEADROOM_SHARE = 512 * 2**20, 0.15
# A trial on a GPU costs a compilation. Nothing needs less than half of what is computed here.
OPTIMISM_GPU = 2.0
OUT_OF_MEMORY_WORDS = (
    "out of memory",  # CUDA, MPS, NCCL, Triton
    "DefaultCPUAllocator",  # "can't allocate memory: you tried to allocate N bytes"
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a primitive",  # all that oneDNN, which does bfloat16 on a CPU, says of it
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the fullest moment of a training step, but not of its first: gradients
    and moments exist."""

    weights: int  # float32, and their copies in autocast's dtype
    gradients: int
    optimizer: int  # the moments; of the fullest rank, where they are sharded
    activations: int  # kept for backward; in proportion to the micro-batch
    loss: int  # head, logits, and the gradients that the loss makes at once

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@functools.cache
def parameter_shapes(sizes: GPTConfig) -> dict[str, torch.Size]:
    """The shapes of all parameters by name, without their memory."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(sizes).named_parameters()}


def moment_bytes(sizes: GPTConfig, world_size: int = 1, muon: bool = False) -> int:
    """The optimizer's moments, 2 x 4 bytes a parameter (of Muon's matrices 1 x 4), on the rank that
    holds most of them.

    ZeroRedundancyOptimizer gives away whole tensors, group by group (Muon's, other matrices,
    vectors) and largest first, each to the rank with least so far: one has the whole token
    embedding.
    """
    groups: list[list[tuple[int, int]]] = [[], [], []]  # of (parameters, bytes of each)
    for name, shape in parameter_shapes(sizes).items():
        of_muon = muon and name.startswith("transformer.h.") and len(shape) == 2
        place = 0 if of_muon else 1 if len(shape) >= 2 else 2
        groups[place].append((shape.numel(), 4 if of_muon else 8))
    held, moments = [0] * world_size, [0] * world_size  # parameters, bytes
    for group in groups:
        for count, each in sorted(group, reverse=True):
            rank = held.index(min(held))
            held[rank] += count
            moments[rank] += count * each
    return max(moments)


def memory_per_rank(sizes: GPTConfig, *, micro_batch_size: int, sequence_length: int,
                    dtype: torch.dtype, world_size: int = 1, shard_optimizer: bool = False,
                    activation_checkpointing: bool = False, compiled: bool = False,
                    device_type: str = "cuda") -> Memory:
    """What a rank holds while it trains on micro-batches of micro_batch_size x sequence_length.

    With DDP the gradients are views of its buckets, so that they are not held twice. What backward
    makes in passing (gradients of activations, a few tensors of N x 4C) comes when the loss's share
    is gone and some activations are, and is not added. `compiled` changes only the loss: the
    compiler keeps about the activations that eager autocast does, rather less.
    """
    N, C, e = micro_batch_size * sequence_length, sizes.n_embd, dtype.itemsize
    shapes = parameter_shapes(sizes)
    total = sum(map(torch.Size.numel, shapes.values()))
    # Autocast casts the weights and biases of every linear layer once a forward pass
    cast = 0 if dtype == torch.float32 else e * sum(
        shape.numel() for name, shape in shapes.items() if ".attn." in name or ".mlp." in name)
    # A block keeps, a row:                                      bytes
    #   ln_1, ln_2: inputs (the float32 residual stream)          2 x 4C
    #               mean and 1 / standard deviation, float32      2 x 8
    #   c_attn:     input                                         eC
    #   attention:  q, k, v; output, which is c_proj's input      3eC + eC
    #               logsumexp of every head, float32              4H
    #   c_fc:       input                                         eC
    #   gelu:       input; output, which is the c_proj's input    4eC + 4eC
    # Outputs of both c_proj are added to the residual stream, which needs none of its terms.
    block = N * (8 * C + 14 * e * C + 16 + 4 * sizes.n_head)
    residual = N * 4 * C  # a block's input, part of the above
    # inputs, targets (int64), and of ln_f what ln_1 keeps
    outside = N * 16 + residual + N * 8
    if activation_checkpointing:  # every block's input, and one block while it is done again
        activations = sizes.n_layer * residual + (block - residual) + outside
    else:
        activations = sizes.n_layer * block + outside
    return Memory(weights=4 * total + cast, gradients=4 * total, activations=activations,
                  optimizer=moment_bytes(sizes, world_size if shard_optimizer else 1),
                  loss=loss_bytes(sizes, N, dtype, compiled, device_type))


def loss_bytes(sizes: GPTConfig, N: int, dtype: torch.dtype, compiled: bool,
               device_type: str) -> int:
    """What `linear_cross_entropy` holds at its fullest, for N rows that all have a target."""
    C, V, e, low = sizes.n_embd, sizes.vocab_size, dtype.itemsize, dtype != torch.float32
    on_gpu = device_type != "cpu"
    hidden = N * C * (4 + e)  # ln_f's output in float32, and in the compute dtype
    if compiled:
        # All logits and their gradient in the compute dtype (the float32 softmax is fused away);
        # the head in it and the head's gradient
        V += -V % HEAD_MULTIPLE if device_type == "cuda" else 0
        return hidden + 2 * e * N * V + 2 * e * V * C
    if dtype == torch.float16:
        # Logits are gone when backward begins: their log-softmax, its gradient and theirs, float32
        return hidden + 12 * N * V + e * V * C
    V += -V % HEAD_MULTIPLE
    rows = min(LOSS_ROWS_GPU if on_gpu else LOSS_ROWS_CPU, N)
    softmax_rows = min(SOFTMAX_ROWS_GPU if on_gpu else SOFTMAX_ROWS_CPU, N)
    # LinearCrossEntropy: gradient of the rows; the head padded and cast; its gradient, float32;
    # logits of some rows; scores and probabilities, float32, of some of these
    held = e * N * C + (e + 4) * V * C + e * rows * V + 8 * softmax_rows * V
    # and these rows' share of the head's gradient (which a CPU casts to float32 to add it up)
    return hidden + held + (e + (4 if low and not on_gpu else 0)) * V * C


def saved_bytes(model: torch.nn.Module, call: Callable[[], object]) -> int:
    """Measures what autograd keeps of a call for backward, parameters aside; tensors that share
    memory are counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()  # as long as it is, all of them are
    del kept
    return sum(sizes.values())


def largest_micro_batch_for(sizes: GPTConfig, card_bytes: int, *, share: int, **setting) -> int:
    """The largest divisor of `share` (sequences of a rank in an update) that a card of card_bytes
    holds beside the reserve above; 0 if none. `setting` is memory_per_rank's."""
    usable = card_bytes * (1 - RESERVE_SHARE) - RESERVE_BYTES
    return max((size for size in range(1, share + 1) if share % size == 0
                and memory_per_rank(sizes, micro_batch_size=size, **setting).total <= usable),
               default=0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that memory was out, on whichever device."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return any(isinstance(error, torch.OutOfMemoryError | MemoryError)
               or (isinstance(error, RuntimeError)
                   and any(words in str(error) for words in OUT_OF_MEMORY_WORDS))
               for error in chain)


def available_bytes(device: torch.device) -> float:
    """What this process may still allocate there; infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return math.inf
    kib = meminfo.read_text(encoding="utf-8").split("MemAvailable:")[1].split()[0]
    return int(kib) * 1024 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks of this node


def find_micro_batch(model: GPT, candidates: list[int], *, launch: Launch, dtype: torch.dtype,
                     compiled: bool, sequence_length: int, optimizer_bytes: int) -> int:
    """The first of `candidates` (largest first) with which a training step fits on every rank.

    `model` is on its device, compiled or not, and not yet in DDP: a rank that fails inside a trial
    may keep no other waiting. One forward and backward pass of random tokens is made of each, with
    gradients there already, and beside `optimizer_bytes` for moments that are still to be made and
    some headroom. Every rank calls this; a size that fails on one is given up on all. The model has
    no gradients afterwards, and the random state is as it was. Raises UserError when nothing fits.
    """
    device = launch.device
    free = available_bytes(device)
    for size in candidates:
        computed = memory_per_rank(
            model.config, micro_batch_size=size, sequence_length=sequence_length, dtype=dtype,
            activation_checkpointing=model.checkpoint_activations, compiled=compiled,
            device_type=device.type)
        passing = computed.activations + computed.loss
        ballast = optimizer_bytes + (HEADROOM_GPU if device.type == "cuda" else
                                     int(HEADROOM_SHARE * passing))
        needed = computed.gradients + passing + ballast
        # Linux hands out more memory than there is, and kills who uses it: better not to try
        hopeless = needed > free * (OPTIMISM_GPU if device.type == "cuda" else 1)
        fits = not hopeless and fits_in_memory(model, size, sequence_length, device, dtype, ballast)
        release(model, device)
        failed = launch.sum(torch.tensor(0.0 if fits else 1.0)).item()  # ranks
        if compiled and (failed or launch.world_size > 1):
            # The next size is to be compiled for itself, not for any size; and with DDP around the
            # model, the compiler cuts the graph where gradients can be sent early
            torch.compiler.reset()
        if not failed:
            return size
    advice = "" if model.checkpoint_activations else "--activation-checkpointing or "
    raise UserError(f"not even {candidates[-1]} x {sequence_length} tokens a micro-step fit into "
                    f"the memory of {device}: try {advice}shorter sequences")


def fits_in_memory(model: GPT, size: int, sequence_length: int, device: torch.device,
                   dtype: torch.dtype, ballast_bytes: int) -> bool:
    """Tries one micro-step of `size` sequences beside so much ballast. Leaves gradients behind."""
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # a compiler may try its kernels on random numbers
            ballast = torch.empty(ballast_bytes, dtype=torch.uint8, device=device)
            for parameter in model.parameters():  # as in all micro-steps but the first
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


def release(model: GPT, device: torch.device) -> None:
    """Gives back what a trial held, to the device where others may take it."""
    model.zero_grad(set_to_none=True)
    gc.collect()  # an error's frames may hold tensors in a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "cpu":
        trim_memory()
