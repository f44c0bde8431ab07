"""Parameter groups, AdamW and Muon, and learning-rate schedules as pure functions."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from minigpt2.distributed import Launch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's quintic iteration
MUON_MOMENTUM = 0.95
MUON_BATCH = 12  # matrices per batched product: more only takes more memory
MUON_RMS = 0.2  # RMS of an update's elements per unit of learning rate, about AdamW's


def learning_rate(step: int, *, warmup_steps: int, max_steps: int, max_lr: float, min_lr: float,
                  schedule: Literal["cosine", "linear"] = "cosine") -> float:
    """The learning rate of step number `step`, counted from 0: linear warm-up from max_lr /
    warmup_steps to max_lr at step warmup_steps - 1, then half a cosine (Brown et al. 2020, appendix
    B), or a straight line (Defazio et al. 2023), down to min_lr at step max_steps."""
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))  # 0 .. 1
    decay = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + decay * (max_lr - min_lr)


def is_block_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon applies: to the four matrices of every block."""
    return name.startswith("transformer.h.") and parameter.dim() == 2


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with `muon` True, AdamW for others. A matrix moves
    by the nearest orthogonal matrix to its momentum; q, k and v, stacked in c_attn, each by itself.
    Updates have AdamW's usual RMS, weights decay (Liu et al. 2025). As in PyTorch's fused AdamW,
    `found_inf` (), 1 or 0, skips a step without the host waiting for it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group.get("muon"):
                self.step_matrices(group)
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if not group.get("muon")]
        super().step()
        self.param_groups = all_groups

    def step_matrices(self, group: dict) -> None:
        if not group["params"]:  # of a rank that owns no matrix
            return
        skip = getattr(self, "found_inf", group["params"][0].new_zeros(())).bool()  # ()
        decay = torch.where(skip, 1.0, 1 - group["lr"] * group["weight_decay"])  # ()
        share = torch.where(skip, 0.0, 1 - group["momentum"])  # (), of the gradient
        batches = defaultdict(list)  # shape -> wide views of (weight, gradient, momentum)
        for parameter in group["params"]:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # AdamW expects one in every state
            momentum = state["momentum"].lerp_(parameter.grad.masked_fill_(skip, 0.0), share)
            parameter.mul_(decay)
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
                updates = orthogonal(directions).masked_fill_(skip, 0.0)
                for weight, update in zip(weights, updates, strict=True):
                    weight.sub_(update, alpha=scale)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V^T for each of `matrices` = U S V^T (n, rows, columns), rows <= columns, by Muon's
    Newton-Schulz iteration: singular values end between about 0.7 and 1.2. In bfloat16 on a GPU."""
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
    and LayerNorms. With a `muon_lr`, Muon for the blocks' matrices and AdamW for the rest. `shard`
    splits the state over the ranks of a process group (ZeRO stage 1, Rajbhandari et al. 2020)."""
    named = list(model.named_parameters())  # a tied weight occurs once
    muon_params = [p for name, p in named if muon_lr is not None and is_block_matrix(name, p)]
    rest = [p for name, p in named if muon_lr is None or not is_block_matrix(name, p)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    if muon_params:
        groups.insert(0, {"params": muon_params, "weight_decay": weight_decay, "muon": True,
                          "momentum": MUON_MOMENTUM, "lr": muon_lr, "lr_scale": muon_lr / lr})
    # fused: one kernel instead of a dozen passes over memory per parameter
    options = {"lr": lr, "betas": betas, "eps": eps, "fused": True}
    optimizer_class = Muon if muon_params else torch.optim.AdamW
    if not shard:
        return optimizer_class(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import
    return ZeroRedundancyOptimizer(groups, optimizer_class, **options)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: that in a sharded optimizer, or the optimizer."""
    return getattr(optimizer, "optim", optimizer)


def step_if_finite(optimizer: torch.optim.Optimizer, numbers: torch.Tensor) -> None:
    """Takes a step if all `numbers` (n,) are finite; the host does not wait for the device."""
    local_optimizer(optimizer).found_inf = numbers.isfinite().all().logical_not().float()  # ()
    optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer, launch: Launch,
                    copy: Callable[[torch.Tensor, str], torch.Tensor]) -> dict | None:
    """The full optimizer state on rank 0, in one format whether sharded or not; None elsewhere. A
    collective. `copy(tensor, name)` copies a tensor before it changes. Those of other ranks are
    broadcast one by one: `consolidate_state_dict` would block heartbeats for minutes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = local_optimizer(optimizer).state
    held = [(index, name) for index, p in enumerate(params) for name in states.get(p, ())]
    is_sharded = local_optimizer(optimizer) is not optimizer
    gathered: dict[int, dict] = defaultdict(dict)
    for owner, keys in enumerate(launch.gather(held) if is_sharded else [held]):
        for index, name in keys:
            param = params[index]
            tensor = (states[param][name].to(param.device) if param in states else
                      torch.empty(() if name == "step" else param.shape, device=param.device))
            if owner > 0:
                dist.broadcast(tensor, src=owner)
            if launch.is_master:
                gathered[index][name] = copy(tensor, f"optimizer/{index}/{name}")
    settings = torch.optim.Optimizer.state_dict(optimizer)  # of a sharded optimizer, only these
    return settings | {"state": dict(gathered)} if launch.is_master else None


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Copies the moments of this rank's parameters; the settings (betas, eps, weight decay) stay.
    Raises KeyError, TypeError or ValueError for a state of another model or optimizer."""
    if not state["state"]:  # saved before the first step
        return
    local = local_optimizer(optimizer)
    mine = {parameter for group in local.param_groups for parameter in group["params"]}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        names = ("momentum",) if group.get("muon") else ("exp_avg", "exp_avg_sq")
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            held = {name: state["state"][index][name] for name in ("step", *names)}
            for name in names:  # the fused kernel would crash on a wrong shape
                if held[name].shape != parameter.shape:
                    raise ValueError(f"{name} has another shape")
            if parameter in mine:
                local.state[parameter] = {name: value.to(parameter.device, copy=True)
                                          for name, value in held.items()}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate; Muon's stays in proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
