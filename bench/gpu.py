"""Measures a GPU in one go: throughput by micro-batch with MFU and peak memory, the textbook's step
compiled beside it, attention backends, decoding."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.decode import measure_decoding
from bench.harness import BenchConfig, Contestant, contest, in_turn, record
from bench.train import SIZES, make_training, real_tokens
from minigpt2.config import UserError
from minigpt2.distributed import device_time
from minigpt2.memory import is_out_of_memory
from minigpt2.metrics import flops_per_token, peak_flops
from model import GPT

STEPS = 12  # updates of each micro-batch; the first compiles
MICRO_BATCHES, LENGTH = (16, 32, 64), 1024
MATMUL = 8192  # rows and columns of the product that shows what the card reaches
COPY = 2**30  # bytes, far more than a cache holds
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH)
DECODE, DECODE_NEW = ((1, 32), (8, 32), (8, 512), (32, 512)), 128  # batch and prompt; new tokens


def matmul_flops(device: torch.device, size: int) -> float:
    """FLOP/s of a bfloat16 product of two size x size matrices, the median of several."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)

    def product() -> float:
        begun = device_time(device)
        for _ in range(10):
            a @ b
        return device_time(device) - begun
    return 10 * 2 * size**3 / in_turn(7, product=product)["product"]


def measure_micro_batch(config: BenchConfig, name: str, shape: tuple[int, int], ways: tuple,
                        device: torch.device, matmul: float) -> None:
    """Whole updates of one micro-step, compiled; the optimizer in each."""
    tokens = real_tokens(STEPS * (shape[0] * shape[1] + 1))
    for way in ways:  # one after the other: each wants the whole memory
        taken = contest(STEPS, {way: Contestant(
            make_training, way, SIZES[name], shape, torch.bfloat16, tokens, 0, str(device), True)})
        rate = taken[way].rate(shape[0] * shape[1])
        flops = rate * flops_per_token(GPT(SIZES[name]), shape[1])
        peak = peak_flops(device)
        record(config, "gpu training", model=name, way=way, micro_batch_size=shape[0],
               sequence_length=shape[1], tokens_per_sec=rate, mfu=flops / peak if peak else None,
               of_measured_matmul=flops / matmul, peak_bytes=taken[way].peak)


def measure_attention(config: BenchConfig, batch: int, length: int, device: torch.device) -> None:
    """Forward and backward of causal attention by every backend that the card has."""
    q, k, v = (torch.randn(batch, 12, length, 64, device=device, dtype=torch.bfloat16,
                           requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)

    def attend(backend: SDPBackend) -> float:
        begun = device_time(device)
        with sdpa_kernel(backend):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(y, (q, k, v), gradient)
        return device_time(device) - begun

    for backend in BACKENDS:
        try:
            taken = in_turn(7, it=lambda backend=backend: attend(backend))["it"]
        except RuntimeError as error:  # "No available kernel"
            if is_out_of_memory(error):
                raise
            print(f"attention by {backend.name}: {str(error).splitlines()[0]}")
            continue
        record(config, "gpu attention", backend=backend.name, batch=batch, sequence_length=length,
               ms=1000 * taken, gflops=3.5 * 4 * batch * 12 * length**2 * 64 / 2 / taken / 1e9)


def measure_bandwidth(config: BenchConfig, name: str, size: int, device: torch.device) -> None:
    """Bytes a second of a copy, and how many tokens a second that allows a single row: each reads
    all weights once, in bfloat16, and the keys and values of so many tokens on average."""
    source = torch.empty(size, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def copy() -> float:
        begun = device_time(device)
        for _ in range(10):
            target.copy_(source)
        return device_time(device) - begun
    bandwidth = 10 * 2 * size / in_turn(7, copy=copy)["copy"]
    sizes, length = SIZES[name], DECODE[0][1] + DECODE_NEW // 2
    cached = 2 * sizes.n_layer * sizes.n_embd * length
    weights = GPT(sizes).num_parameters()
    record(config, "gpu bandwidth", gb_per_sec=bandwidth / 1e9, model=name,
           bound_tokens_per_sec=bandwidth / (2 * (weights + cached)))


def bench_gpu(config: BenchConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not config.quick:
        raise UserError("no GPU is visible here: --quick tries this section on a CPU")
    name, micro_batches, length, size, decode = (
        ("tiny", (2,), 128, 256, ((2, 16),)) if config.quick else
        ("124M", MICRO_BATCHES, LENGTH, MATMUL, DECODE))
    matmul = matmul_flops(device, size)
    record(config, "gpu matmul", size=size, tflops=matmul / 1e12)
    for micro_batch in micro_batches:
        ways = ("ours", "textbook") if micro_batch == micro_batches[len(micro_batches) // 2] else (
            "ours",)
        measure_micro_batch(config, name, (micro_batch, length), ways, device, matmul)
    measure_attention(config, micro_batches[-1], length, device)
    measure_bandwidth(config, name, 2**20 if config.quick else COPY, device)
    for batch, prompt in decode:
        measure_decoding(config, name, batch, prompt, 16 if config.quick else DECODE_NEW,
                         torch.bfloat16, str(device))
