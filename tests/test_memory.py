"""The largest micro-batch is found by trial, and every device's out-of-memory error is known."""

import functools
from types import SimpleNamespace

import pytest
import torch
from helpers.common import CPU_LAUNCH, user_error

from minigpt2.faults import find_micro_batch, is_out_of_memory
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=32, vocab_size=500, n_layer=2, n_head=2, n_embd=64)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 67108864 bytes."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
    (RuntimeError("could not create a primitive"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("out of memory"), False),
])
def test_which_errors_are_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected
    outer = RuntimeError("backend failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is expected


class Limited(GPT):
    """Raises above `limit` sequences what a full GPU raises, in the middle of the backward pass."""

    limit = 0

    def forward(self, idx, *arguments, **options):
        self.tried.append(len(idx))
        logits, loss = super().forward(idx, *arguments, **options)
        if len(idx) > self.limit:
            loss.register_hook(self.full)
        return logits, loss

    def full(self, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")


def limited(limit: int) -> Limited:
    torch.manual_seed(0)
    model = Limited(SMALL)
    model.limit, model.tried = limit, []
    return model


def find(model, candidates=(16, 8, 4, 2, 1), launch=CPU_LAUNCH, dtype=torch.float32,
         compiled=False) -> int:
    """By trial, as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt2.faults.on_cpu", lambda device: False)
        return find_micro_batch(model, list(candidates), launch=launch, dtype=dtype,
                                compiled=compiled, sequence_length=32, optimizer_bytes=1000)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_that_fits_is_found_and_nothing_is_left(dtype, capsys):
    model = limited(4)
    weights, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    assert find(model, dtype=dtype) == 4 and model.tried == [16, 8, 4]
    assert capsys.readouterr().out.splitlines() == [
        f"--micro-batch-size auto: trying {size} x 32 tokens" for size in model.tried]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.slow
def test_when_nothing_fits_the_flags_that_help_are_named():
    model = limited(0)
    error = user_error(find, model)
    assert "not even a micro-batch of 1 x 32" in error and "--activation-checkpointing" in error
    assert "shorter sequences" in error and all(p.grad is None for p in model.parameters())


def test_another_error_is_not_mistaken_for_out_of_memory(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        find(GPT(SMALL))


def test_a_size_that_fails_on_another_rank_is_rejected_on_this_one():
    others, model = [0.0, 1.0, 0.0], limited(8)
    launch = SimpleNamespace(device=torch.device("cpu"), world_size=2,
                             print0=print, sum=lambda failed: failed + others.pop(0))
    assert find(model, launch=launch) == 4 and model.tried == [16, 8, 4]


def test_a_cpu_takes_at_most_16_sequences_without_a_trial():
    model = limited(0)
    find = functools.partial(find_micro_batch, model, launch=CPU_LAUNCH, dtype=torch.float32,
                             compiled=False, sequence_length=32, optimizer_bytes=0)
    assert [find([size >> n for n in range(size.bit_length())]) for size in (8, 16, 64)] == [8, 16,
                                                                                            16]
    assert find([48, 24]) == 24 and model.tried == []


@pytest.mark.slow
def test_every_size_is_compiled_for_itself():
    dynamic, calls = [], []

    def backend(graph, inputs):
        dynamic.append(any(isinstance(value, torch.SymInt) for value in inputs))

        def run(*arguments):
            calls.append(arguments)
            if len(calls) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return graph.forward(*arguments)
        return run

    torch.compiler.reset()
    model = GPT(SMALL)
    model.compile(backend=backend)
    assert find(model, compiled=True) == 4 and dynamic[:3] == [False] * 3 and not any(dynamic)
    compiled = len(dynamic)
    tokens = torch.zeros(2, 4, 32, dtype=torch.long)
    model(*tokens, reduction="sum", return_logits=False)[1].backward()
    assert len(dynamic) == compiled  # training uses what the trial compiled
