"""Faster inference: weights packed for oneDNN, or quantized, on a CPU; CUDA graphs on a GPU."""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from minigpt2.config import UserError
from minigpt2.distributed import keep_freed_memory
from minigpt2.tokenizer import N_VOCAB
from model import GPT

ROWS_HINT = 8  # oneDNN picks the layout for this number of rows; any number works
capture_stream = functools.cache(torch.cuda.Stream)  # one a device: each allocates a workspace


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight, without gradient: x (..., in) -> (..., out) in its dtype."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype).contiguous(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias,
                                                  "none", [], "")


class Int8Linear(nn.Module):
    """nn.Linear in 8-bit integers, packed, without gradient: x (..., in) -> (..., out) float32. One
    scale per output of the weight and per row of x, as in LLM.int8() (Dettmers et al. 2022, section
    2.1, vector-wise). Sums of products are exact, so that no row depends on the others."""

    def __init__(self, linear: nn.Linear, outputs: int | None = None):
        super().__init__()
        weight = linear.weight.detach()[:outputs].float()  # (out, in)
        quantized, scale = quantize_rows(weight)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.scale, self.zero = scale[:, 0], torch.zeros(len(weight), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(quantized, [ROWS_HINT, weight.size(1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantized, scale = quantize_rows(x.flatten(0, -2).float())  # (N, in), (N, 1)
        y = torch.ops.onednn.qlinear_pointwise(  # of rows plus 128: unsigned, as AVX-512 needs them
            quantized.view(torch.uint8) ^ 128, 1.0, 128, self.weight, self.scale, self.zero, None,
            1.0, 0, torch.float32, "none", [], "").mul_(scale)  # (N, out)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, in) float32 -> (int8 in [-127, 127], scale (N, 1)): x is about int8 times scale."""
    scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round_().to(torch.int8), scale


class Float32Head(nn.Module):
    """A head for a GPU, without gradient: 16-bit x (..., C) -> sums in float32 (..., V)."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.mm(x.flatten(0, -2), self.weight.t(), out_dtype=torch.float32)  # (N, V)
        return logits.view(*x.shape[:-1], -1)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has oneDNN's packed product and the CPU supports the dtype."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if exists and dtype == torch.int8 and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        linear = nn.Linear(64, 64, bias=False)  # where pairs of products are added in 16 bits, they
        nn.init.constant_(linear.weight, 1.0)  # overflow
        return bool((Int8Linear(linear)(torch.ones(1, 64)) - 64).abs().max() < 1e-3)
    return exists and (dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prepare_to_sample(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """Prepares a model in place to sample only. On a GPU, converts the weights to `dtype`; on a CPU
    with oneDNN, packs the linear layers, those of the blocks in `dtype`, with int8 the head too.
    Logits are float32. UserError: the device lacks `dtype`. ValueError: it was another before."""
    model.eval().requires_grad_(False)
    current = model.transformer.h[0].attn.c_attn.weight.dtype
    if isinstance(model.lm_head, PackedLinear | Int8Linear | Float32Head) and current != dtype:
        raise ValueError(f"the model is already prepared in {current}, cannot use {dtype}")
    device, int8 = model.transformer.wte.weight.device, dtype == torch.int8
    on_cpu = device.type == "cpu"
    if (int8 or (on_cpu and dtype != torch.float32)) and not (on_cpu and can_pack(dtype)):
        raise UserError(f"no {str(dtype)[6:]} sampling on this {device.type}: use --dtype float32")
    if device.type == "cuda" and dtype != torch.float32:
        model.to(dtype).lm_head = Float32Head(model.transformer.wte.weight)
    elif not on_cpu:
        model.to(dtype)
    elif can_pack():
        keep_freed_memory()
        model.float()
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                is_head = layer is model.lm_head
                packed = (Int8Linear(layer, N_VOCAB if is_head else None) if int8 else
                          PackedLinear(layer, torch.float32 if is_head else dtype))
                model.set_submodule(name, packed)
    return model


def capture_graph(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph that repeats what `step`, called once before, does with the same tensors."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: a data loader's thread may pin memory during the capture
    with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
        step()
    return graph
