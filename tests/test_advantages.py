"""Hand numbers for every function of minigpt2/advantages.py."""

import itertools
import math

import pytest
import torch
from helpers.generation import random_batch

from minigpt2 import advantages as A
from minigpt2.advantages import accuracy, dpo_loss, preference_loss, response_mask, response_targets
from minigpt2.loss import IGNORE_INDEX

GARBAGE = 1e6  # stands outside the masks, where nothing may be read


def pair(chosen: float, rejected: float) -> torch.Tensor:
    return torch.tensor([[chosen, rejected]], dtype=torch.float64)


# ------------------------------------------------------------------------ responses


def test_a_response_is_found_by_its_lengths():
    mask = response_mask(torch.tensor([2, 1, 3]), torch.tensor([4, 2, 3]), 5)
    assert mask.int().tolist() == [[0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("pad", [0, 7, 50256])
def test_ids_decide_nothing_about_a_response(pad):
    """Padding may have the id of <|endoftext|> or of a token of the response."""
    rows = [[5, 50256, 7, 50256], [0, 0, 50256, pad]]
    ids = torch.tensor(rows)
    targets = response_targets(ids, torch.tensor([2, 1]), torch.tensor([4, 3]))
    assert targets.tolist() == [[IGNORE_INDEX, 7, 50256, IGNORE_INDEX],
                                [0, 50256, IGNORE_INDEX, IGNORE_INDEX]]


def test_targets_follow_their_inputs():
    ids, masks = random_batch([9, 4, 2], seed=0)
    starts, ends = torch.tensor([3, 1, 1]), masks.sum(1)
    targets = response_targets(ids, starts, ends)
    assert targets.shape == ids.shape and (targets != IGNORE_INDEX).sum(1).tolist() == [6, 3, 1]
    for row, start, end in zip(range(3), starts, ends, strict=True):
        assert targets[row, start - 1 : end - 1].tolist() == ids[row, start:end].tolist()


# --------------------------------------------------------------------- preferences


def test_bradley_terry_by_hand():
    margins = torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64)
    assert preference_loss(margins).tolist() == pytest.approx([0.126928, math.log(2), 2.126928],
                                                              abs=1e-6)
    assert preference_loss(torch.tensor([-1e4])).tolist() == [1e4]  # no overflow
    margins.requires_grad_()
    preference_loss(margins).sum().backward()  # minus the probability that the rejected one wins
    assert margins.grad.tolist() == pytest.approx([-0.119203, -0.5, -0.880797], abs=1e-6)


def test_a_tie_is_half_right():
    assert accuracy(torch.tensor([0.1, -0.1, 0.0])).tolist() == [1, 0, 0.5]


def test_dpo_by_hand():
    losses, margins = dpo_loss(pair(-10, -15), pair(-12, -14), 0.1)
    assert margins.item() == pytest.approx(0.3) and losses.item() == pytest.approx(0.554355,
                                                                                  abs=1e-6)
    losses, margins = dpo_loss(pair(-10, -15), pair(-10, -15), 0.1)
    assert margins.item() == 0 and losses.item() == pytest.approx(0.693147, abs=1e-6)


def test_label_smoothing_by_hand():
    """0.9 x 0.554355 + 0.1 x (0.554355 + 0.3)."""
    losses, margins = dpo_loss(pair(-10, -15), pair(-12, -14), 0.1, 0.1)
    assert losses.item() == pytest.approx(0.584355, abs=1e-6) and margins.item() == (
        pytest.approx(0.3))
    policy = pair(-10, -15).requires_grad_()  # at half, nothing is preferred
    dpo_loss(policy, policy.detach(), 0.1, 0.5)[0].sum().backward()
    assert policy.grad.abs().max() == 0


def test_length_normalization_by_hand():
    """2 / 4 tokens - (-1) / 2 tokens, times beta 5: a margin of 5."""
    losses, margins = dpo_loss(pair(-10, -15), pair(-12, -14), 5.0,
                               lengths=torch.tensor([[4, 2]]))
    assert margins.item() == pytest.approx(5.0)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-5)), abs=1e-9)


def test_the_gradient_of_dpo_by_hand():
    """beta sigmoid(-margin) times the difference: 0.1 x 0.425557."""
    policy = pair(-10, -15).requires_grad_()
    dpo_loss(policy, pair(-12, -14), 0.1)[0].sum().backward()
    assert policy.grad.tolist()[0] == pytest.approx([-0.0425557, 0.0425557], abs=1e-7)


