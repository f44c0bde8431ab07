"""Parameter groups, AdamW and Muon, and learning-rate schedules as pure functions."""

import math
from collections import defaultdict

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's quintic iteration
MUON_MOMENTUM = 0.95
MUON_BATCH = 12  # matrices per batched product: more only takes more memory
MUON_RMS = 0.2  # RMS of an update's elements per unit of learning rate, about AdamW's


def cosine_lr(step: int, *, warmup_steps: int, max_steps: int, max_lr: float,
              min_lr: float) -> float:
    """The learning rate of step number `step`, counted from 0.

    Linear warm-up from max_lr / warmup_steps to max_lr at step warmup_steps - 1, then half a cosine
    down to min_lr at step max_steps (Brown et al. 2020, appendix B).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - warmup_steps)  # 0 .. 1
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)


def linear_lr(step: int, *, warmup_steps: int, max_steps: int, max_lr: float,
              min_lr: float) -> float:
    """As cosine_lr, but with a linear decay to min_lr (Defazio et al. 2023 find linear decay to 0
    best)."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))  # 0 .. 1
    return max_lr + progress * (min_lr - max_lr)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon applies: to the four matrices of every block."""
    return name.startswith("transformer.h.") and parameter.dim() == 2


SCHEDULES = {"cosine": cosine_lr, "linear": linear_lr}


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `muon` True, AdamW for all others.

    Muon replaces a matrix's momentum by the nearest orthogonal matrix, so that all directions move
    equally far. c_attn stacks three matrices: q, k and v are orthogonalized separately. As in Liu
    et al. 2025 ("Muon is scalable for LLM training"), updates are scaled to AdamW's usual RMS, so
    that learning rates are comparable, and weights decay. Matrices of equal shape are batched.
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        # With fused AdamW, GradScaler would call `step` even after an overflow
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group.get("muon"):
                self.step_matrices(group)
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group.get("muon")]
        try:
            super().step()
        finally:
            self.param_groups = all_groups

    def step_matrices(self, group: dict) -> None:
        batches = defaultdict(list)  # shape -> wide views of (weight, gradient, momentum)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # AdamW expects one in every state
            momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rows, columns = parameter.shape
            parts = 3 if rows == 3 * columns else 1  # q, k, v
            for views in zip(*(tensor.chunk(parts) for tensor in
                               (parameter, parameter.grad, momentum)), strict=True):
                tall = views[0].size(0) > views[0].size(1)
                wide = [view.t() for view in views] if tall else views
                batches[wide[0].shape].append(wide)
        for shape, batch in batches.items():
            scale = group["lr"] * MUON_RMS * math.sqrt(max(shape))
            for first in range(0, len(batch), MUON_BATCH):
                weights, grads, momenta = zip(*batch[first : first + MUON_BATCH], strict=True)
                directions = torch.lerp(torch.stack(grads), torch.stack(momenta),
                                        group["momentum"])  # Nesterov's
                for weight, update in zip(weights, orthogonal(directions), strict=True):
                    weight.sub_(update, alpha=scale)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately U V^T for each of `matrices` = U S V^T (n, rows, columns), rows <= columns, by
    Muon's Newton-Schulz iteration: singular values end between about 0.7 and 1.2. In bfloat16 on a
    GPU, which is precise enough."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)  # no singular value above 1
    for _ in range(steps):
        square = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def make_optimizer(model: torch.nn.Module, *, lr: float, betas: tuple[float, float], eps: float,
                   weight_decay: float, muon_lr: float | None = None,
                   shard: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices and embeddings, not on biases
    and LayerNorms. With a `muon_lr`, Muon for the blocks' matrices and AdamW for the rest.

    `shard` splits the optimizer state over ranks (ZeRO stage 1, Rajbhandari et al. 2020); it needs
    a process group."""
    named = list(model.named_parameters())  # a tied weight occurs once
    muon_params = [p for name, p in named if muon_lr is not None and is_block_matrix(name, p)]
    rest = [p for name, p in named if muon_lr is None or not is_block_matrix(name, p)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if muon_params:
        groups.insert(0, {"params": muon_params, "weight_decay": weight_decay, "muon": True,
                          "momentum": MUON_MOMENTUM, "lr": muon_lr, "lr_scale": muon_lr / lr})
    # fused: one kernel instead of a dozen passes over memory per parameter
    options = {"lr": lr, "betas": betas, "eps": eps, "fused": True}
    optimizer_class = Muon if muon_params else torch.optim.AdamW
    if shard:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import

        return ZeroRedundancyOptimizer(groups, optimizer_class, **options)
    return optimizer_class(groups, **options)


def is_sharded(optimizer: torch.optim.Optimizer) -> bool:
    return hasattr(optimizer, "consolidate_state_dict")


def optimizer_state(optimizer: torch.optim.Optimizer, is_master: bool) -> dict | None:
    """The full optimizer state on rank 0, in one format whether sharded or not; None elsewhere. A
    collective."""
    if is_sharded(optimizer):
        optimizer.consolidate_state_dict(to=0)
    return optimizer.state_dict() if is_master else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Restores the moments but keeps the settings (betas, eps, weight decay) of `optimizer`, which
    come from the command line; PyTorch would restore those as well. Raises KeyError, TypeError or
    ValueError for a state of another model or optimizer."""
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            names = ("momentum",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
            for name in names:  # the fused kernel would crash on a wrong shape
                if state["state"] and state["state"][index][name].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
    settings = [{key: value for key, value in group.items() if key != "params"}
                for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    if is_sharded(optimizer):
        # ZeroRedundancyOptimizer restores `step` to the CPU; the fused kernel needs it on the GPU
        for parameter, kept in optimizer.optim.state.items():
            kept["step"] = kept["step"].to(parameter.device)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate; Muon's stays in proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
