"""Memory: bytes per rank by formula, and the micro-batches that fit; checkpoint stalls.

    python bench/memory.py --log image/logs/bench_memory.jsonl    # one minute

In the comments N = micro_batch_size * sequence_length rows, C n_embd, H n_head, V vocab_size, and
e bytes per element of the compute dtype (2 under autocast, 4 in float32).
"""

import functools
import pathlib
import statistics
import sys
import tempfile
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, record, run_bench, seconds
from bench.train import ADAMW, SIZES
from minigpt2 import loss as head
from minigpt2.distributed import Launch
from minigpt2.optimizer import make_optimizer
from minigpt2.resume import CheckpointWriter, TrainState
from model import GPT, PRESETS, GPTConfig

# CUDA context, NCCL and cuBLAS buffers; and the share of a card that is lost to fragmentation
RESERVE_BYTES, RESERVE_SHARE = 1_500_000_000, 0.05
CARDS = (24, 32, 80, 141)  # 10**9 bytes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a training step after the first one."""
    weights: int  # float32, and copies in the autocast dtype
    gradients: int
    optimizer: int  # its state; if sharded, of the rank with the most
    activations: int  # saved for backward; proportional to the micro-batch
    loss: int  # head, logits and their gradients

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@functools.cache
def parameter_shapes(sizes: GPTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(sizes).named_parameters()}


def state_bytes(sizes: GPTConfig, world_size: int = 1, tensors: int = 2) -> int:
    """The optimizer state of the rank with the most: `tensors` float32 ones like the parameters,
    AdamW's two, one of Lion or SGD with momentum. ZeroRedundancyOptimizer assigns whole tensors,
    first those with weight decay and largest first, each to the rank with the fewest parameters so
    far."""
    counts = [0] * world_size
    for shape in sorted(parameter_shapes(sizes).values(),
                        key=lambda shape: (len(shape) < 2, -shape.numel())):
        counts[counts.index(min(counts))] += shape.numel()
    return 4 * tensors * max(counts)


def memory_per_rank(sizes: GPTConfig, *, micro_batch_size: int, sequence_length: int,
                    dtype: torch.dtype, world_size: int = 1, shard_optimizer: bool = False,
                    activation_checkpointing: bool = False, compiled: bool = True,
                    state_tensors: int = 2) -> Memory:
    """What a rank holds while it trains. DDP's gradients are views of its buckets and count once.
    Temporary tensors of backward are left out: when they exist, the loss and some activations are
    freed. Compiled means on a GPU, and eager on a CPU; they differ in the loss. Compiled blocks
    save slightly less than this."""
    N, C, e = micro_batch_size * sequence_length, sizes.n_embd, dtype.itemsize
    shapes = parameter_shapes(sizes)
    total = sum(map(torch.Size.numel, shapes.values()))
    # Autocast casts the weights and biases of all linear layers once per forward pass
    cast = 0 if dtype == torch.float32 else e * sum(
        shape.numel() for name, shape in shapes.items() if ".attn." in name or ".mlp." in name)
    # Saved by a block, in bytes per row: ln_1 and ln_2: inputs 2 x 4C, means and 1 / std 2 x 8;
    # c_attn: input eC; attention: q, k, v, output 4eC, float32 logsumexp of every head 4H;
    # c_fc: input eC; gelu: input, output 8eC
    block = N * (8 * C + 14 * e * C + 16 + 4 * sizes.n_head)
    residual = N * 4 * C  # the input of a block, part of the above
    activations = N * 16 + residual + N * 8  # int64 inputs and targets; ln_f
    # With checkpointing: the input of every block, and one recomputed block
    activations += (sizes.n_layer * residual + block - residual if activation_checkpointing else
                    sizes.n_layer * block)
    return Memory(weights=4 * total + cast, gradients=4 * total, activations=activations,
                  optimizer=state_bytes(sizes, world_size if shard_optimizer else 1, state_tensors),
                  loss=loss_bytes(sizes, N, dtype, compiled))


def loss_bytes(sizes: GPTConfig, N: int, dtype: torch.dtype, compiled: bool) -> int:
    """The peak of `linear_cross_entropy` for N rows with a target."""
    C, e = sizes.n_embd, dtype.itemsize
    V = sizes.vocab_size + -sizes.vocab_size % head.HEAD_MULTIPLE
    hidden = N * C * (4 + e)  # output of ln_f in float32, and cast
    if compiled:  # logits and their gradient (the float32 softmax is fused); head and its gradient
        return hidden + 2 * e * N * V + 2 * e * V * C
    rows, softmax_rows = (min(rows, N) for rows in (head.LOSS_ROWS_CPU, head.SOFTMAX_ROWS_CPU))
    # Gradient of the rows; the cast head and its float32 gradient; a block of logits; its float32
    # scores and probabilities; its share of the head's gradient
    return (hidden + e * N * C + (e + 4) * V * C + e * rows * V + 8 * softmax_rows * V + e * V * C)


def largest_micro_batch_for(sizes: GPTConfig, card_bytes: int, **setting) -> int:
    """The largest power of two up to 512 that fits on a card besides the reserve, or 0. `setting`
    goes to `memory_per_rank`."""
    usable = card_bytes * (1 - RESERVE_SHARE) - RESERVE_BYTES
    return max((size for size in (2**k for k in range(10)) if memory_per_rank(
        sizes, micro_batch_size=size, **setting).total <= usable), default=0)


def measure_checkpoint(config: BenchConfig, name: str, sizes: GPTConfig) -> None:
    """Seconds to copy a checkpoint, while training waits, and until a thread has written it."""
    model, launch = GPT(sizes), Launch(0, 1, torch.device("cpu"))
    optimizer, scaler = make_optimizer(model, **ADAMW), torch.amp.GradScaler("cpu", enabled=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the moments
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(
            pathlib.Path(folder), launch, {}, keep_last=1, saved_step=None) as writer:
        def save(step: int) -> tuple[float, float]:
            copied = seconds(lambda: writer.save(TrainState(step), model, optimizer, scaler))
            return copied, copied + seconds(writer.wait)
        copied, written = map(statistics.median, zip(*(
            save(step) for step in range(config.rounds + 1)), strict=True))
    record(config, "checkpoint", model=name, written_here_s=written, copied_s=copied,
           ratio=written / copied)


def bench_memory(config: BenchConfig) -> None:
    """The formula for a rank of 8 in bfloat16, compiled, like the trainer's defaults on a GPU."""
    setting = {"sequence_length": 1024, "dtype": torch.bfloat16, "world_size": 8}
    options = {"plain": setting, "sharded": setting | {"shard_optimizer": True},
               "sharded_checkpointed": setting | {"shard_optimizer": True,
                                                  "activation_checkpointing": True}}
    for name, sizes in PRESETS.items():
        plain, sharded, checkpointed = (
            memory_per_rank(sizes, micro_batch_size=1, **option) for option in options.values())
        record(config, "memory", model=name,
               state_bytes=plain.weights + plain.gradients + plain.optimizer,
               state_bytes_sharded=sharded.weights + sharded.gradients + sharded.optimizer,
               activation_bytes_per_sequence=plain.activations,
               activation_bytes_per_sequence_checkpointed=checkpointed.activations,
               **{f"{key}_{card}gb": largest_micro_batch_for(sizes, card * 10**9, **option)
                  for key, option in options.items() for card in CARDS})
    measure_checkpoint(config, *(("tiny", SIZES["tiny"]) if config.quick else
                                 ("gpt2", PRESETS["gpt2"])))


if __name__ == "__main__":
    run_bench(bench_memory, BenchConfig, __doc__)
