"""Losses and advantages of preference learning and policy optimization, as pure functions. R rows
have T tokens; a mask (R, T) marks the responses'. A pair is a row (2,): chosen, rejected."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt2.loss import IGNORE_INDEX


def response_mask(starts: Tensor, ends: Tensor, T: int) -> Tensor:
    """(R, T) bool: True where starts <= t < ends (R,), from lengths: padding has any id."""
    positions = torch.arange(T, device=starts.device)  # (T,)
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def response_targets(ids: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The targets (R, T) of right-padded ids (R, T): at every position the next token if it is one
    of the response, starts <= t < ends (R,), else IGNORE_INDEX."""
    targets = ids.where(response_mask(starts, ends, ids.size(1)), IGNORE_INDEX)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)


def preference_loss(margins: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected) of margins (R,), in nats (Bradley & Terry 1952)."""
    return -F.logsigmoid(margins)


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, beta: float, label_smoothing: float = 0.0,
             lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Losses and margins, both (R,), of DPO (Rafailov et al. 2023, equation 7), from summed
    log-probabilities (R, 2) of whole responses under policy and reference. label_smoothing: the
    probability that a label is wrong (Mitchell 2023). `lengths` (R, 2): for means (Tulu 3)."""
    gains = (logprobs - ref_logprobs) / (1 if lengths is None else lengths)  # (R, 2)
    margins = beta * (gains[:, 0] - gains[:, 1])  # (R,)
    losses = torch.lerp(preference_loss(margins), preference_loss(-margins), label_smoothing)
    return losses, margins


def accuracy(margins: Tensor) -> Tensor:
    """1 for each pair (R,) whose chosen response has the larger score, 0.5 for a tie, else 0."""
    return (margins.sign() + 1) / 2


def token_rewards(scores: Tensor, log_ratios: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (R, T): -kl_coef * log_ratios (R, T), and the score (R,) at the last token."""
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))  # (R, T)
    return (is_last * scores[:, None] - kl_coef * log_ratios) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Generalized advantage estimates (R, T) without discount (Schulman et al. 2016, equation 16).
    Values + advantages are the returns. Nothing outside the mask is read."""
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    deltas = rewards + F.pad(values[:, 1:], (0, 1)) - values  # (R, T)
    advantages, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.size(1))):
        advantages[:, t] = following = (deltas[:, t] + gae_lambda * following) * mask[:, t]
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """x (R, T) with mean 0 and variance 1 (unbiased, as TRL's and verl's) over the mask, else 0."""
    variance, mean = torch.var_mean(x[mask])
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).where(mask, 0)


def group_advantages(rewards: Tensor, group_size: int, scale: bool) -> Tensor:
    """Rewards (R,) of responses minus the mean of their group, group_size rows in turn (Liu et al.
    2025, Dr. GRPO); with `scale` divided by its deviation + 1e-4 (Shao et al. 2024, GRPO)."""
    groups = rewards.double().view(-1, group_size)  # a float32 mean of equal rewards is not exact
    centered = groups - groups.mean(1, keepdim=True)
    scaled = centered / (groups.std(1, keepdim=True) + 1e-4) if scale else centered
    return scaled.flatten().to(rewards.dtype)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor,
                clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """PPO's clipped losses (N,) of N tokens (Schulman et al. 2017, equation 7), with an upper bound
    of its own (Yu et al. 2025, DAPO); and 1 for each token whose ratio is out of bounds, else 0."""
    ratios = (logprobs - old_logprobs).exp()
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratios * advantages, clipped * advantages), (ratios != clipped).float()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float) -> Tensor:
    """Half the squared error (N,) of values, or if larger, clipped as in PPO; 0: no clipping."""
    errors = (values - returns).square()
    if value_clip > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return errors / 2


def next_kl_coef(kl_coef: float, kl: float, target: float, num_responses: int) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * num_responses / 10_000)
