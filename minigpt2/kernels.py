"""Faster inference: weights packed for oneDNN on a CPU, CUDA graphs and float32 logits on a GPU."""

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from minigpt2.config import UserError
from minigpt2.distributed import keep_freed_memory
from model import GPT

ROWS_HINT = 8  # oneDNN picks the layout for this number of rows; any number works


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight, which is not repacked for every token, and no gradient:
    x (..., in) in any floating dtype -> (..., out) in the weight's dtype."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype).contiguous(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.weight.dtype), self.weight, self.bias,
                                                  "none", [], "")


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
    return exists and (dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def prepare_to_sample(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """Prepares a model, in place, to sample only. On a GPU, converts the weights to `dtype`; on a
    CPU with oneDNN, packs the linear layers, those of the blocks in `dtype`. Logits are float32.
    Raises UserError if the CPU lacks `dtype`, ValueError if another was prepared."""
    model.eval().requires_grad_(False)
    if isinstance(model.lm_head, PackedLinear | Float32Head):
        current = model.transformer.h[0].attn.c_attn.weight.dtype
        if current != dtype:
            raise ValueError(f"the model is already prepared in {current}, cannot use {dtype}")
        return model
    device = model.transformer.wte.weight.device
    if device.type == "cuda" and dtype != torch.float32:
        model.to(dtype).lm_head = Float32Head(model.transformer.wte.weight)
    elif device.type != "cpu":
        model.to(dtype)
    elif dtype != torch.float32 and not can_pack(dtype):
        raise UserError(f"no sampling in {str(dtype)[6:]} on this CPU: use --dtype float32")
    elif can_pack():
        keep_freed_memory()
        model.float()
        for block in model.transformer.h:
            for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"),
                               (block.mlp, "c_fc"), (block.mlp, "c_proj")):
                setattr(part, name, PackedLinear(getattr(part, name), dtype))
        model.lm_head = PackedLinear(model.lm_head, torch.float32)
    return model


def capture_graph(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """A CUDA graph that repeats what `step`, called once before, does with the same tensors."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: a data loader's thread may pin memory during the capture
    with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
        step()
    return graph


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one per device, because each allocates a workspace
