"""What makes a trained model sample fast. On a CPU, its weights are packed once into the layout
that oneDNN's kernels read, instead of being rearranged, or read at a stride, for every token."""

import torch
import torch.nn as nn

from distributed import keep_freed_memory
from model import GPT

ROWS_HINT = 8  # for how many rows the layout is chosen; any number works


class PackedLinear(nn.Module):
    """nn.Linear with a packed weight, for inference: x (..., in) in any floating dtype ->
    (..., out) in that of the weight, which is float32 or bfloat16."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.out_features = dtype, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype).contiguous(), ROWS_HINT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias,
                                                  "none", [], "")


def can_pack() -> bool:
    """Whether this build of PyTorch has oneDNN and its packed product."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def prepare_to_sample(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """Makes a model ready for `generate` and `logprobs` alone, in place: it should be neither
    trained nor saved afterwards. On a GPU, its weights become `dtype`.

    On a CPU its linear layers are packed, those of the blocks in `dtype`; the head stays float32,
    since logits in bfloat16 are the same for many tokens, and so does all that lies between.
    Without oneDNN (macOS, say) they stay as they are, in float32. The process keeps the memory that
    it frees."""
    model.eval()
    if model.transformer.wte.weight.device.type != "cpu":
        return model.to(dtype)
    keep_freed_memory()
    if not can_pack():
        return model
    for block in model.transformer.h:
        for part, name in ((block.attn, "c_attn"), (block.attn, "c_proj"),
                           (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            setattr(part, name, PackedLinear(getattr(part, name), dtype))
    model.lm_head = PackedLinear(model.lm_head, torch.float32)
    return model
