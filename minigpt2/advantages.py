"""Losses of preference learning as pure functions of tensors. Shapes: R rows, T tokens; a pair is a
row of two columns, (R, 2): chosen, rejected."""

import math

import torch
import torch.nn.functional as F

from minigpt2.loss import IGNORE_INDEX


def response_mask(starts: torch.Tensor, ends: torch.Tensor, T: int) -> torch.Tensor:
    """(R, T) bool: True for tokens starts <= t < ends (R,) of each row, its response. From lengths,
    never from ids: padding and tokens of a response may have the same id."""
    positions = torch.arange(T, device=starts.device)  # (T,)
    return (positions >= starts[:, None]) & (positions < ends[:, None])


def response_targets(ids: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The targets (R, T) of right-padded ids (R, T): at every position the next token if it is one
    of the response, starts <= t < ends (R,), else IGNORE_INDEX. So the last token of a prompt
    predicts the first of its response."""
    targets = ids.where(response_mask(starts, ends, ids.size(1)), IGNORE_INDEX)
    return F.pad(targets[:, 1:], (0, 1), value=IGNORE_INDEX)


def preference_loss(margins: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(chosen - rejected) of margins (R,): minus the log-probability, in nats, that the
    chosen response wins (Bradley & Terry 1952). A margin of 2 costs 0.126928, 0 costs log 2."""
    return -F.logsigmoid(margins)


def dpo_loss(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, beta: float,
             label_smoothing: float = 0.0, lengths: torch.Tensor | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and margins, both (R,), of direct preference optimization (Rafailov et al. 2023,
    equation 7), from log-probabilities (R, 2) of whole responses under policy and reference: sums,
    not means, over tokens, <|endoftext|> included. label_smoothing is the probability that a label
    is wrong (Mitchell 2023). With `lengths` (R, 2), in tokens, means take the place of sums (Tulu
    3's dpo_norm, Lambert et al. 2024), and beta must be larger, about 5."""
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


def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> torch.Tensor:
    """The expected gold reward (R,) of the response with the largest proxy among n, estimated
    without bias from N >= n responses (R, N): with i the rank by proxy from 0, the sum of
    C(i, n - 1) / C(N, n) gold_i (Nakano et al. 2021). Responses of equal proxy share their gold."""
    equal = (proxy[:, :, None] == proxy[:, None, :]).to(gold.dtype)  # (R, N, N)
    shared = (equal @ gold[:, :, None]).squeeze(2) / equal.sum(2)  # (R, N)
    N = gold.size(1)
    weights = gold.new_tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])  # (N,)
    return shared.gather(1, proxy.argsort(1)) @ weights


def binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of two coins, in nats, elementwise: the least KL that a policy with success rate p
    can have to one with q, by the data processing inequality. binary_kl(0.5, 0.1) is 0.510826."""
    def part(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.xlogy(p, p) - torch.xlogy(p, q)  # 0 at p = 0

    return part(p, q) + part(1 - p, 1 - q)
