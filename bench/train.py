"""Training: one step of this trainer against the textbook's and Hugging Face's model.

    python bench/train.py --quick                               # smoke test, one minute
    python bench/train.py --log image/logs/bench_train.jsonl    # 25 minutes

The textbook step is that of nanoGPT, on our `GPT`: all logits at once; eager and with PyTorch's
defaults on a CPU; compiled, with fused AdamW and a vocabulary of 50304 on a GPU.
"""

import dataclasses
import itertools
import pathlib
import subprocess
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, Step, compare, measure_limits, record, run_bench
from minigpt2.checkpoint import save_checkpoint
from minigpt2.distributed import autocast, start
from minigpt2.optimizer import make_optimizer
from model import GPT, GPTConfig

Shape = tuple[int, int]  # (B, T) of a micro-step
SIZES = {"tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128),
         "30M": GPTConfig(n_layer=6, n_head=6, n_embd=384), "124M": GPTConfig()}
WAYS = ("ours", "textbook", "hugging_face")  # as the logs name them
LIMITS = {False: (2048, 2**30), True: (256, 2**20)}  # sizes of a product, and bytes read; quick
DTYPES = (torch.float32, torch.bfloat16)
QUICK_SHAPE, QUICK_PEAK_SHAPE, LOSS_STEPS = (2, 128), (32, 64), 20
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(9999))"
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def zipf_tokens(count: int) -> torch.Tensor:
    """Random ids (count,) int64 whose frequencies follow Zipf's law, like those of text."""
    return (50257 ** torch.rand(count, generator=torch.Generator().manual_seed(0))).long()


def make_training(way: str, sizes: GPTConfig, shape: Shape, dtype: torch.dtype,
                  tokens: torch.Tensor, seed: int = 0, device: str = "cpu",
                  compiled: bool = False, micro_steps: int = 1) -> Step:
    """A training step on the next of `tokens`, again and again; it returns the loss. "other_seed"
    is the textbook with other initial weights; other names that begin with "ours" change one
    setting of ours."""
    ours = way.startswith("ours")
    if ours:  # the trainer's global settings
        start(device)
    torch.manual_seed(seed + (way == "other_seed"))
    on_gpu = torch.device(device).type == "cuda"
    if way == "textbook" and on_gpu:
        sizes = dataclasses.replace(sizes, vocab_size=50304)
    model = GPT(sizes)
    model = (as_hugging_face(model) if way == "hugging_face" else model).to(device)
    optimizer = make_optimizer(model, **ADAMW)
    if not ours:  # the same parameter groups; on a CPU PyTorch's default kernels
        optimizer = torch.optim.AdamW([group | {"foreach": None, "fused": on_gpu or None}
                                       for group in optimizer.param_groups])
    if compiled:
        torch.backends.cuda.enable_cudnn_sdp(way != "ours_without_cudnn")
        model.compile(options={"coordinate_descent_tuning": way == "ours_tuned"})
    (B, T), window = shape, shape[0] * shape[1] + 1
    batches = itertools.cycle(tokens[: len(tokens) // window * window].view(-1, window).to(device))

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if ours:
            return model(inputs, targets, reduction="sum", return_logits=False)[1] / (B * T)
        if way == "hugging_face":
            return model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        return model(inputs, targets)[1]

    def step() -> float:
        for batch in itertools.islice(batches, micro_steps):
            with autocast(torch.device(device), dtype):
                loss = loss_of(batch[:-1].view(B, T), batch[1:].view(B, T)) / micro_steps
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return micro_steps * loss.item()  # of the last one
    return step


def as_hugging_face(model: GPT) -> torch.nn.Module:
    """Hugging Face's model with the same weights, from a checkpoint; without dropout."""
    from transformers import GPT2LMHeadModel
    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(pathlib.Path(name), 0, model)
        return GPT2LMHeadModel.from_pretrained(folder, resid_pdrop=0.0, embd_pdrop=0.0,
                                               attn_pdrop=0.0).train()


def measure_training(config: BenchConfig, kind: str, name: str, dtype: torch.dtype, shape: Shape,
                     steps: int, ways: tuple[str, ...]) -> None:
    """Speed, losses and peak memory of whole steps. `loss_differs_from_*` is the largest relative
    difference."""
    (B, T), tokens = shape, zipf_tokens(steps * (shape[0] * shape[1] + 1))
    timings = compare(ways, steps, make_training, SIZES[name], shape, dtype, tokens)
    ours, textbook = timings["ours"], timings.get("textbook", timings["ours"])
    gflops = B * T / ours.seconds * GPT(SIZES[name]).flops_per_token(T) / 1e9
    figures = {"gflops": gflops, "memory_ratio": ours.peak / textbook.peak, "steps": steps,
               "first": ours.results[0], "last": ours.results[-1]}
    differ = "differ_from" if kind == "losses" else "loss_differs_from"
    for way, timing in timings.items():
        figures |= {f"{way}_tokens_per_sec": B * T / timing.seconds, f"{way}_bytes": timing.peak}
        if way != "ours":
            figures |= {f"over_{way}": timing.seconds / ours.seconds, f"{differ}_{way}": max(
                abs(a - b) / b for a, b in zip(ours.results, timing.results, strict=True))}
    record(config, kind, model=name, dtype=dtype, micro_batch_size=B, sequence_length=T,
           threads=torch.get_num_threads(), **figures)


def measure_busy(config: BenchConfig, *training) -> None:
    """Training alone, and beside a process that computes: threads that wait at a barrier spin
    briefly, as the scripts do, or long, as by default. Linux gives each session an equal share."""
    for kind in ("training alone", "training beside another process"):
        others = [] if kind == "training alone" else [subprocess.Popen(
            [sys.executable, "-c", BUSY], start_new_session=True)]
        try:
            measure_training(config, kind, *training, ("ours", "ours_spinning"))
        finally:
            [other.kill() for other in others]


def bench_train(config: BenchConfig) -> None:
    measure_limits(config, torch.device("cpu"), DTYPES, *LIMITS[config.quick])
    names, shape, loss_shape, peak_shape = (
        (("tiny",), QUICK_SHAPE, QUICK_SHAPE, QUICK_PEAK_SHAPE) if config.quick else
        (("30M", "124M"), (4, 1024), (4, 256), (32, 256)))
    measure_busy(config, names[0], DTYPES[0], loss_shape, config.rounds + 1)
    for dtype in DTYPES:
        for name in names:
            measure_training(config, "training", name, dtype, shape, config.rounds + 1, WAYS)
        measure_training(config, "losses", names[0], dtype, loss_shape, LOSS_STEPS,
                         (*WAYS, "other_seed"))
        measure_training(config, "training memory", names[0], dtype, peak_shape, 3, WAYS[:2])


if __name__ == "__main__":
    run_bench(bench_train, BenchConfig, __doc__)