# -------------------------------------------------------------- policy optimization: by hand
# The checks look functions up in their module, so that `test_the_checks_find_errors` can break them


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_token_rewards_by_hand():
    """Rows of 1, 3 and T = 4 tokens: the score is at the last one, nothing follows, and each row
    sums to score - kl_coef x KL."""
    mask = response_mask(torch.zeros(3), torch.tensor([1, 3, 4]), 4)
    log_ratios = table([0.5, 0, 0, 0], [-1, 2, 0.5, 0], [1, 1, 1, 1]).masked_fill(~mask, GARBAGE)
    scores = torch.tensor([2.0, -1.0, 0.25])
    rewards = A.token_rewards(scores, log_ratios, mask, 0.1)
    expected = table([1.95, 0, 0, 0], [0.1, -0.2, -1.05, 0], [-0.1, -0.1, -0.1, 0.15])
    torch.testing.assert_close(rewards, expected)
    kl = log_ratios.where(mask, 0).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - 0.1 * kl)
    assert A.token_rewards(scores, log_ratios, mask, 0.0)[~mask].abs().max() == 0


HAND = {"rewards": [-0.1, 0.2, 1.0], "values": [0.5, 0.4, 0.3],
        "advantages": [0.52675, 0.765, 0.7]}


def check_gae() -> None:
    """delta = [-.2, .1, .7], and from the end: .7, .1 + .95 x .7, -.2 + .95 x .765. The second row
    ends after two tokens: .2 - .4 + 0, then -.1 + .4 - .5 + .95 x -.2."""
    mask = response_mask(torch.zeros(2), torch.tensor([3, 2]), 4)
    rewards, values = (table([*HAND[name], 0], [*HAND[name], 0]).masked_fill(~mask, GARBAGE)
                       for name in ("rewards", "values"))
    found = A.gae(rewards, values, mask, 0.95)
    torch.testing.assert_close(found, table([*HAND["advantages"], 0], [-0.39, -0.2, 0, 0]))
    returns = (found + values)[0, :3].tolist()
    assert returns == pytest.approx([1.02675, 1.165, 1.0])


def test_generalized_advantages_by_hand():
    check_gae()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
def test_generalized_advantages_are_the_sum_of_their_definition(gae_lambda):
    """Equation 16 of Schulman et al., term by term; with 1, the reward to come minus the value."""
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([6, 1, 4])
    mask = response_mask(torch.zeros(3), ends, 6)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    found = A.gae(rewards, values, mask, gae_lambda)
    for i, end in enumerate(ends.tolist()):
        r, v = rewards[i, :end], torch.cat([values[i, :end], torch.zeros(1)])
        for t in range(end):
            terms = [gae_lambda ** (k - t) * (r[k] + v[k + 1] - v[k]) for k in range(t, end)]
            assert found[i, t].item() == pytest.approx(sum(terms).item(), abs=1e-12)
            if gae_lambda == 1:
                assert found[i, t].item() == pytest.approx((r[t:].sum() - v[t]).item())
    assert found[~mask].abs().max() == 0


def check_whitening() -> None:
    """With the unbiased variance, over the mask only."""
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = table([0.52675, 0.765, GARBAGE], [0.7, -GARBAGE, GARBAGE])
    found = A.whiten(x, mask)
    assert found[mask].tolist() == pytest.approx([-1.113768, 0.820778, 0.292990], abs=1e-6)
    assert found[~mask].abs().max() == 0
    assert found[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert found[mask].var().item() == pytest.approx(1, abs=1e-6)


def test_whitening_by_hand():
    check_whitening()


def corners(*names: str) -> list[torch.Tensor]:
    """The four corner cases of a ratio and an advantage, each as log-probabilities (4,)."""
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    values = {"new": ratios.log() - 2, "old": torch.full_like(ratios, -2),
              "advantages": torch.tensor([1, -1, 1, -1], dtype=torch.float64)}
    return [values[name] for name in names]


def check_policy_loss() -> None:
    new, old, advantages = corners("new", "old", "advantages")
    new.requires_grad_()
    losses, _ = A.policy_loss(new, old, advantages, 0.2, 0.2)
    assert losses.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    losses.sum().backward()  # a clipped token has no gradient, others ratio x -advantage
    assert new.grad.tolist() == pytest.approx([0, 1.5, -0.5, 0])


def test_the_clipped_policy_loss_by_hand():
    check_policy_loss()


def test_the_upper_bound_is_its_own():
    new, old, advantages = corners("new", "old", "advantages")
    losses, _ = A.policy_loss(new, old, advantages, 0.4, 0.28)
    assert losses.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.6])
    for low, high, clipped in ((0.2, 0.2, [1, 1, 1, 1]), (0.6, 0.2, [1, 1, 0, 0]),
                               (0.2, 0.6, [0, 0, 1, 1])):
        assert A.policy_loss(new, old, advantages, low, high)[1].tolist() == clipped
    assert A.policy_loss(old, old, advantages, 0, 0)[1].tolist() == [0, 0, 0, 0]


