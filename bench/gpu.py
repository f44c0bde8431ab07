"""One GPU: throughput, MFU and peak memory by micro-batch and with other settings; sampling.

    python bench/gpu.py --log image/logs/bench_gpu.jsonl    # ten minutes (estimated)
    python bench/gpu.py --quick                             # also runs on a CPU

What a card cannot run (out of memory, no such kernel or dtype) is reported in one line and skipped.
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.decode import measure_decoding
from bench.harness import BenchConfig, compare, measure_limits, record, run_bench
from bench.train import SIZES, make_training, zipf_tokens
from minigpt2.config import UserError, first_line
from minigpt2.distributed import pick_dtype
from minigpt2.metrics import peak_flops
from model import GPT

WAYS = ("ours", "ours_tuned", "ours_without_cudnn", "textbook")


def measure_micro_batch(config: BenchConfig, way: str, name: str, B: int, T: int,
                        dtype: torch.dtype, device: torch.device, matmul_flops: float) -> None:
    """Whole compiled steps, with the optimizer; the first step compiles."""
    steps, micro_steps = (2, 2) if config.quick else (6, 8)
    timing = compare((way,), steps, make_training, SIZES[name], (B, T), dtype,
                     zipf_tokens(micro_steps * (B * T + 1)), 0, str(device), True, micro_steps)[way]
    rate, peak = micro_steps * B * T / timing.seconds, peak_flops(device)
    flops = rate * GPT(SIZES[name]).flops_per_token(T)
    record(config, "gpu training", model=name, way=way, micro_batch_size=B, sequence_length=T,
           dtype=dtype, tokens_per_sec=rate, mfu=flops / peak if peak else None,
           of_measured_matmul=flops / matmul_flops, peak_bytes=timing.peak)


def bench_gpu(config: BenchConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.quick:
        raise UserError("no GPU is visible: --quick tries this benchmark on a CPU")
    name, micro_batches, T, size, num_bytes, decoded, new_tokens = (
        ("tiny", (2,), 128, 256, 2**20, ((2, 16),), 16) if config.quick else
        ("124M", (16, 32, 64), 1024, 8192, 2**30, ((1, 32), (8, 32), (8, 512), (32, 512)), 128))
    dtype = torch.bfloat16 if device.type == "cpu" else pick_dtype("auto", device)
    [matmul_flops] = measure_limits(config, device, [dtype], size, num_bytes)
    torch.cuda.empty_cache()  # what follows runs in processes that need the whole memory
    jobs = [(f"sampling, {B} x {T}", measure_decoding, name, zipf_tokens(B * T).view(B, T),
             new_tokens, dtype, str(device)) for B, T in decoded]
    jobs += [(f"training, {way}, micro-batch {B}", measure_micro_batch, way, name, B, T, dtype,
              device, matmul_flops) for B in micro_batches
             for way in (WAYS if B == micro_batches[len(micro_batches) // 2] else WAYS[:1])]
    for what, measure, *arguments in jobs:
        try:
            measure(config, *arguments)
        except (RuntimeError, AssertionError, UserError) as error:
            print(f"{what}: not measured: {first_line(error)}")


if __name__ == "__main__":
    run_bench(bench_gpu, BenchConfig, __doc__)
