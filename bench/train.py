"""Measures training: this trainer's step against the textbook's and against Hugging Face's model in
the same loop, each in a process of its own; and what of a run is no training.

The textbook's step is that of nanoGPT and build-nanogpt: all logits at once; on a CPU eager, with
PyTorch's defaults; on a GPU compiled, fused AdamW, the vocabulary padded to 50304. It runs on our
`GPT`, whose blocks are the textbook's and whose default loss is its.
"""

import dataclasses
import functools
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bench.harness import (
    BenchConfig,
    Contestant,
    Taken,
    contest,
    python_script,
    record,
    run_quietly,
    seconds,
)
from minigpt2.checkpoint import save_checkpoint
from minigpt2.distributed import autocast, missing_for_compile, start
from minigpt2.metrics import flops_per_token
from minigpt2.optimizer import make_optimizer
from minigpt2.tokenizer import EOT_TOKEN, load_encoder
from model import GPT, GPTConfig
from pretrain_data.pydocs import read_documents

SIZES = {"tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128),
         "30M": GPTConfig(n_layer=6, n_head=6, n_embd=384), "124M": GPTConfig()}
WAYS = ("ours", "textbook", "hugging_face")
SHAPE, QUICK_SHAPE = (4, 1024), (2, 128)  # (B, T) of the updates that are timed
LOSS_STEPS, LOSS_SHAPE = 20, (4, 256)
WIDE_SHAPE, QUICK_WIDE_SHAPE = (32, 256), (32, 64)  # micro-batch 32
RUN_UPDATES, RUN_TOKENS = 40, 8192
CORPUS_TOKENS = 200_000
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def real_tokens(count: int) -> torch.Tensor:
    """So many ids of the embedded corpus, (count,) int64, from its start again if need be."""
    ids = torch.tensor(corpus_ids())
    return ids.repeat(-(-count // len(ids)))[:count]


@functools.cache
def corpus_ids() -> list[int]:
    encode, ids = load_encoder("tiktoken"), []
    for document in read_documents():
        ids += [EOT_TOKEN, *encode(document.text).tolist()]
        if len(ids) >= CORPUS_TOKENS:
            break
    return ids


def make_training(way: str, sizes: GPTConfig, shape: tuple[int, int], dtype: torch.dtype,
                  tokens: torch.Tensor, seed: int = 0, device: str = "cpu", compiled: bool = False,
                  ) -> Callable[[], float]:
    """An update of one micro-step of `shape` (B, T) on the next of `tokens`: returns its loss."""
    if way == "ours":  # sets what the trainer sets
        start(device)
    torch.manual_seed(seed)
    on_gpu = torch.device(device).type == "cuda"
    if way == "textbook" and on_gpu:
        sizes = dataclasses.replace(sizes, vocab_size=50304)
    model = GPT(sizes).to(device)
    if way == "hugging_face":
        model = as_hugging_face(model).to(device)
    optimizer = make_optimizer(model, **ADAMW)
    if way != "ours":  # the same groups; on a CPU PyTorch's default kernels
        options = {"foreach": None, "fused": on_gpu or None}
        optimizer = torch.optim.AdamW([group | options for group in optimizer.param_groups])
    if compiled:
        model.compile()
    (B, T), where = shape, torch.device(device)
    batches = iter(tokens[: len(tokens) // (B * T + 1) * (B * T + 1)].view(-1, B * T + 1))

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if way == "ours":
            return model(inputs, targets, reduction="sum", return_logits=False)[1] / (B * T)
        if way == "textbook":
            return model(inputs, targets)[1]
        return model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    def update() -> float:
        batch = next(batches).to(where)
        inputs, targets = batch[:-1].view(B, T), batch[1:].view(B, T)
        with autocast(where, dtype):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return update


def as_hugging_face(model: GPT) -> torch.nn.Module:
    """Hugging Face's model with the same weights, through a checkpoint, in its own defaults but
    for dropout."""
    from transformers import GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(Path(name), 0, model)
        return GPT2LMHeadModel.from_pretrained(folder, resid_pdrop=0.0, embd_pdrop=0.0,
                                               attn_pdrop=0.0).train()


def train_in_turn(ways: tuple[str, ...], steps: int, sizes: GPTConfig, shape: tuple[int, int],
                  dtype: torch.dtype, seed: int = 0) -> dict[str, Taken]:
    """Steps of all ways in turn, on the same batches; their results are the losses."""
    tokens = real_tokens(steps * (shape[0] * shape[1] + 1))
    return contest(steps, {way: Contestant(make_training, way, sizes, shape, dtype, tokens, seed)
                           for way in ways})


def furthest(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(losses, others, strict=True))


def measure_speed(config: BenchConfig, name: str, shape: tuple[int, int], dtype: torch.dtype,
                  ways: tuple[str, ...]) -> None:
    """Tokens a second of a whole update, one unmeasured first."""
    results = train_in_turn(ways, config.rounds + 1, SIZES[name], shape, dtype)
    rates = {way: result.rate(shape[0] * shape[1]) for way, result in results.items()}
    flops = flops_per_token(GPT(SIZES[name]), shape[1])
    record(config, "training", model=name, dtype=str(dtype).removeprefix("torch."),
           micro_batch_size=shape[0], sequence_length=shape[1], threads=torch.get_num_threads(),
           **{f"{way}_tokens_per_sec": rate for way, rate in rates.items()},
           gflops=rates["ours"] * flops / 1e9,
           **{f"over_{way}": rates["ours"] / rate for way, rate in rates.items() if way != "ours"},
           **{f"loss_differs_from_{way}": furthest(results["ours"].results, result.results)
              for way, result in results.items() if way != "ours"})


def measure_losses(config: BenchConfig, name: str, ways: tuple[str, ...]) -> None:
    """The largest relative difference of a loss in 20 updates; in bfloat16 beside that between two
    seeds of the weights."""
    shape = QUICK_SHAPE if config.quick else LOSS_SHAPE
    for dtype in (torch.float32, torch.bfloat16):
        results = train_in_turn(ways, LOSS_STEPS, SIZES[name], shape, dtype)
        other = train_in_turn(("textbook",), LOSS_STEPS, SIZES[name], shape, dtype, seed=1)
        record(config, "losses", model=name, dtype=str(dtype).removeprefix("torch."),
               updates=LOSS_STEPS, first=results["ours"].results[0],
               last=results["ours"].results[-1],
               **{f"differ_from_{way}": furthest(results["ours"].results, result.results)
                  for way, result in results.items() if way != "ours"},
               two_seeds_differ=furthest(results["textbook"].results,
                                         other["textbook"].results))


def measure_peak(config: BenchConfig, name: str, dtype: torch.dtype) -> None:
    """The most memory of a whole process in three updates of micro-batch 32."""
    shape = QUICK_WIDE_SHAPE if config.quick else WIDE_SHAPE
    results = train_in_turn(("ours", "textbook"), 3, SIZES[name], shape, dtype)
    record(config, "training memory", model=name, dtype=str(dtype).removeprefix("torch."),
           micro_batch_size=shape[0], sequence_length=shape[1],
           ours_bytes=results["ours"].peak, textbook_bytes=results["textbook"].peak,
           ratio=results["ours"].peak / results["textbook"].peak)


def trainer_command(config: BenchConfig, name: str, folder: Path, out_dir: Path,
                    **flags: object) -> list[str]:
    """The trainer on the embedded corpus, which is written first if it is not there."""
    data = folder / "data"
    if not data.exists():
        run_quietly(python_script("pretrain_data/pydocs_corpus.py", "--out-dir", data,
                                  "--shard-tokens", 100_000, "--max-tokens", 600_000))
    sizes = SIZES[name]
    flags |= {"data_dir": data, "out_dir": out_dir, "device": "cpu", "dtype": "bfloat16",
              "n_layer": sizes.n_layer, "n_head": sizes.n_head, "n_embd": sizes.n_embd}
    return python_script("trainer.py", *(part for flag, value in flags.items() for part in
                                         (f"--{flag.replace('_', '-')}", value)))


def measure_run(config: BenchConfig, name: str, folder: Path) -> None:
    """A run with the 124M recipe's share of validation, 4 % of the tokens that are trained on (at
    its begin and its end), and a checkpoint at the end. What share of it was no update?"""
    updates, tokens = (4, 1024) if config.quick else (RUN_UPDATES, RUN_TOKENS)
    run_quietly(trainer_command(
        config, name, folder, folder / "run", sequence_length=128, micro_batch_size=tokens // 128,
        total_batch_size=tokens, max_steps=updates, eval_interval=updates,
        eval_tokens=updates * tokens // 50, sample_steps=0))
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    end = json.loads(lines[-1])
    record(config, "run", model=name, updates=updates, tokens_per_update=tokens,
           seconds=end["seconds"], beside_updates_s=end["beside_updates_s"],
           share=end["beside_updates_s"] / end["seconds"])


def measure_start(config: BenchConfig, name: str, folder: Path) -> None:
    """Seconds of a whole run of one update: with no compiler, its cache cold, its cache warm."""
    missing = missing_for_compile(torch.device("cpu"))
    if missing:
        print(f"the start with a compiler is not measured: it needs {missing}")
    for cache in ("no compiler",) if config.quick or missing else ("no compiler", "cold", "warm"):
        command = trainer_command(config, name, folder, folder / cache, sequence_length=128,
                                  micro_batch_size=4, total_batch_size=512, max_steps=1,
                                  eval_tokens=512, sample_steps=0)
        command += [] if cache == "no compiler" else ["--compile"]
        taken = seconds(lambda command=command: run_quietly(
            command, TORCHINDUCTOR_CACHE_DIR=str(folder / "compiled")))
        record(config, "start", model=name, cache=cache, seconds=taken)


def bench_train(config: BenchConfig) -> None:
    ways = WAYS
    if importlib.util.find_spec("transformers") is None:  # a dependency of the tests only
        print("Hugging Face is not measured: pip install transformers")
        ways = WAYS[:2]
    names, shape = (("tiny",), QUICK_SHAPE) if config.quick else (("30M", "124M"), SHAPE)
    for dtype in (torch.float32, torch.bfloat16):
        for name in names:
            measure_speed(config, name, shape, dtype, ways)
        measure_peak(config, names[0], dtype)
    measure_losses(config, names[0], ways)
    with tempfile.TemporaryDirectory() as folder:
        measure_run(config, names[0], Path(folder))
        measure_start(config, names[0], Path(folder))
