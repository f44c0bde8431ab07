"""Measures sampling and validation: ours against Hugging Face's `generate` with its own cache, and
against a textbook's forward pass that holds all logits."""

import importlib.util
import itertools
import statistics
import time
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.harness import BenchConfig, Contestant, contest, record
from bench.train import SIZES, as_hugging_face, real_tokens
from inference import generate
from minigpt2.config import UserError
from minigpt2.distributed import Launch, autocast, mean_loss, start
from minigpt2.kernels import prepare_to_sample
from model import GPT, GPTConfig

NEW_TOKENS, BATCHES, PROMPTS = 128, (1, 8, 32), (32, 512)
# Random weights are made larger, or every token would be the one before, again: these, which keep
# rounding as small as a trained model does
SHARPER_PROJECTIONS, SHARPER_OTHERS = 10.0, 2.0
EARLY, LATE, AROUND = 16, 900, 8  # cost per token is compared at these lengths, +- so many tokens
GROWTH_ROUNDS = 3  # at most: each is a text of 916 tokens
EVAL_SHAPE, QUICK_EVAL_SHAPE = (8, 1024), (2, 128)


def sharpened(sizes: GPTConfig) -> GPT:
    """A model with random weights whose greedy text is no repetition of one token."""
    torch.manual_seed(0)
    model = GPT(sizes).eval()
    with torch.no_grad():
        for name, parameter in model.transformer.h.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(SHARPER_PROJECTIONS if "c_proj" in name else SHARPER_OTHERS)
    return model


def make_decoding(way: str, sizes: GPTConfig, prompts: torch.Tensor, new: int, dtype: torch.dtype,
                  device: str) -> Callable[[], float]:
    """Continues prompts (B, T) greedily by `new` tokens; returns a checksum of these, which
    tells whether two ways agree."""
    model = sharpened(sizes)
    if way == "ours":
        model = prepare_to_sample(model.to(device), dtype)
    else:
        model = as_hugging_face(model).eval().to(device, dtype)
    ids = prompts.to(device)
    masks = torch.ones_like(ids)

    def continued() -> float:
        if way == "ours":
            output = generate(model, ids, masks, 0.0, new)[0]
        else:
            output = model.generate(ids, attention_mask=masks, max_new_tokens=new,
                                    min_new_tokens=new, do_sample=False, pad_token_id=0)
        if output.size(1) != ids.size(1) + new:
            raise UserError(f"{output.size(1) - ids.size(1)} new tokens, not {new}: a row has met "
                            "its end, so that the ways do not do the same")
        return zlib.crc32(output[:, ids.size(1):].cpu().numpy().tobytes())
    return continued


def measure_decoding(config: BenchConfig, name: str, batch: int, prompt: int, new: int,
                     dtype: torch.dtype, device: str = "cpu") -> None:
    prompts = real_tokens(batch * prompt).view(batch, prompt)
    taken = contest(config.rounds + 1, {
        way: Contestant(make_decoding, way, SIZES[name], prompts, new, dtype, device)
        for way in ("ours", "hugging_face")})
    rates = {way: result.rate(batch * new) for way, result in taken.items()}
    same = taken["ours"].results[0] == taken["hugging_face"].results[0]
    record(config, "decoding", model=name, dtype=str(dtype).removeprefix("torch."), batch=batch,
           prompt=prompt, new_tokens=new, ours_tokens_per_sec=rates["ours"],
           hugging_face_tokens_per_sec=rates["hugging_face"],
           ratio=rates["ours"] / rates["hugging_face"], same_tokens=same,
           memory_ratio=taken["ours"].peak / taken["hugging_face"].peak)


def make_first_token(way: str, sizes: GPTConfig, prompts: torch.Tensor) -> Callable[[], float]:
    """One token of `generate`, or a plain forward pass over the same prompts, without a cache,
    up to the logits of the last position."""
    model = prepare_to_sample(sharpened(sizes))

    @torch.no_grad()
    def forward() -> float:
        return model.lm_head(model.hidden_states(prompts)[:, -1]).argmax(-1)[0].item()

    def first() -> float:
        return generate(model, prompts, torch.ones_like(prompts), 0.0, 1)[0][0, -1].item()
    return first if way == "first_token" else forward


