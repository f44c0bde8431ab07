"""Greedy sampling against Hugging Face's `generate`; first tokens; growth within a text.

    python bench/decode.py --quick                                # smoke test, half a minute
    python bench/decode.py --log image/logs/bench_decode.jsonl    # 50 minutes
"""

import itertools
import pathlib
import statistics
import sys
import time
import zlib

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, Step, compare, record, run_bench
from bench.train import DTYPES, SIZES, as_hugging_face, zipf_tokens
from inference import generate
from minigpt2.kernels import prepare_to_sample
from model import GPT, GPTConfig

# Random weights repeat one token; scaled like this they do not, and round like trained weights
PROJECTION_SCALE, OTHER_SCALE = 10.0, 2.0


def make_decoding(way: str, sizes: GPTConfig, prompts: torch.Tensor, new_tokens: int,
                  dtype: torch.dtype = torch.float32, device: str = "cpu") -> Step:
    """Continues prompts (B, T) and returns a checksum of the new tokens. "forward" is a forward
    pass without a cache, up to the next token."""
    torch.manual_seed(0)
    model, prompts = GPT(sizes).eval(), prompts.to(device)
    for name, parameter in model.transformer.h.named_parameters():
        if parameter.dim() > 1:
            parameter.data *= PROJECTION_SCALE if "c_proj" in name else OTHER_SCALE
    if way == "hugging_face":
        model = as_hugging_face(model).eval().to(device, dtype)
    else:
        model = prepare_to_sample(model.to(device), dtype)
    masks = torch.ones_like(prompts)

    @torch.no_grad()
    def step() -> float:
        if way == "forward":
            return model.lm_head(model.hidden_states(prompts)[:, -1]).argmax(-1)[0].item()
        if way == "hugging_face":
            ids = model.generate(prompts, attention_mask=masks, max_new_tokens=new_tokens,
                                 min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        else:
            ids = generate(model, prompts, masks, 0.0, new_tokens)[0]
        ids = ids[:, prompts.size(1):]  # (B, new_tokens)
        assert ids.size(1) == new_tokens, "a row sampled <|endoftext|>"
        return zlib.crc32(ids.cpu().numpy().tobytes())
    return step


def make_growth(way: str, sizes: GPTConfig, batch: int, early: int, late: int) -> Step:
    """In one long text, the cost of a token at `late` over that at `early`, medians of 16."""
    torch.manual_seed(0)
    model, times, prompts = prepare_to_sample(GPT(sizes)), [], zipf_tokens(batch).view(batch, 1)

    def step() -> float:
        times.clear()
        generate(model, prompts, torch.ones_like(prompts), 1.0, late + 16, top_k=2,
                 on_tokens=lambda row, ids: times.append(time.perf_counter()) if row == 0 else None)
        cost = {at: statistics.median(times[i + 1] - times[i] for i in range(at - 8, at + 8))
                for at in (early, late)}
        return cost[late] / cost[early]
    return step


def measure_decoding(config: BenchConfig, name: str, prompts: torch.Tensor, new_tokens: int,
                     dtype: torch.dtype, device: str = "cpu") -> None:
    timings = compare(("ours", "hugging_face"), config.rounds + 1, make_decoding, SIZES[name],
                      prompts, new_tokens, dtype, device)
    ours, other = timings.values()
    rates = {f"{way}_tokens_per_sec": len(prompts) * new_tokens / timing.seconds
             for way, timing in timings.items()}
    record(config, "decoding", model=name, dtype=dtype, batch=len(prompts), prompt=prompts.size(1),
           new_tokens=new_tokens, same_tokens=ours.results[0] == other.results[0], **rates,
           ratio=other.seconds / ours.seconds, memory_ratio=ours.peak / other.peak)


def bench_decode(config: BenchConfig) -> None:
    name, batches, lengths, new_tokens, dtypes = (
        ("tiny", (4,), (32,), 16, DTYPES[:1]) if config.quick else
        ("124M", (1, 8, 32), (32, 512), 128, DTYPES))
    prompts = [zipf_tokens(batch * length).view(batch, length)
               for batch, length in itertools.product(batches, lengths)]
    early, late = (9, 24) if config.quick else (16, 900)
    for batch in batches:
        growth = compare(("ours",), 4, make_growth, SIZES[name], batch, early, late)["ours"]
        record(config, "growth", model=name, batch=batch, early=early, late=late,
               ratio=statistics.median(growth.results[1:]))
    for ids in prompts:
        first, forward = compare(("first_token", "forward"), config.rounds + 1, make_decoding,
                                 SIZES[name], ids, 1).values()
        record(config, "first token", model=name, batch=ids.size(0), prompt=ids.size(1),
               ms=1000 * first.seconds, ratio=first.seconds / forward.seconds)
    for dtype, ids in itertools.product(dtypes, prompts):
        measure_decoding(config, name, ids, new_tokens, dtype)


if __name__ == "__main__":
    run_bench(bench_decode, BenchConfig, __doc__)
