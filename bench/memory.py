"""Measures what a training step and a checkpoint cost beside the time they compute."""

import itertools
import tempfile
from pathlib import Path

import torch

from bench.harness import BenchConfig, Contestant, in_turn, record, seconds
from minigpt2.checkpoint import save_checkpoint
from minigpt2.distributed import Launch, autocast, start
from minigpt2.memory import largest_micro_batch_for, memory_per_rank, saved_bytes
from minigpt2.optimizer import make_optimizer
from minigpt2.resume import CheckpointWriter, TrainState, training_state
from model import GPT, PRESETS, GPTConfig

CARDS, SHARE = (24, 32, 80, 141), 512  # GB = 10**9 bytes; micro-batches are powers of two up to it
SAVED_SIZES, SAVED_SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=256), (4, 256)
STEP_SIZES, STEP_LENGTH = PRESETS["gpt2"], 1024
BASELINE = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=32)


def memory_of_preset(config: BenchConfig, name: str) -> None:
    """Computed: bytes a rank of 8 in bfloat16, compiled, as the trainer's defaults are on a GPU."""
    sizes, ways = PRESETS[name], {"plain": {}, "sharded": {"shard_optimizer": True},
                                  "sharded_checkpointed": {"shard_optimizer": True,
                                                           "activation_checkpointing": True}}
    setting = {"sequence_length": 1024, "dtype": torch.bfloat16, "world_size": 8, "compiled": True}
    plans = {way: memory_per_rank(sizes, micro_batch_size=1, **setting, **options)
             for way, options in ways.items()}
    state = {way: plan.weights + plan.gradients + plan.optimizer for way, plan in plans.items()}
    largest = {f"{way}_{card}gb": largest_micro_batch_for(sizes, card * 10**9, share=SHARE,
                                                          **setting, **options)
               for way, options in ways.items() for card in CARDS}
    record(config, "memory", model=name, state_bytes=state["plain"],
           state_bytes_sharded=state["sharded"],
           activation_bytes_per_sequence=plans["plain"].activations,
           activation_bytes_per_sequence_checkpointed=plans["sharded_checkpointed"].activations,
           **largest)


def measure_saved(config: BenchConfig, dtype: torch.dtype) -> None:
    """What autograd keeps below the head, with the weights cast for it, against the formula."""
    model, (batch, length) = GPT(SAVED_SIZES), SAVED_SHAPE
    tokens = torch.zeros(SAVED_SHAPE, dtype=torch.long)
    with autocast(tokens.device, dtype):
        measured = saved_bytes(model, lambda: model.hidden_states(tokens))
    plan = memory_per_rank(SAVED_SIZES, micro_batch_size=batch, sequence_length=length, dtype=dtype,
                           device_type="cpu")
    computed = plan.activations - tokens.nbytes + plan.weights - plan.gradients  # no targets there
    record(config, "kept for backward", dtype=str(dtype).removeprefix("torch."),
           computed_bytes=computed, measured_bytes=measured, ratio=measured / computed)


def make_updates(sizes: GPTConfig, batch: int, length: int, dtype: torch.dtype):
    """In a process of its own: an update of two micro-steps, as the trainer makes it."""
    start("cpu")
    model = GPT(sizes)
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokens = torch.zeros(2, batch, length, dtype=torch.long)

    def update() -> float:
        for _ in range(2):
            with autocast(tokens.device, dtype):
                loss = model(*tokens, reduction="sum", return_logits=False)[1]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return update


def measure_step(config: BenchConfig) -> None:
    """The peak of a process that trains, against that of one with hardly a model, and the sum."""
    peaks = []
    for sizes, batch, length in ((BASELINE, 1, 16), (STEP_SIZES, 1, STEP_LENGTH),
                                 (STEP_SIZES, 2, STEP_LENGTH)):
        process = Contestant(make_updates, sizes, batch, length, torch.bfloat16)
        process.step(), process.step()
        peaks.append(process.stop())
    for batch, peak in enumerate(peaks[1:], 1):
        plan = memory_per_rank(STEP_SIZES, micro_batch_size=batch, sequence_length=STEP_LENGTH,
                               dtype=torch.bfloat16, device_type="cpu")
        record(config, "peak of a process", micro_batch_size=batch, baseline_bytes=peaks[0],
               computed_bytes=plan.total, measured_bytes=peak,
               ratio=(peak - peaks[0]) / plan.total)


def bench_memory(config: BenchConfig) -> None:
    for name in PRESETS:
        memory_of_preset(config, name)
    for dtype in (torch.float32, torch.bfloat16):
        measure_saved(config, dtype)
    measure_step(config)


def bench_checkpoint(config: BenchConfig) -> None:
    """Until training may go on: written here and now, and copied for the thread that writes it."""
    model = GPT(PRESETS["gpt2"])
    optimizer = make_optimizer(model, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the moments
    optimizer.zero_grad(set_to_none=True)
    launch, scaler = Launch(0, 1, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
    with tempfile.TemporaryDirectory() as name:
        out_dir, steps = Path(name), itertools.count()
        with CheckpointWriter(out_dir, launch, {}, keep_last=1, keep_every=0,
                              saved_step=None) as writer:
            def here() -> None:
                progress = TrainState(step=next(steps))
                state = training_state(progress, optimizer, scaler, launch)
                save_checkpoint(out_dir, progress.step, model, training_state=state, keep_last=1)

            def copied() -> float:
                waited = seconds(lambda: writer.save(TrainState(step=next(steps)), model, optimizer,
                                                     scaler))
                writer.wait()
                return waited

            taken = in_turn(config.rounds, here=lambda: seconds(here), copied=copied)
    record(config, "checkpoint", model="gpt2", written_here_s=taken["here"],
           copied_s=taken["copied"], ratio=taken["here"] / taken["copied"])
