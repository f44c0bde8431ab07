"""Parameter groups, AdamW, and the learning-rate schedule as a pure function."""

import math

import torch


def cosine_lr(step: int, *, warmup_steps: int, max_steps: int, max_lr: float,
              min_lr: float) -> float:
    """The learning rate of the update that follows `step` finished ones.

    Linear from max_lr / warmup_steps up to max_lr at step warmup_steps - 1, then half a cosine
    down to min_lr at step max_steps (GPT-3 paper, appendix B, which GPT-2 reproductions use).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)  # 0 .. 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def make_adamw(model: torch.nn.Module, *, lr: float, betas: tuple[float, float], eps: float,
               weight_decay: float, shard: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and embeddings, not biases or
    LayerNorms: weight decay would only pull those from the values that normalise.

    `shard` gives every rank the moments, and the update, of a part of the parameters only (ZeRO
    stage 1, Rajbhandari et al. 2020), and needs a process group."""
    parameters = list(model.parameters())  # a tied weight is met once
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # fused: one kernel for all parameters instead of a dozen passes over memory for each
    options = {"lr": lr, "betas": betas, "eps": eps, "fused": True}
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "consolidate_state_dict")


def optimizer_state(optimizer: torch.optim.Optimizer, is_master: bool) -> dict | None:
    """The state of all parameters, in AdamW's own format whether it was sharded or not; on rank 0,
    None elsewhere. Every rank calls this."""
    if is_sharded(optimizer):
        optimizer.consolidate_state_dict(to=0)
    return optimizer.state_dict() if is_master else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments, and keeps the settings (betas, eps, weight decay) that `optimizer` was
    made with: PyTorch alone would restore those, too, and ignore the command line. Raises KeyError,
    TypeError or ValueError for a state of another model."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            for name in ("exp_avg", "exp_avg_sq"):  # a wrong shape would crash the fused kernel
                if state["state"] and state["state"][index][name].shape != parameter.shape:
                    raise ValueError(f"{name} of another shape")
    settings = [{key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    if is_sharded(optimizer):
        # it puts the count of updates on the CPU, where a GPU's fused kernel does not find it
        for parameter, kept in optimizer.optim.state.items():
            kept["step"] = kept["step"].to(parameter.device)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
