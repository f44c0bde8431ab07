"""Parameter groups, AdamW and Muon, and learning-rate schedules as pure functions."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Literal

import torch

from minigpt2.distributed import Launch

MUON_BATCH = 12  # matrices per batched product: more only takes more memory


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
        all_groups, self.param_groups = self.param_groups, []
        for group in all_groups:
            is_muon = group.get("muon") and group["params"]  # a rank may own no matrix
            (self.step_matrices if is_muon else self.param_groups.append)(group)
        super().step()
        self.param_groups = all_groups

    def step_matrices(self, group: dict) -> None:
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
            parts = 3 if parameter.size(0) == 3 * parameter.size(1) else 1  # q, k, v
            for views in zip(*(tensor.chunk(parts) for tensor in
                               (parameter, parameter.grad, momentum)), strict=True):
                tall = views[0].size(0) > views[0].size(1)
                wide = [view.t() for view in views] if tall else views
                batches[wide[0].shape].append(wide)
        for shape, batch in batches.items():
            scale = group["lr"] * 0.2 * math.sqrt(max(shape))  # an RMS of 0.2, about AdamW's
            for first in range(0, len(batch), MUON_BATCH):
                weights, grads, momenta = zip(*batch[first : first + MUON_BATCH], strict=True)
                directions = torch.lerp(torch.stack(grads), torch.stack(momenta), group["momentum"])
                updates = orthogonal(directions).masked_fill_(skip, 0.0)  # of Nesterov's momenta
                for weight, update in zip(weights, updates, strict=True):
                    weight.sub_(update, alpha=scale)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About U V^T for each of `matrices` = U S V^T (n, rows, columns), rows <= columns, by Muon's
    Newton-Schulz iteration: singular values end between about 0.7 and 1.2. In bfloat16 on a GPU."""
    a, b, c = 3.4445, -4.7750, 2.0315  # of the quintic polynomial
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)  # no singular value above 1
    for _ in range(5):
        square = x @ x.mT  # (n, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


def make_optimizer(model: torch.nn.Module, *, lr: float, betas: tuple[float, float], eps: float,
                   weight_decay: float, kind: str = "adamw", muon_lr: float = 0.0,
                   shard: bool = False) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with weight decay on matrices and embeddings, not on biases
    and LayerNorms; or of another kind, "muon": Muon for the blocks' matrices, AdamW for the rest.
    `shard` splits the state over the ranks (ZeRO stage 1, Rajbhandari et al. 2020)."""
    options = {"betas": betas, "eps": eps, "fused": True}  # one kernel, not a dozen passes
    optimizer_class = {"adamw": torch.optim.AdamW, "muon": Muon}[kind]
    named = list(model.named_parameters())  # a tied weight occurs once
    muon_params = [p for name, p in named if kind == "muon" and is_block_matrix(name, p)]
    rest = [p for name, p in named if kind != "muon" or not is_block_matrix(name, p)]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    if muon_params:
        groups.insert(0, {"params": muon_params, "weight_decay": weight_decay, "muon": True,
                          "momentum": 0.95, "lr": muon_lr, "lr_scale": muon_lr / lr})
    if not shard:
        return optimizer_class(groups, lr=lr, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import
    return ZeroRedundancyOptimizer(groups, optimizer_class, lr=lr, **options)


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that holds this rank's state: the one in a sharded optimizer, or itself."""
    return getattr(optimizer, "optim", optimizer)


def step_if_finite(optimizer: torch.optim.Optimizer, numbers: torch.Tensor) -> None:
    """Takes a step if all `numbers` (n,) are finite. Fused optimizers decide that on the device."""
    is_finite, local = numbers.isfinite().all(), local_optimizer(optimizer)
    if on_device := getattr(local, "_step_supports_amp_scaling", False):
        local.found_inf = is_finite.logical_not().float()  # ()
    if on_device or is_finite:
        optimizer.step()


def optimizer_state(optimizer: torch.optim.Optimizer, launch: Launch,
                    copy: Callable[[object, str], object]) -> dict | None:
    """The full optimizer state on rank 0, None elsewhere. A collective. `copy(value, name)` copies
    it. Tensors travel one by one: `consolidate_state_dict` would block heartbeats for minutes."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    local = local_optimizer(optimizer)
    held = [(index, name, value.to("meta") if torch.is_tensor(value) else value)
            for index, p in enumerate(params) for name, value in local.state.get(p, {}).items()]
    gathered: dict[int, dict] = defaultdict(dict)
    for owner, keys in enumerate([held] if local is optimizer else launch.gather(held)):
        for index, name, value in keys:
            param = params[index]
            if torch.is_tensor(value):
                value = (local.state[param][name].to(param.device) if param in local.state else
                         torch.empty_like(value, device=param.device))
                if owner > 0:
                    torch.distributed.broadcast(value, src=owner)
            if launch.is_master:
                gathered[index][name] = copy(value, f"optimizer/{index}/{name}")
    settings = torch.optim.Optimizer.state_dict(optimizer)  # of a sharded optimizer, only these
    return settings | {"state": dict(gathered)} if launch.is_master else None


def expected_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict]:
    """What each parameter's state holds after a trial step of a stand-in of its size, one at a time
    for the sake of memory. Of tensors, only empty ones on the meta device are kept."""
    local, expected = local_optimizer(optimizer), {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            trial, stand_in = object.__new__(type(local)), torch.zeros_like(p)
            stand_in.grad = torch.zeros_like(p)
            vars(trial).update(vars(local), state=defaultdict(dict),
                               param_groups=[{**group, "params": [stand_in]}])
            type(local).step(trial)
            expected[p] = {name: (value.to("meta"), value.device) if torch.is_tensor(value) else
                           (value, None) for name, value in trial.state[stand_in].items()}
    return expected


def missing_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of this rank's optimizer state that do not exist yet."""
    local = local_optimizer(optimizer)
    return sum(value.nbytes for p, state in expected_state(local).items() if not local.state.get(p)
               for value, device in state.values() if device)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Copies this rank's state, not the settings. Raises ValueError if it does not fit."""
    local, expected = local_optimizer(optimizer), expected_state(optimizer)
    mine = {parameter for group in local.param_groups for parameter in group["params"]}
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(expected):
        raise ValueError(f"it has {len(indices)} parameters, not {len(expected)}")
    for index, (parameter, wanted) in zip(indices, expected.items(), strict=True):
        held = dict(state["state"].get(index, {}))
        if held.keys() != wanted.keys():
            names = (", ".join(sorted(one)) or "nothing" for one in (held, wanted))
            raise ValueError("the optimizer's state of a parameter is {}, not {}".format(*names))
        for name, (like, device) in wanted.items():
            if device:
                value = torch.as_tensor(held[name])
                if value.shape != like.shape:  # a fused kernel would crash
                    raise ValueError(f"{name} is of {(*value.shape,)}, not {(*like.shape,)}")
                held[name] = value.to(device, copy=True) if parameter in mine else None
        if parameter in mine:
            local.state[parameter] = held


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets AdamW's learning rate; Muon's stays in proportion to it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
