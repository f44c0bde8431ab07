"""The summed cross-entropy of a language-modeling head, without holding all logits at once."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # a target that carries no loss
# Rows of logits held at a time by the uncompiled training loss. 512 x 50257 bf16 is 51 MB, where a
# CPU stops gaining; a GPU wants larger products: 4096 rows are 0.4 GB, not the 3.3 of 32 x 1024.
LOSS_ROWS_CPU, LOSS_ROWS_GPU = 512, 4096
# Rows of which the softmax is made at once, in float32: on a CPU, what its caches hold (6 MB)
SOFTMAX_ROWS_CPU, SOFTMAX_ROWS_GPU = 16, 1024
HEAD_MULTIPLE = 128  # fast kernels want aligned rows: the head's 50257 are padded to 50304



def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor,
                         targets: torch.Tensor) -> torch.Tensor:
    """The summed loss () fp32 of rows x (N, C) through the head weight (V, C) against targets (N,).

    In nats; rows whose target is IGNORE_INDEX count for nothing. Eager code computes a few rows of
    logits at a time. The compiler gets all of them in the compute dtype: it fuses the softmax and
    its upcast into what it generates. float16 takes that path too: its gradients must be scaled
    before they are made, and LinearCrossEntropy makes them in the forward pass."""
    device_type, V = x.device.type, len(weight)
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if torch.compiler.is_compiling() or dtype == torch.float16:
        if device_type == "cuda":
            weight = F.pad(weight, (0, 0, 0, -V % HEAD_MULTIPLE))  # (V', C)
        logits = F.linear(x, weight)[:, :V]  # (N, V)
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    keep = targets != IGNORE_INDEX  # rows of prompts and padding need no logits at all
    x, targets = x[keep].to(dtype), targets[keep]
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """sum over rows of -log softmax(x @ weight.T)[target], with a block of logits at a time.

    The gradient of a softmax cross-entropy needs nothing but the logits, so each block's share of
    both gradients is computed in the forward pass, while its logits exist, and `backward` only
    scales them by the incoming scalar. Memory is O(block x V) instead of O(N x V); the result is
    that of `F.cross_entropy(..., reduction="sum")`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_grad: bool):
        """x (N, C) in the compute dtype, weight (V, C) fp32, targets (N,) all valid -> () fp32."""
        (N, C), V, device = x.shape, len(weight), x.device
        on_gpu = device.type != "cpu"
        block_rows = min(LOSS_ROWS_GPU if on_gpu else LOSS_ROWS_CPU, max(N, 1))
        softmax_rows = min(SOFTMAX_ROWS_GPU if on_gpu else SOFTMAX_ROWS_CPU, block_rows)
        head = x.new_zeros(V + -V % HEAD_MULTIPLE, C)  # (V', C)
        head[:V] = weight
        loss = torch.zeros((), device=device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if with_grad else None
        # The same buffers for all blocks: on a CPU, fresh pages would cost a fifth of the time
        all_logits = x.new_empty(block_rows, len(head))
        all_scores, all_probs = torch.empty(2, softmax_rows, V, device=device)
        for start in range(0, N, block_rows):
            block = x[start : start + block_rows]
            logits = all_logits[: len(block)]  # (block_rows, V')
            torch.mm(block, head.t(), out=logits)
            for first in range(0, len(block), softmax_rows):
                low = logits[first : first + softmax_rows, :V]
                target = targets[start + first :][: len(low), None]
                scores, probs = all_scores[: len(low)], all_probs[: len(low)]  # fp32
                torch.softmax(scores.copy_(low), dim=-1, out=probs)
                # the largest probability is at least 1 / V: its logarithm is exact
                logsumexp = scores.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()
                loss += (logsumexp - scores.gather(1, target)).sum()
                if with_grad:  # d loss / d logits = softmax(logits) - one_hot(target)
                    minus_one = torch.full_like(target, -1, dtype=torch.float32)
                    low.copy_(probs.scatter_add_(1, target, minus_one))
            if with_grad:
                logits[:, V:] = 0
                torch.mm(logits, head, out=grad_x[start : start + block_rows])
                grad_head += logits.t() @ block
        if with_grad:
            ctx.save_for_backward(grad_x, grad_head[:V])
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_loss, grad_weight * grad_loss, None, None