def check_value_loss() -> None:
    """Old value 0, return 1: of .5, clipped to .2, the error .8 counts; of 3, the value's own. A
    clipped value that is worse than its bound has no gradient."""
    values = torch.tensor([0.5, 3.0, 0.1, -0.5], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros(4), torch.ones(4)
    losses = A.value_loss(values, old, returns, 0.2)
    assert losses.tolist() == pytest.approx([0.32, 2.0, 0.405, 1.125])
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0, 2, -0.9, -1.5])


def test_the_clipped_value_loss_by_hand():
    check_value_loss()
    losses = A.value_loss(torch.tensor([0.5, 3.0]), torch.zeros(2), torch.ones(2), 0)
    assert losses.tolist() == pytest.approx([0.125, 2.0])


def check_group_advantages() -> None:
    """Rewards 1 and 0 of one prompt, 5 and 3 of another."""
    rewards = torch.tensor([1.0, 0.0, 5.0, 3.0], dtype=torch.float64)
    assert A.group_advantages(rewards, 2, False).tolist() == [0.5, -0.5, 1, -1]
    scaled = A.group_advantages(rewards, 2, True).tolist()  # deviations .707107 and 1.414214
    assert scaled == pytest.approx([0.707007, -0.707007, 0.707057, -0.707057], abs=1e-6)
    for scale in (False, True):  # what a prompt's rewards have in common changes nothing
        moved = rewards + torch.tensor([7.0, 7.0, -40.0, -40.0])
        torch.testing.assert_close(A.group_advantages(moved, 2, scale),
                                   A.group_advantages(rewards, 2, scale), atol=1e-6, rtol=0)


def test_group_advantages_by_hand():
    check_group_advantages()


@pytest.mark.parametrize("scale", [False, True])
def test_equal_rewards_of_a_group_teach_nothing(scale):
    """Exactly, and finite; one lower reward among eight stays below 3 in size."""
    for reward in (0.0, 1.0, -1.0, 0.1, 1e4):
        assert A.group_advantages(torch.full((16,), reward), 8, scale).tolist() == [0] * 16
    found = A.group_advantages(torch.tensor([0.0] + [0.95] * 7), 8, scale)
    assert found.abs().max() < 3 and found[0] < 0 < found[1:].min()


def test_the_adaptive_coefficient_by_hand():
    """KL 9 against 6 counts as 1.2 at most, for 512 of 10,000 responses."""
    assert A.next_kl_coef(0.15, 9, 6, 512) == pytest.approx(0.151536, abs=1e-9)
    assert A.next_kl_coef(0.15, 0, 6, 512) == pytest.approx(0.148464, abs=1e-9)
    assert A.next_kl_coef(0.15, 6.6, 6, 512) == pytest.approx(0.15 * (1 + 0.1 * 0.0512))
    assert A.next_kl_coef(0.15, 6, 6, 512) == 0.15


# ------------------------------------------------------ the gradient of the KL, by enumeration


def two_token_tree() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Parameters (12,) of a policy over sequences of two of three tokens, the second conditional on
    the first; and the log-probabilities (9, 2) of their tokens, of the policy and a reference."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(12, generator=generator, dtype=torch.float64, requires_grad=True)

    def token_logprobs(parameters):
        first, second = parameters[:3].log_softmax(0), parameters[3:].view(3, 3).log_softmax(1)
        return torch.stack([torch.stack([first[a], second[a, b]])
                            for a, b in itertools.product(range(3), repeat=2)])  # (9, 2)

    reference = token_logprobs(torch.randn(12, generator=generator, dtype=torch.float64))
    return theta, token_logprobs(theta), reference


