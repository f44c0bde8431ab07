"""Measures training: this trainer's step against the textbook's and against Hugging Face's model in
the same loop, each in a process of its own; and what of a run is no training.

The textbook's step is the one of nanoGPT and build-nanogpt: eager, all logits at once, PyTorch's
defaults. It runs on our `GPT`, whose blocks are the textbook's; `return_logits=True` is its loss.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import save_checkpoint
from distributed import autocast, start
from measure import BenchConfig, Contestant, Taken, contest, python_script, record, seconds
from metrics import flops_per_token
from model import GPT, GPTConfig
from optimizer import make_optimizer
from pydocs import read_documents
from tokenizer import EOT_TOKEN, load_encoder

SIZES = {"tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128),
         "30M": GPTConfig(n_layer=6, n_head=6, n_embd=384), "124M": GPTConfig()}
WAYS = ("ours", "textbook", "hugging_face")
LOSS_STEPS, LOSS_SHAPE = 20, (4, 256)
WIDE_SHAPE = (32, 256)  # micro-batch 32
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def real_tokens(count: int) -> torch.Tensor:
    """So many ids of the embedded corpus, (count,) int64."""
    encode, ids = load_encoder("tiktoken"), []
    for document in read_documents():
        ids += [EOT_TOKEN, *encode(document.text).tolist()]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    return torch.tensor(ids).repeat(-(-count // len(ids)))[:count]


def make_training(way: str, sizes: GPTConfig, shape: tuple[int, int], dtype: torch.dtype,
                  tokens: torch.Tensor, seed: int = 0, device: str = "cpu", compiled: bool = False,
                  ) -> Callable[[], float]:
    """An update of one micro-step of `shape` (B, T) on the next of `tokens`: returns its loss."""
    if way == "ours":  # sets what the trainer sets
        start(device)
    torch.manual_seed(seed)
    model = GPT(sizes).to(device)
    if way == "hugging_face":
        model = as_hugging_face(model).to(device)
    optimizer = (make_optimizer(model, **ADAMW) if way == "ours" else
                 torch.optim.AdamW(model.parameters(), **ADAMW))
    if compiled:
        model.compile()
    (B, T), where = shape, torch.device(device)
    batches = iter(tokens[: len(tokens) // (B * T + 1) * (B * T + 1)].view(-1, B * T + 1))

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if way == "ours":
            return model(inputs, targets, reduction="sum", return_logits=False)[1] / (B * T)
        if way == "textbook":
            logits = model(inputs)[0]
            return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return model(inputs, labels=targets, shift_labels=targets).loss  # its own

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
    results = train_in_turn(ways, config.repeats + 1, SIZES[name], shape, dtype)
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
    for dtype in (torch.float32, torch.bfloat16):
        results = train_in_turn(ways, LOSS_STEPS, SIZES[name], LOSS_SHAPE, dtype)
        other = train_in_turn(("textbook",), LOSS_STEPS, SIZES[name], LOSS_SHAPE, dtype, seed=1)
        record(config, "losses", model=name, dtype=str(dtype).removeprefix("torch."),
               updates=LOSS_STEPS, first=results["ours"].results[0],
               last=results["ours"].results[-1],
               **{f"differ_from_{way}": furthest(results["ours"].results, result.results)
                  for way, result in results.items() if way != "ours"},
               two_seeds_differ=furthest(results["textbook"].results,
                                         other["textbook"].results))


def measure_peak(config: BenchConfig, name: str, dtype: torch.dtype) -> None:
    """The most memory of a whole process in three updates of micro-batch 32."""
    results = train_in_turn(("ours", "textbook"), 3, SIZES[name], WIDE_SHAPE, dtype)
    record(config, "training memory", model=name, dtype=str(dtype).removeprefix("torch."),
           micro_batch_size=WIDE_SHAPE[0], sequence_length=WIDE_SHAPE[1],
           ours_bytes=results["ours"].peak, textbook_bytes=results["textbook"].peak,
           ratio=results["ours"].peak / results["textbook"].peak)


def measure_run(config: BenchConfig, name: str, folder: Path) -> None:
    """A run of the trainer with the proportions of the 124M recipe (validation on 4 % of the tokens
    that were trained on, a checkpoint with every second): what share of it was no update."""
    data = folder / "data"
    subprocess.run(python_script("pretrain_data/pydocs_corpus.py", "--out-dir", data),
                   check=True, capture_output=True)
    sizes, updates, tokens = SIZES[name], 40, 8192
    subprocess.run(python_script(
        "trainer.py", "--data-dir", data, "--out-dir", folder / "run", "--device", "cpu", "--dtype",
        "bfloat16", "--n-layer", sizes.n_layer, "--n-head", sizes.n_head, "--n-embd", sizes.n_embd,
        "--sequence-length", 256, "--micro-batch-size", 32, "--total-batch-size", tokens,
        "--max-steps", updates, "--eval-interval", updates // 2, "--eval-tokens",
        updates // 2 * tokens // 25, "--save-interval", updates), check=True, capture_output=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    end = json.loads(lines[-1])
    record(config, "run", model=name, updates=updates, seconds=end["seconds"],
           beside_updates_s=end["beside_updates_s"],
           share=end["beside_updates_s"] / end["seconds"])


def measure_start(config: BenchConfig, name: str, folder: Path) -> None:
    """Seconds of a whole run of one update: with no compiler, its cache cold, its cache warm."""
    sizes = SIZES[name]
    for cache in ("no compiler", "cold", "warm"):
        compiled = [] if cache == "no compiler" else ["--compile"]
        command = python_script(
            "trainer.py", "--data-dir", folder / "data", "--out-dir", folder / cache, "--device",
            "cpu", "--dtype", "bfloat16", "--n-layer", sizes.n_layer, "--n-head", sizes.n_head,
            "--n-embd", sizes.n_embd, "--sequence-length", 256, "--micro-batch-size", 4,
            "--total-batch-size", 1024, "--max-steps", 1, "--eval-tokens", 1024, "--sample-steps",
            0, *compiled)
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
        taken = seconds(lambda command=command, environment=environment: subprocess.run(
            command, check=True, capture_output=True, env=environment))
        record(config, "start", model=name, cache=cache, seconds=taken)


def bench_train(config: BenchConfig) -> None:
    try:
        import transformers  # noqa: F401, a dependency of the tests only
        ways = WAYS
    except ImportError:
        print("Hugging Face is not measured: pip install transformers")
        ways = WAYS[:2]
    names, shape = (("tiny",), (4, 256)) if config.quick else (("30M", "124M"), (4, 1024))
    for dtype in (torch.float32, torch.bfloat16):
        for name in names:
            measure_speed(config, name, shape, dtype, ways)
        measure_peak(config, names[0], dtype)
    measure_losses(config, names[0], ways)
    with tempfile.TemporaryDirectory() as folder:
        measure_run(config, names[0], Path(folder))
        measure_start(config, names[0], Path(folder))
