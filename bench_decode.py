"""Measures sampling and validation: ours against Hugging Face's `generate` with its own cache, and
against a textbook's forward pass that holds all logits."""

import importlib.util
import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench_train import SIZES, as_hugging_face, real_tokens
from config import UserError
from distributed import Launch, autocast, mean_loss, start
from measure import BenchConfig, Contestant, contest, record
from model import GPT, GPTConfig
from sampling import generate

NEW_TOKENS, BATCHES, PROMPTS = 128, (1, 8, 32), (32, 512)
SHARPER = 4.0  # the blocks' random weights are scaled up by
EVAL_SHAPE, QUICK_EVAL_SHAPE = (8, 1024), (2, 128)


def make_decoding(way: str, sizes: GPTConfig, prompts: torch.Tensor, new: int, dtype: torch.dtype,
                  device: str) -> Callable[[], float]:
    """Continues prompts (B, T) greedily by `new` tokens; returns a checksum of these, which
    tells whether two ways agree."""
    if way == "ours":
        start(device)
    torch.manual_seed(0)
    model = GPT(sizes).eval()
    with torch.no_grad():  # else every token would be the one before, again
        for parameter in model.transformer.h.parameters():
            parameter.mul_(SHARPER)
    model = (as_hugging_face(model).eval() if way == "hugging_face" else model).to(device, dtype)
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
           ratio=rates["ours"] / rates["hugging_face"], same_tokens=same)


def bench_decode(config: BenchConfig) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("sampling is measured against Hugging Face's: pip install transformers")
    if config.quick:
        measure_decoding(config, "tiny", 4, 32, 16, torch.float32)
        return
    for batch in BATCHES:
        for prompt in PROMPTS:
            measure_decoding(config, "124M", batch, prompt, NEW_TOKENS, torch.float32)


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
