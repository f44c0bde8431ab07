"""Greedy sampling against Hugging Face's `generate` and, if installed, CTranslate2.

    python bench/decode.py --quick                                # smoke test, half a minute
    python bench/decode.py --log image/logs/bench_decode.jsonl    # 50 minutes
"""

import importlib.util
import itertools
import json
import pathlib
import sys
import tempfile
import zlib

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.harness import BenchConfig, Step, compare, measure_limits, record, run_bench
from bench.train import DTYPES, LIMITS, SIZES, as_hugging_face, zipf_tokens
from inference import generate
from minigpt2.checkpoint import save_checkpoint
from minigpt2.kernels import can_pack, prepare_to_sample
from model import GPT, GPTConfig

# Random weights repeat one token; scaled like this they do not, and round like trained weights
PROJECTION_SCALE, OTHER_SCALE = 10.0, 2.0


def make_decoding(way: str, sizes: GPTConfig, prompts: torch.Tensor, new_tokens: int,
                  dtype: torch.dtype = torch.float32, device: str = "cpu") -> Step:
    """Continues prompts (B, T) and returns a checksum of the new tokens."""
    torch.manual_seed(0)
    model, prompts = GPT(sizes).eval(), prompts.to(device)
    for name, parameter in model.transformer.h.named_parameters():
        if parameter.dim() > 1:
            parameter.data *= PROJECTION_SCALE if "c_proj" in name else OTHER_SCALE
    if way == "ctranslate2":
        return make_ctranslate2(model, prompts, new_tokens, str(dtype)[6:])
    if way == "hugging_face":
        model = as_hugging_face(model).eval().to(device, dtype)
    else:
        model = prepare_to_sample(model.to(device), dtype)
    masks = torch.ones_like(prompts)

    @torch.no_grad()
    def step() -> float:
        if way == "hugging_face":
            ids = model.generate(prompts, attention_mask=masks, max_new_tokens=new_tokens,
                                 min_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        else:
            ids = generate(model, prompts, masks, 0.0, new_tokens)[0]
        ids = ids[:, prompts.size(1):]  # (B, new_tokens)
        assert ids.size(1) == new_tokens, "a row sampled <|endoftext|>"
        return zlib.crc32(ids.cpu().numpy().tobytes())
    return step


def make_ctranslate2(model: GPT, prompts: torch.Tensor, new_tokens: int, dtype: str) -> Step:
    import ctranslate2
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save_checkpoint(pathlib.Path(name), 0, model)
        converted = pathlib.Path(name) / "converted"
        ctranslate2.converters.TransformersConverter(str(checkpoint)).convert(
            str(converted), quantization=dtype)
        words = json.loads((converted / "vocabulary.json").read_text(encoding="utf-8"))
        generator = ctranslate2.Generator(str(converted), compute_type=dtype,
                                          intra_threads=torch.get_num_threads())
    tokens = [[words[i] for i in row] for row in prompts.tolist()]

    def step() -> float:
        results = generator.generate_batch(tokens, max_length=new_tokens, min_length=new_tokens,
                                           sampling_topk=1, include_prompt_in_result=False)
        ids = torch.tensor([result.sequences_ids[0] for result in results])  # (B, new_tokens)
        return zlib.crc32(ids.numpy().tobytes())
    return step


def measure_decoding(config: BenchConfig, name: str, prompts: torch.Tensor, new_tokens: int,
                     dtype: torch.dtype, device: str = "cpu") -> None:
    others = {"hugging_face": dtype != torch.int8, "ctranslate2": (
        device == "cpu" and dtype in (torch.float32, torch.int8)
        and importlib.util.find_spec("ctranslate2") is not None)}
    ways = ["ours", *(way for way, is_measured in others.items() if is_measured)]
    timings = compare(ways, config.rounds + 1, make_decoding, SIZES[name], prompts, new_tokens,
                      dtype, device)
    ours, figures = timings["ours"], {}
    for way, timing in timings.items():
        figures[f"{way}_tokens_per_sec"] = len(prompts) * new_tokens / timing.seconds
        if way != "ours":
            figures |= {f"over_{way}": timing.seconds / ours.seconds,
                        f"memory_over_{way}": ours.peak / timing.peak,
                        f"same_tokens_as_{way}": ours.results[0] == timing.results[0]}
    record(config, "decoding", model=name, dtype=dtype, batch=len(prompts), prompt=prompts.size(1),
           new_tokens=new_tokens, **figures)


def bench_decode(config: BenchConfig) -> None:
    measure_limits(config, torch.device("cpu"), DTYPES, *LIMITS[config.quick])
    name, batches, lengths, new_tokens, dtypes = (
        ("tiny", (4,), (32,), 16, DTYPES[:1]) if config.quick else
        ("124M", (1, 8, 32), (32, 512), 128, DTYPES))
    prompts = [zipf_tokens(batch * length).view(batch, length)
               for batch, length in itertools.product(batches, lengths)]
    dtypes = (*dtypes, *[torch.int8] * can_pack(torch.int8))  # where the processor has it
    for dtype, ids in itertools.product(dtypes, prompts):
        measure_decoding(config, name, ids, new_tokens, dtype)


if __name__ == "__main__":
    run_bench(bench_decode, BenchConfig, __doc__)