def make_growth(sizes: GPTConfig, batch: int, early: int, late: int) -> Callable[[], float]:
    """A text of full length in one go; returns how many times what a token around `early` costs,
    one around `late` does."""
    model = prepare_to_sample(sharpened(sizes))
    prompts = real_tokens(batch).view(batch, 1)
    times: dict[int, float] = {}  # when a row had grown to so many tokens

    def noted(row: int, tokens: list[int]) -> None:
        if row == 0:
            times[len(times) + 1] = time.perf_counter()

    def median_cost(length: int) -> float:
        around = range(length - AROUND, length + AROUND)
        return statistics.median(times[i + 1] - times[i] for i in around)

    def growth() -> float:
        times.clear()
        generate(model, prompts, torch.ones_like(prompts), 0.0, late + 2 * AROUND,
                 on_tokens=noted)
        if len(times) < late + 2 * AROUND:
            raise UserError(f"the row has met its end after {len(times)} tokens")
        return median_cost(late) / median_cost(early)
    return growth


def bench_decode(config: BenchConfig) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("sampling is measured against Hugging Face's: pip install transformers")
    name, batches, lengths, new, early, late, dtypes = (
        ("tiny", (4,), (32,), 16, 9, 24, (torch.float32,)) if config.quick else
        ("124M", BATCHES, PROMPTS, NEW_TOKENS, EARLY, LATE, (torch.float32, torch.bfloat16)))
    for batch in batches:
        taken = contest(min(config.rounds, GROWTH_ROUNDS) + 1, {"it": Contestant(
            make_growth, SIZES[name], batch, early, late)})["it"]
        record(config, "growth", model=name, batch=batch, early=early, late=late,
               ratio=statistics.median(taken.results[1:]))
    for batch, length in itertools.product(batches, lengths):
        prompts = real_tokens(batch * length).view(batch, length)
        taken = contest(config.rounds + 1, {
            way: Contestant(make_first_token, way, SIZES[name], prompts)
            for way in ("first_token", "forward")})
        record(config, "first token", model=name, batch=batch, prompt=length,
               ms=1000 / taken["first_token"].rate(1),
               ratio=taken["forward"].rate(1) / taken["first_token"].rate(1))
    for dtype, batch, length in itertools.product(dtypes, batches, lengths):
        measure_decoding(config, name, batch, length, new, dtype)


def make_validation(way: str, sizes: GPTConfig, inputs: torch.Tensor, targets: torch.Tensor,
                    dtype: torch.dtype) -> Callable[[], float]:
    """The mean loss of one batch of inputs and targets (B, T)."""
    launch = start("cpu") if way == "ours" else Launch(0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    model = GPT(sizes)

    @torch.no_grad()
    def textbook() -> float:
        with autocast(launch.device, dtype):
            logits = model(inputs)[0]
            return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1)).item()

    def ours() -> float:
        return mean_loss(model, [(inputs, targets)], launch, dtype)
    return ours if way == "ours" else textbook


def bench_eval(config: BenchConfig) -> None:
    name, shape = ("tiny", QUICK_EVAL_SHAPE) if config.quick else ("124M", EVAL_SHAPE)
    tokens = real_tokens(shape[0] * shape[1] + 1)
    inputs, targets = tokens[:-1].view(shape), tokens[1:].view(shape)
    for dtype in (torch.float32, torch.bfloat16):
        taken = contest(config.rounds + 1, {
            way: Contestant(make_validation, way, SIZES[name], inputs, targets, dtype)
            for way in ("ours", "textbook")})
        rates = {way: result.rate(shape[0] * shape[1]) for way, result in taken.items()}
        ours, textbook = (taken[way].results[0] for way in ("ours", "textbook"))
        record(config, "validation", model=name, dtype=str(dtype).removeprefix("torch."),
               micro_batch_size=shape[0], sequence_length=shape[1],
               ours_tokens_per_sec=rates["ours"], textbook_tokens_per_sec=rates["textbook"],
               ratio=rates["ours"] / rates["textbook"],
               loss_differs=abs(ours - textbook) / textbook,
               memory_ratio=taken["ours"].peak / taken["textbook"].peak)
