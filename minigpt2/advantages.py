"""Losses and advantages of preference learning and policy optimization, as pure functions. R rows
have T tokens; a mask (R, T) marks the responses'. A pair is a row (2,): chosen, rejected."""

import math

import torch
import torch.nn.functional as F

from minigpt2.loss import IGNORE_INDEX


def response_mask(starts: torch.Tensor, ends: torch.Tensor, T: int) -> torch.Tensor:
    """(R, T) bool: True where starts <= t < ends (R,), from lengths: padding has any id."""
    positions = torch.arange(T, device=starts.device)  # (T,)
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def response_targets(ids: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The targets (R, T) of right-padded ids (R, T): at every position the next token if it is one
    of the response, starts <= t < ends (R,), else IGNORE_INDEX."""
    targets = ids.where(response_mask(starts, ends, ids.size(1)), IGNORE_INDEX)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)


def preference_loss(margins: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected) of margins (R,), in nats (Bradley & Terry 1952)."""
    return -F.logsigmoid(margins)


def dpo_loss(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, beta: float,
             label_smoothing: float = 0.0, lengths: torch.Tensor | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and margins, both (R,), of DPO (Rafailov et al. 2023, equation 7), from summed
    log-probabilities (R, 2) of whole responses under policy and reference. label_smoothing: the
    probability that a label is wrong (Mitchell 2023). `lengths` (R, 2): for means (Tulu 3)."""
    gains = logprobs - ref_logprobs  # (R, 2)
    if lengths is not None:
        gains = gains / lengths
    margins = beta * (gains[:, 0] - gains[:, 1])  # (R,)
    losses = ((1 - label_smoothing) * preference_loss(margins)
              + label_smoothing * preference_loss(-margins))
    return losses, margins


def accuracy(margins: torch.Tensor) -> torch.Tensor:
    """1 for each pair (R,) whose chosen response has the larger score, 0.5 for a tie, else 0."""
    return (margins.sign() + 1) / 2


def token_rewards(scores: torch.Tensor, log_ratios: torch.Tensor, mask: torch.Tensor,
                  kl_coef: float) -> torch.Tensor:
    """Rewards (R, T): -kl_coef * log_ratios (R, T), and the score (R,) at the last token."""
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))  # (R, T)
    return (is_last * scores[:, None] - kl_coef * log_ratios) * mask


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
        gae_lambda: float) -> torch.Tensor:
    """Generalized advantage estimates (R, T) without discount (Schulman et al. 2016, equation 16).
    Values + advantages are the returns. Nothing outside the mask is read."""
    rewards, values = rewards.where(mask, 0), values.where(mask, 0)
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        next_values = values[:, t + 1] if t + 1 < rewards.size(1) else 0
        following = rewards[:, t] + next_values - values[:, t] + gae_lambda * following
        advantages[:, t] = following = following * mask[:, t]
    return advantages


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x (R, T) with mean 0 and variance 1 (unbiased, as TRL's and verl's) over the mask, else 0."""
    variance, mean = torch.var_mean(x[mask])
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).where(mask, 0)


def group_advantages(rewards: torch.Tensor, group_size: int, scale: bool) -> torch.Tensor:
    """Rewards (R,) of responses minus the mean of their group, group_size rows in turn (Liu et al.
    2025, Dr. GRPO); with `scale` divided by its deviation + 1e-4 (Shao et al. 2024, GRPO)."""
    groups = rewards.double().view(-1, group_size)  # a float32 mean of equal rewards is not exact
    centered = groups - groups.mean(1, keepdim=True)
    scaled = centered / (groups.std(1, keepdim=True) + 1e-4) if scale else centered
    return scaled.flatten().to(rewards.dtype)


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
                clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped losses (N,) of N tokens (Schulman et al. 2017, equation 7), with an upper bound
    of its own (Yu et al. 2025, DAPO); and 1 for each token whose ratio is out of bounds, else 0."""
    ratios = (logprobs - old_logprobs).exp()
    clipped = ratios.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratios * advantages, clipped * advantages), (ratios != clipped).float()


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor,
               value_clip: float) -> torch.Tensor:
    """Half the squared error (N,) of values, or if larger, clipped as in PPO; 0: no clipping."""
    errors = (values - returns).square()
    if value_clip > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        errors = torch.maximum(errors, (clipped - returns).square())
    return errors / 2


def next_kl_coef(kl_coef: float, kl: float, target: float, num_responses: int,
                 horizon: int = 10_000) -> float:
    """The adaptive coefficient of Ziegler et al. 2019, section 2.2."""
    return kl_coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * num_responses / horizon)


def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> torch.Tensor:
    """The expected gold reward (R,) of the response with the largest proxy among n, without bias
    from N >= n responses (R, N) (Nakano et al. 2021). Those of equal proxy share their gold."""
    equal = (proxy[:, :, None] == proxy[:, None, :]).to(gold.dtype)  # (R, N, N)
    shared = (equal @ gold[:, :, None]).squeeze(2) / equal.sum(2)  # (R, N)
    N = gold.size(1)
    weights = gold.new_tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])  # (N,)
    return shared.gather(1, proxy.argsort(1)) @ weights


def binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of two coins, in nats: the least of policies with such success rates."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)  # 0 at p = 0
            + torch.xlogy(1 - p, 1 - p) - torch.xlogy(1 - p, 1 - q))
