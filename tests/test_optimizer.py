import math

import pytest
import torch
from helpers.common import CPU_LAUNCH, TINY

from minigpt2.optimizer import (
    is_block_matrix,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    orthogonal,
    set_lr,
    step_if_finite,
)
from model import GPT

GPT2 = {"warmup_steps": 715, "max_steps": 19073, "max_lr": 6e-4, "min_lr": 6e-5}


@pytest.mark.parametrize("step, lr", [
    (0, 6e-4 / 715),  # not 0: the first step has a learning rate
    (356, 6e-4 * 357 / 715),
    (714, 6e-4), (715, 6e-4),  # end of warm-up, begin of the cosine
    (715 + (19073 - 715) // 2, (6e-4 + 6e-5) / 2),  # middle
    (715 + (19073 - 715) // 4, 6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4),
    (19072, 6e-5), (19073, 6e-5), (30000, 6e-5)])
def test_cosine_schedule_by_hand(step, lr):
    assert learning_rate(step, **GPT2) == pytest.approx(lr, rel=1e-4)


def test_schedule_without_warm_up_and_of_one_step():
    options = {"warmup_steps": 0, "max_lr": 1.0, "min_lr": 0.1}
    assert learning_rate(0, max_steps=10, **options) == 1.0
    assert learning_rate(0, max_steps=1, **options) == 1.0
    assert learning_rate(3, max_steps=3, warmup_steps=5, max_lr=1.0, min_lr=0.1) == 0.8
    rates = [learning_rate(step, max_steps=10, **options) for step in range(11)]
    assert rates == sorted(rates, reverse=True)


def test_only_matrices_and_embeddings_decay():
    model = GPT(TINY)
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decayed, rest = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith(".weight") and "ln_" not in names[id(p)]
               for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in rest["params"])
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)  # every one once, the tied head included
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_first_adamw_step_by_hand():
    """AdamW's first step moves every weight by lr towards -sign(gradient), after the decay."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(3.0)
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    (model.weight * torch.tensor([[4.0, -4.0]])).sum().add(model.bias.sum()).backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.tensor([[1 * 0.95 - 0.1, -2 * 0.95 + 0.1]]))
    assert torch.allclose(model.bias, torch.tensor([2.9]))


@pytest.mark.parametrize("step, lr", [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.6), (100, 0.2),
                                      (1000, 0.2)])
def test_linear_schedule_by_hand(step, lr):
    assert learning_rate(step, warmup_steps=10, max_steps=100, max_lr=1.0, min_lr=0.2,
                         schedule="linear") == pytest.approx(lr)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 32)])
def test_newton_schulz_makes_matrices_nearly_orthogonal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e4])[: shape[0], None, None]
    u, s, v = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices)
    values = torch.linalg.svdvals(found)
    near = s / s[:, :1] > 0.02  # five steps lift what is not far below the largest
    assert values[near].min() > 0.6 and values.max() < 1.3
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), (u @ v).flatten(1))
    assert cosine.min() > 0.95


def muon_by_hand(weight, grads, lr, weight_decay):
    """Two steps of one matrix as the paper defines them: q, k and v separately, exact SVD."""
    momentum = torch.zeros_like(weight)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad
        direction = 0.95 * momentum + 0.05 * grad
        weight = weight * (1 - lr * weight_decay)
        parts = 3 if weight.size(0) == 3 * weight.size(1) else 1
        updates = []
        for part in direction.chunk(parts):
            u, _, v = torch.linalg.svd(part, full_matrices=False)
            updates.append(u @ v * 0.2 * max(part.shape) ** 0.5)
        weight = weight - lr * torch.cat(updates)
    return weight


def test_muon_steps_by_hand(monkeypatch):
    def exactly(matrices):
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        return u @ v

    monkeypatch.setattr("minigpt2.optimizer.orthogonal", exactly)
    torch.manual_seed(0)
    model = GPT(TINY)
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5,
                               muon_lr=0.02)
    names = [name for name, p in model.named_parameters() if is_block_matrix(name, p)]
    assert len(names) == 4 * TINY.n_layer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: torch.randn(2, *p.shape) for name, p in model.named_parameters()}
    for step in range(2):
        for name, p in model.named_parameters():
            p.grad = grads[name][step].clone()
        optimizer.step()
    plain = make_optimizer(copy := GPT(TINY), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    copy.load_state_dict(before, strict=False)
    for step in range(2):
        for name, p in copy.named_parameters():
            p.grad = grads[name][step].clone()
        plain.step()
    for (name, p), other in zip(model.named_parameters(), copy.parameters(), strict=True):
        expected = muon_by_hand(before[name], grads[name], 0.02, 0.5) if name in names else other
        assert torch.allclose(p, expected, atol=1e-5), name


def test_the_muon_learning_rate_follows_the_schedule():
    optimizer = make_optimizer(GPT(TINY), lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                               muon_lr=0.4)
    set_lr(optimizer, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05, 0.05]


@pytest.mark.parametrize("muon_lr", [None, 0.4])
def test_a_step_with_a_non_finite_number_changes_nothing(muon_lr):
    """Decided on the device, and otherwise equal to a plain step, bit for bit."""
    models = [GPT(TINY), GPT(TINY)]
    models[1].load_state_dict(models[0].state_dict())
    ours, plain = (make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                  muon_lr=muon_lr) for model in models)
    for bad in (math.nan, math.inf, -math.inf):
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad, q.grad = torch.full_like(p, bad), torch.randn_like(q)
        step_if_finite(ours, torch.tensor([1.0, 0.0, bad]))
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            p.grad = q.grad.clone()
        step_if_finite(ours, torch.ones(3))
        plain.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)
            for name, value in plain.state[q].items():
                assert torch.equal(ours.state[p][name], value), name


def test_muon_state_round_trip():
    torch.manual_seed(0)
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    model = GPT(TINY)
    optimizer = make_optimizer(model, muon_lr=0.4, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    again = make_optimizer(model, muon_lr=0.8, **options)
    state = optimizer_state(optimizer, CPU_LAUNCH, lambda value, name: value)
    load_optimizer_state(again, state)
    assert again.param_groups[0]["lr_scale"] == 8  # settings are the new ones'
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            assert torch.equal(again.state[p][name], value)
            assert again.state[p][name] is not value  # a copy: `state` may be memory-mapped
    with pytest.raises((KeyError, ValueError)):  # of the other recipe
        load_optimizer_state(make_optimizer(model, **options), state)
