"""The memory formula of bench/memory.py against what PyTorch allocates."""

import pytest
import torch
from helpers.memory import allocator_peak, saved_bytes

from bench.memory import Memory, largest_micro_batch_for, memory_per_rank, state_bytes
from minigpt2.loss import HEAD_MULTIPLE, LOSS_ROWS_CPU
from minigpt2.optimizer import make_optimizer, missing_bytes
from model import GPT, PRESETS, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=500, n_layer=2, n_head=2, n_embd=64)
DTYPES = [torch.float32, torch.bfloat16]
SIZES = [  # and how many sequences of how many tokens
    (GPTConfig(block_size=128, vocab_size=100, n_layer=1, n_head=4, n_embd=64), 8, 128),
    (GPTConfig(block_size=128, vocab_size=100, n_layer=5, n_head=2, n_embd=128), 3, 128),
    (GPTConfig(block_size=256, vocab_size=5000, n_layer=3, n_head=4, n_embd=256), 8, 256),
]


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def computed(sizes, batch, length, dtype, **setting) -> Memory:
    return memory_per_rank(sizes, micro_batch_size=batch, sequence_length=length, dtype=dtype,
                           compiled=False, **setting)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes, batch, length", SIZES)
def test_activations_are_what_autograd_keeps(sizes, batch, length, dtype):
    model = GPT(sizes)
    inputs = torch.zeros(batch, length, dtype=torch.long)

    def hidden():
        with autocast(dtype):
            return model.hidden_states(inputs)

    targets = 8 * inputs.numel()  # bytes; the stack below the head does not see them
    plain = computed(sizes, batch, length, dtype)
    casts = plain.weights - plain.gradients
    measured = saved_bytes(model, hidden)
    assert measured == pytest.approx(plain.activations - targets + casts, rel=0.05)

    # with checkpointing: the inputs of all blocks, and the block being recomputed
    x = torch.zeros(batch, length, sizes.n_embd, requires_grad=True)

    def block():
        with autocast(dtype):
            return model.transformer.h[0](x)

    one_block = saved_bytes(model, block) - casts // sizes.n_layer - 4 * x.numel()
    model.checkpoint_activations = True
    measured = saved_bytes(model, hidden) + one_block
    checkpointed = computed(sizes, batch, length, dtype, activation_checkpointing=True)
    assert measured == pytest.approx(checkpointed.activations - targets, rel=0.05)


def extra_bytes_of_logits(sizes: GPTConfig, rows: int, dtype: torch.dtype, folder) -> int:
    """What the product of a block of logits allocates: 0, except on processors without native
    bfloat16, where oneDNN adds the logits up in float32 in memory of its own."""
    V, C = sizes.vocab_size + -sizes.vocab_size % HEAD_MULTIPLE, sizes.n_embd
    x, head, logits = (torch.zeros(shape, dtype=dtype) for shape in ((rows, C), (C, V), (rows, V)))
    return allocator_peak(lambda: torch.mm(x, head, out=logits), folder / "product.json")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_step_allocates_what_is_computed(dtype, checkpointing, tmp_path):
    sizes, batch, length = GPTConfig(128, 20_000, 3, 4, 128), 8, 128
    model = GPT(sizes)
    model.checkpoint_activations = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        inputs = torch.zeros(2, batch, length, dtype=torch.long)
        with autocast(dtype):
            loss = model(*inputs, reduction="sum", return_logits=False)[1]
        loss.backward()

    plan = computed(sizes, batch, length, dtype, activation_checkpointing=checkpointing)
    measured = allocator_peak(step, tmp_path / "trace.json")
    expected = plan.activations + plan.loss + plan.weights - plan.gradients
    expected += extra_bytes_of_logits(sizes, min(LOSS_ROWS_CPU, batch * length), dtype, tmp_path)
    # the formula counts the loss and one recomputed block; both never exist at once
    assert (0.85 if checkpointing else 0.95) * expected < measured < 1.05 * expected


def test_gradients_and_moments_are_the_real_ones():
    model = GPT(SMALL)
    optimizer = make_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokens = torch.zeros(2, 2, 8, dtype=torch.long)
    model(*tokens)[1].backward()
    optimizer.step()
    plan = computed(SMALL, 2, 8, torch.float32)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert plan.optimizer == sum(state[name].nbytes for state in optimizer.state.values()
                                 for name in ("exp_avg", "exp_avg_sq"))
    assert plan.total == sum(vars(plan).values())
    momentum = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    plan = computed(SMALL, 2, 8, torch.float32, state_tensors=1)
    assert plan.optimizer == missing_bytes(momentum)
    momentum.step()
    assert plan.optimizer == sum(state["momentum_buffer"].nbytes
                                 for state in momentum.state.values())


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_sharded_moments_are_those_of_the_fullest_rank(world_size):
    """As ZeroRedundancyOptimizer divides them, asked without a process group."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    groups = make_optimizer(GPT(SMALL), lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
                            weight_decay=0.1).param_groups
    zero = object.__new__(ZeroRedundancyOptimizer)
    zero.world_size, zero.param_groups, zero._partition_parameters_cache = world_size, groups, []
    held = [sum(8 * p.numel() for group in rank for p in group["params"])
            for rank in zero._partition_parameters()]
    assert state_bytes(SMALL, world_size) == max(held)
    assert state_bytes(SMALL, world_size, tensors=1) == max(held) // 2


def test_what_every_option_saves():
    sizes = PRESETS["gpt2"]
    options = {"micro_batch_size": 32, "sequence_length": 1024, "dtype": torch.bfloat16}
    plain = memory_per_rank(sizes, **options)
    sharded = memory_per_rank(sizes, **options, world_size=8, shard_optimizer=True)
    assert plain.gradients == 4 * 124_439_808 and plain.optimizer == 8 * 124_439_808
    # the rank with the token embedding has more than an eighth
    assert sharded.optimizer == 8 * 50257 * 768 > plain.optimizer / 8
    assert vars(sharded) | {"optimizer": 0} == vars(plain) | {"optimizer": 0}
    assert memory_per_rank(sizes, **options, world_size=8) == plain
    checkpointed = memory_per_rank(sizes, **options, activation_checkpointing=True)
    assert checkpointed.activations < plain.activations / 5
    assert plain.loss > 2 * memory_per_rank(sizes, **options, compiled=False).loss


def test_largest_micro_batch():
    options = {"sequence_length": 1024, "dtype": torch.bfloat16}
    sizes = PRESETS["gpt2"]
    largest = largest_micro_batch_for(sizes, 24 * 10**9, **options)
    assert largest == 32
    usable = 24e9 * 0.95 - 1.5e9
    for size, fits in ((32, True), (64, False)):
        total = memory_per_rank(sizes, micro_batch_size=size, sequence_length=1024,
                                dtype=torch.bfloat16).total
        assert (total <= usable) is fits
    assert largest_micro_batch_for(PRESETS["gpt2-xl"], 24 * 10**9, **options) == 0


