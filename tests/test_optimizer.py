import math

import pytest
import torch
from conftest import TINY

from model import GPT
from optimizer import cosine_lr, make_adamw, set_lr

GPT2 = {"warmup_steps": 715, "max_steps": 19073, "max_lr": 6e-4, "min_lr": 6e-5}


@pytest.mark.parametrize("step, lr", [
    (0, 6e-4 / 715),  # not 0: the first update counts
    (356, 6e-4 * 357 / 715),
    (714, 6e-4), (715, 6e-4),  # end of warm-up, begin of the cosine
    (715 + (19073 - 715) // 2, (6e-4 + 6e-5) / 2),  # middle
    (715 + (19073 - 715) // 4, 6e-5 + 0.5 * (1 + math.cos(math.pi / 4)) * 5.4e-4),
    (19072, 6e-5), (19073, 6e-5), (30000, 6e-5)])
def test_schedule_by_hand(step, lr):
    assert cosine_lr(step, **GPT2) == pytest.approx(lr, rel=1e-4)


def test_schedule_without_warm_up_and_of_one_step():
    options = {"warmup_steps": 0, "max_lr": 1.0, "min_lr": 0.1}
    assert cosine_lr(0, max_steps=10, **options) == 1.0
    assert cosine_lr(0, max_steps=1, **options) == 1.0
    assert cosine_lr(3, max_steps=3, warmup_steps=5, max_lr=1.0, min_lr=0.1) == 0.8
    rates = [cosine_lr(step, max_steps=10, **options) for step in range(11)]
    assert rates == sorted(rates, reverse=True)


def test_only_matrices_and_embeddings_decay():
    model = GPT(TINY)
    optimizer = make_adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
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


def test_first_update_by_hand():
    """AdamW's first step moves every weight by lr towards -sign(gradient), after the decay."""
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
        model.bias.fill_(3.0)
    optimizer = make_adamw(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    (model.weight * torch.tensor([[4.0, -4.0]])).sum().add(model.bias.sum()).backward()
    optimizer.step()
    assert torch.allclose(model.weight, torch.tensor([[1 * 0.95 - 0.1, -2 * 0.95 + 0.1]]))
    assert torch.allclose(model.bias, torch.tensor([2.9]))
