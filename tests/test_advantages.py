"""Hand numbers for every function of minigpt2/advantages.py."""

import math

import pytest
import torch
from helpers.generation import random_batch

from minigpt2.advantages import accuracy, dpo_loss, preference_loss, response_mask, response_targets
from minigpt2.loss import IGNORE_INDEX


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
