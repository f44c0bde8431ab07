"""One GPU: throughput, MFU and peak memory by micro-batch; attention backends; sampling.

    python bench/gpu.py --log image/logs/bench_gpu.jsonl    # eight minutes
    python bench/gpu.py --quick                             # also runs on a CPU
"""

import pathlib
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench.decode import measure_decoding
from bench.harness import BenchConfig, alternate, compare, record, run_bench
from bench.train import SIZES, Shape, make_training, zipf_tokens
from minigpt2.config import UserError, first_line
from minigpt2.distributed import device_time
from minigpt2.metrics import flops_per_token, peak_flops
from model import GPT

STEPS = 12  # per micro-batch size; the first one compiles
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH)


def device_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call, from ten at a time."""
    def ten_calls() -> None:
        for _ in range(10):
            call()
        device_time(device)  # waits for the GPU
    return alternate(7, call=ten_calls)["call"] / 10


def measure_micro_batch(config: BenchConfig, way: str, name: str, shape: Shape,
                        device: torch.device, matmul_flops: float) -> None:
    """Whole compiled steps of one micro-step, with the optimizer."""
    (B, T), tokens = shape, zipf_tokens(STEPS * (shape[0] * shape[1] + 1))
    timing = compare((way,), STEPS, make_training, SIZES[name], shape, torch.bfloat16, tokens, 0,
                     str(device), True)[way]
    rate, peak = B * T / timing.seconds, peak_flops(device)
    flops = rate * flops_per_token(GPT(SIZES[name]), T)
    record(config, "gpu training", model=name, way=way, micro_batch_size=B, sequence_length=T,
           tokens_per_sec=rate, mfu=flops / peak if peak else None,
           of_measured_matmul=flops / matmul_flops, peak_bytes=timing.peak)


def measure_attention(config: BenchConfig, shape: Shape, device: torch.device) -> None:
    """Forward and backward pass of causal attention, 12 heads of 64, by every backend."""
    (B, T), options = shape, {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    qkv = [torch.randn(B, 12, T, 64, **options) for _ in range(3)]

    def attend() -> None:
        y = F.scaled_dot_product_attention(*qkv, is_causal=True)
        torch.autograd.grad(y, qkv, y.detach())

    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                duration = device_seconds(attend, device)
        except RuntimeError as error:  # no kernel on this card, or out of memory
            print(f"attention with {backend.name}: {first_line(error)}")
            continue
        record(config, "gpu attention", backend=backend.name, batch=B, sequence_length=T,
               ms=1000 * duration)


def bench_gpu(config: BenchConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.quick:
        raise UserError("no GPU is visible: --quick tries this benchmark on a CPU")
    name, micro_batches, T, size, copied, decoded, new_tokens = (
        ("tiny", (2,), 128, 256, 2**20, ((2, 16),), 16) if config.quick else
        ("124M", (16, 32, 64), 1024, 8192, 2**30, ((1, 32), (8, 32), (8, 512), (32, 512)), 128))
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    matmul_flops = 2 * size**3 / device_seconds(lambda: a @ b, device)
    record(config, "gpu matmul", size=size, tflops=matmul_flops / 1e12)
    source, target = torch.empty(2, copied, device=device, dtype=torch.uint8)
    bandwidth = 2 * copied / device_seconds(lambda: target.copy_(source), device)
    # A sampled token of a single row reads all weights, in bfloat16
    bound = bandwidth / (2 * GPT(SIZES[name]).num_parameters())
    record(config, "gpu bandwidth", gb_per_sec=bandwidth / 1e9, model=name,
           bound_tokens_per_sec=bound)
    for B in micro_batches:  # one process at a time: each needs the whole memory
        ways = ("ours", "textbook") if B == micro_batches[len(micro_batches) // 2] else ("ours",)
        for way in ways:
            measure_micro_batch(config, way, name, (B, T), device, matmul_flops)
    measure_attention(config, (micro_batches[-1], T), device)
    for batch, prompt in decoded:
        measure_decoding(config, name, zipf_tokens(batch * prompt).view(batch, prompt), new_tokens,
                         torch.bfloat16, str(device))


if __name__ == "__main__":
    run_bench(bench_gpu, BenchConfig, __doc__)
