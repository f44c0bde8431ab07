"""Cross-entropy of the language-modeling head without holding all logits at once."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # a target ignored by the loss
# Rows of logits held at a time by the eager loss. 512 x 50257 bfloat16 is 51 MB, beyond which a CPU
# gains nothing; a GPU needs larger products: 4096 rows take 0.4 GB, all 32 x 1024 take 3.3 GB.
LOSS_ROWS_CPU, LOSS_ROWS_GPU = 512, 4096
# Rows whose float32 softmax is computed at once: on a CPU, what fits into its caches (6 MB)
SOFTMAX_ROWS_CPU, SOFTMAX_ROWS_GPU = 16, 1024
HEAD_MULTIPLE = 128  # fast kernels need aligned rows: 50257 is padded to 50304


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor,
                         targets: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy () float32, in nats, of x (N, C) @ weight.T (V, C) and targets (N,).

    Rows whose target is IGNORE_INDEX are left out. Eager code computes a few rows of logits at a
    time. Under torch.compile all logits are computed in the compute dtype, since the compiler fuses
    the float32 softmax. float16 takes that path too: its gradients must be scaled before they are
    computed, and LinearCrossEntropy computes them in the forward pass."""
    device_type, V = x.device.type, len(weight)
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if torch.compiler.is_compiling() or dtype == torch.float16:
        if device_type == "cuda":
            weight = F.pad(weight, (0, 0, 0, -V % HEAD_MULTIPLE))  # (V', C)
        logits = F.linear(x, weight)[:, :V]  # (N, V)
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    keep = targets != IGNORE_INDEX  # prompt and padding rows need no logits
    x, targets = x[keep].to(dtype), targets[keep]
    return LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(x @ weight.T)[target], one block of logits at a time.

    The gradient of a softmax cross-entropy depends on the logits alone. Each block's share of both
    gradients is therefore computed in the forward pass, and `backward` only scales it by the
    incoming scalar. Memory is O(block x V) instead of O(N x V); the result equals
    `F.cross_entropy(..., reduction="sum")`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_grad: bool):
        """x (N, C) in the compute dtype, weight (V, C) float32, valid targets (N,); () float32."""
        (N, C), V, device = x.shape, len(weight), x.device
        on_gpu = device.type != "cpu"
        block_rows = min(LOSS_ROWS_GPU if on_gpu else LOSS_ROWS_CPU, max(N, 1))
        softmax_rows = min(SOFTMAX_ROWS_GPU if on_gpu else SOFTMAX_ROWS_CPU, block_rows)
        head = x.new_zeros(V + -V % HEAD_MULTIPLE, C)  # (V', C)
        head[:V] = weight
        loss = torch.zeros((), device=device)
        grad_x = torch.empty_like(x) if with_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if with_grad else None
        # Buffers shared by all blocks: on a CPU, fresh pages would take a fifth of the time
        all_logits = x.new_empty(block_rows, len(head))
        all_scores, all_probs = torch.empty(2, softmax_rows, V, device=device)
        for start in range(0, N, block_rows):
            block = x[start : start + block_rows]
            logits = all_logits[: len(block)]  # (block_rows, V')
            torch.mm(block, head.t(), out=logits)
            for first in range(0, len(block), softmax_rows):
                low = logits[first : first + softmax_rows, :V]
                target = targets[start + first :][: len(low), None]
                scores, probs = all_scores[: len(low)], all_probs[: len(low)]  # float32
                torch.softmax(scores.copy_(low), dim=-1, out=probs)
                # the largest probability is at least 1 / V, so that its logarithm is accurate
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
