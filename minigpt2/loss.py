"""Cross-entropy of the language-modeling head without holding all logits at once."""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100  # a target ignored by the loss
# Rows of logits held at a time (512 x 50257 bfloat16: 51 MB; a GPU needs larger products), and of
# their float32 softmax (on a CPU, what fits into its caches, 6 MB)
LOSS_ROWS_CPU, LOSS_ROWS_GPU = 512, 4096
SOFTMAX_ROWS_CPU, SOFTMAX_ROWS_GPU = 16, 1024
ROW_MULTIPLE_CPU = 32  # oneDNN prepares, and keeps 10 MB, for each new number of rows
HEAD_MULTIPLE = 128  # fast kernels need aligned rows: 50257 is padded to 50304


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor | torch.nn.Module,
                         targets: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """The summed cross-entropy () float32, in nats, of x (N, C) @ weight.T (V, C) and targets (N,);
    with `reduction="none"`, that of each row (N,). Rows whose target is IGNORE_INDEX count 0. A
    head in int8, which has no gradient, is given as the module. Eager code holds a few rows of
    logits and never waits for a GPU; a compiled sum holds all of them."""
    if isinstance(weight, torch.nn.Module):
        parts = zip(x.split(LOSS_ROWS_CPU), targets.split(LOSS_ROWS_CPU), strict=True)
        losses = torch.cat([F.cross_entropy(weight(rows), ids, ignore_index=IGNORE_INDEX,
                                            reduction="none") for rows, ids in parts])
        return losses.sum() if reduction == "sum" else losses
    device_type, V = x.device.type, len(weight)
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    if torch.compiler.is_compiling():
        if reduction == "none":  # log-probabilities must equal those of eager code
            return torch.compiler.disable(linear_cross_entropy)(x, weight, targets, reduction)
        if device_type == "cuda":
            weight = F.pad(weight, (0, 0, 0, -V % HEAD_MULTIPLE))  # (V', C)
        logits = F.linear(x, weight)[:, :V].float()  # (N, V)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    valid = targets != IGNORE_INDEX  # (N,)
    if on_cpu(x.device):  # prompt and padding rows need no logits, beyond what completes a multiple
        padding = -int(valid.sum()) % ROW_MULTIPLE_CPU
        x = F.pad(x[valid], (0, 0, 0, padding))
        targets = F.pad(targets[valid], (0, padding), value=IGNORE_INDEX)
    else:  # to select rows, the host would wait for their number
        x = x.where(valid[:, None], 0)
    x, summed = x.to(dtype), reduction == "sum"
    # Gradients in float16 need the loss scale, which is known in the backward pass only
    at_once = summed and torch.is_grad_enabled() and dtype != torch.float16
    losses = LinearCrossEntropy.apply(x, weight, targets, at_once)
    if summed or not on_cpu(x.device):
        return losses.sum() if summed else losses
    return losses.new_zeros(len(valid)).masked_scatter(valid, losses)


def on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def losses_and_gradients(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                         scales: torch.Tensor | None = None, gradients: bool = True,
                         ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cross-entropy (N,) float32 of each row, and the gradients of their sum by x (N, C) and
    weight (V, C), one block of logits at a time. x is in the compute dtype, 0 in ignored rows;
    weight is float32. `scales` (N,) weigh the rows in that sum; `gradients` may be left out."""
    N, V, device = len(x), len(weight), x.device
    rows, softmax_rows = ((LOSS_ROWS_CPU, SOFTMAX_ROWS_CPU) if on_cpu(device) else
                          (LOSS_ROWS_GPU, SOFTMAX_ROWS_GPU))
    head = F.pad(weight.to(x.dtype), (0, 0, 0, -V % HEAD_MULTIPLE))  # (V', C)
    ignored, targets = targets < 0, targets.clamp(min=0)
    losses, grad_x = torch.empty(N, device=device), torch.empty_like(x)
    grad_head = torch.zeros_like(head, dtype=torch.float32) if gradients else head
    # For log-probabilities: rounded to bfloat16, GPT-2's logits are off by up to a quarter
    exact = {"out_dtype": torch.float32} if x.is_cuda and not gradients else {}
    # Buffers shared by all blocks: on a CPU, fresh pages would take a fifth of the time
    all_logits = x.new_empty(min(rows, N), len(head), dtype=exact.get("out_dtype", x.dtype))
    grad_part = torch.empty_like(head)
    all_scores, all_probs = torch.empty(2, min(softmax_rows, N), V, device=device)
    for start in range(0, N, rows):
        block = x[start : start + rows]
        logits = all_logits[: len(block)]  # (rows, V')
        torch.mm(block, head.t(), out=logits, **exact)
        for first in range(0, len(block), softmax_rows):
            low = logits[first : first + softmax_rows, :V]
            part = slice(start + first, start + first + len(low))
            target = targets[part, None]
            scores, probs = all_scores[: len(low)], all_probs[: len(low)]  # float32
            torch.softmax(scores.copy_(low), dim=-1, out=probs)
            # the largest probability is at least 1 / V, so that its logarithm is accurate
            logsumexp = scores.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log()
            losses[part] = (logsumexp - scores.gather(1, target))[:, 0]
            if gradients:  # d loss / d logits = softmax(logits) - one_hot(target)
                probs.scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32))
                low.copy_(probs if scales is None else probs.mul_(scales[part, None]))
        if gradients:
            torch.mm(logits, head, out=grad_x[start : start + rows])
            torch.mm(logits.t(), block, out=grad_part)  # ignored rows of the block are 0
            for total, part in zip(grad_head.split(rows), grad_part.split(rows), strict=True):
                total += part  # in parts: a CPU converts bfloat16 to float32 first
    return losses.masked_fill_(ignored, 0), grad_x, grad_head[:V]


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(x @ weight.T)[target] of rows (N,) float32, or if `summed` the sum (), whose
    gradients come from the forward pass; for those of rows, backward computes the logits again."""

    @staticmethod
    def forward(ctx, x, weight, targets, summed):
        exact = x if summed or x.is_cuda else x.float()  # log-probabilities, see above
        losses, *gradients = losses_and_gradients(exact, weight, targets, gradients=summed)
        ctx.summed = summed
        ctx.save_for_backward(*(gradients if summed else (x, weight, targets)))
        return losses.sum() if summed else losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        if ctx.summed:  # in ignored rows, the gradient of x is dropped by `where`
            grad_x, grad_weight = (gradient * grad_losses for gradient in ctx.saved_tensors)
        else:
            _, grad_x, grad_weight = losses_and_gradients(*ctx.saved_tensors, grad_losses)
        return grad_x, grad_weight, None, None
