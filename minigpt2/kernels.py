"""What makes a trained model sample fast. On a CPU, its weights are packed once into the layout
that oneDNN's kernels read, instead of being rearranged, or read at a stride, for every token."""

import torch
import torch.nn as nn

from minigpt2.config import UserError
from minigpt2.distributed import keep_freed_memory
from model import GPT

ROWS_HINT = 8  # for how many rows the layout is chosen; any number works


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight, for inference: x (..., in) in any floating dtype ->
    (..., out) in that of the weight, which is float32 or bfloat16. It has no gradient."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype).contiguous(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias,
                                                  "none", [], "")


class Float32Head(nn.Module):
    """A GPU's output head in float16 or bfloat16 whose logits are float32, as the sums of its
    products are: x (..., C) -> (..., V). It has no gradient."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))  # (N, C)
        logits = torch.mm(rows, self.weight.t(), out_dtype=torch.float32)  # (N, V)
        return logits.view(*x.shape[:-1], -1)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this build of PyTorch has oneDNN's packed product, and the processor the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn,
                                                               "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def prepare_to_sample(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """Makes a model ready for `generate` and `logprobs` alone, in place: it can be neither trained
    nor saved afterwards. On a GPU, its weights become `dtype`.

    On a CPU its linear layers are packed, those of the blocks in `dtype`; embeddings, residual
    stream, LayerNorms and the attention of single tokens stay float32. Without oneDNN (macOS, say)
    all stays as it is, in float32. The process keeps the memory that it frees.

    Logits are float32 everywhere: in bfloat16, GPT-2's, around -100, lie half a unit apart.
    Raises UserError for a dtype that the processor does not have, ValueError for another one than
    the model was made ready with before.
    """
    model.eval().requires_grad_(False)
    if isinstance(model.lm_head, PackedLinear | Float32Head):
        first = model.transformer.h[0].attn.c_attn
        done = first.dtype if isinstance(first, PackedLinear) else first.weight.dtype
        if done != dtype:
            raise ValueError(f"the model is ready to sample in {done}, and cannot change")
        return model
    device = model.transformer.wte.weight.device
    if device.type == "cuda" and dtype != torch.float32:
        model.to(dtype).lm_head = Float32Head(model.transformer.wte.weight)
    elif device.type != "cpu":
        model.to(dtype)
    elif dtype != torch.float32 and not can_pack(dtype):
        raise UserError(f"this processor samples in float32, and not in {str(dtype)[6:]}: use "
                        "--dtype float32")
    elif can_pack():
        keep_freed_memory()
        model.float()
        for block in model.transformer.h:
            for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"),
                               (block.mlp, "c_fc"), (block.mlp, "c_proj")):
                setattr(part, name, PackedLinear(getattr(part, name), dtype))
        model.lm_head = PackedLinear(model.lm_head, torch.float32)
    return model