def check_kl_gradient(kl_in_loss=None) -> None:
    """With the KL in the reward and full reward-to-go, the expected gradient of the policy loss is
    that of the KL itself; `kl_in_loss`, per token, replaces it."""
    theta, logprobs, reference = two_token_tree()
    p, log_ratios = logprobs.sum(1).exp(), logprobs - reference  # (9,), (9, 2)
    [exact] = torch.autograd.grad((p * log_ratios.sum(1)).sum(), theta, retain_graph=True)
    if kl_in_loss is None:
        mask = torch.ones(9, 2, dtype=torch.bool)
        rewards = A.token_rewards(torch.zeros(9), log_ratios.detach(), mask, 1.0)
        advantages = A.gae(rewards, torch.zeros(9, 2), mask, 1.0)
        losses, _ = A.policy_loss(logprobs, logprobs.detach(), advantages, 0.2, 0.2)
    else:
        losses = kl_in_loss(logprobs, reference)
    [found] = torch.autograd.grad((p.detach() * losses.sum(1)).sum(), theta)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


def test_the_kl_in_the_reward_has_the_gradient_of_the_kl():
    check_kl_gradient()


def k3(logprobs, reference):
    return (reference - logprobs).exp() - 1 - (reference - logprobs)


@pytest.mark.parametrize("kl_in_loss", [
    lambda new, ref: new - ref, lambda new, ref: (new - ref).square() / 2, k3,
    lambda new, ref: (new - new.detach()).exp() * k3(new, ref)], ids=["k1", "k2", "k3", "ratio k3"])
def test_a_kl_in_the_loss_has_another_gradient(kl_in_loss):
    with pytest.raises(AssertionError):
        check_kl_gradient(kl_in_loss)


def test_the_hand_values_of_the_estimators():
    new, ref = torch.tensor(-1.0), torch.tensor(-1.5)
    assert k3(new, ref).item() == pytest.approx(0.106531, abs=1e-6)


# ---------------------------------------------------------- errors that no optimum reveals


def everywhere(mask: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(mask)


def population(x, mask):
    return ((x - x[mask].mean()) * torch.rsqrt(x[mask].var(correction=0) + 1e-8)).where(mask, 0)


def interleaved(rewards, group_size, scale, real=A.group_advantages):
    """Takes [p1, p2, p1, p2] for [p1, p1, p2, p2]."""
    order = torch.arange(len(rewards)).view(group_size, -1).T.flatten()
    return real(rewards[order], group_size, scale)[order.argsort()]


def maximum(new, old, advantages, low, high):
    ratios = (new - old).exp()
    losses = -torch.maximum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    return losses, torch.zeros_like(losses)


MUTATIONS = {
    "GAE over padding": ("gae", lambda r, v, mask, decay, real=A.gae: real(
        r, v, everywhere(mask), decay), check_gae),
    "lambda 1": ("gae", lambda r, v, mask, _, real=A.gae: real(r, v, mask, 1.0), check_gae),
    "whitening over padding": ("whiten", lambda x, mask, real=A.whiten: real(
        x, everywhere(mask)).where(mask, 0), check_whitening),
    "no whitening": ("whiten", lambda x, mask: x.where(mask, 0), check_whitening),
    "population variance": ("whiten", population, check_whitening),
    "groups mixed": ("group_advantages", interleaved, check_group_advantages),
    "maximum for minimum": ("policy_loss", maximum, check_policy_loss),
    "ratio inverted": ("policy_loss", lambda new, old, *rest, real=A.policy_loss: real(
        old, new, *rest), check_policy_loss),
    "no value clip": ("value_loss", lambda v, old, returns, _, real=A.value_loss: real(
        v, old, returns, 0), check_value_loss),
    "smaller value error": ("value_loss", lambda v, old, returns, clip: torch.minimum(
        (v - returns) ** 2, (old + (v - old).clamp(-clip, clip) - returns) ** 2) / 2,
        check_value_loss),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checks_find_errors(name, monkeypatch):
    """Of these, most reach 0.96 to 0.99 of the way to a known optimum."""
    function, mutation, check = MUTATIONS[name]
    check()
    monkeypatch.setattr(A, function, mutation)
    with pytest.raises(AssertionError):
        check()
