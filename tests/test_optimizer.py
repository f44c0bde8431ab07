import dataclasses
import math

import pytest
import torch
from helpers.common import CPU_LAUNCH, TINY, user_error
from helpers.training import assert_same_run, interrupted, tiny

from minigpt2.optimizer import (
    Muon,
    is_block_matrix,
    learning_rate,
    load_optimizer_state,
    make_optimizer,
    missing_bytes,
    optimizer_state,
    orthogonal,
    set_lr,
    step_if_finite,
)
from minigpt2.resume import restore
from model import GPT
from trainer import train

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
                               kind="muon", muon_lr=0.02)
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
                               kind="muon", muon_lr=0.4)
    set_lr(optimizer, 0.05)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05, 0.05]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_with_a_non_finite_number_changes_nothing(kind):
    """Decided on the device, and otherwise equal to a plain step, bit for bit."""
    models = [GPT(TINY), GPT(TINY)]
    models[1].load_state_dict(models[0].state_dict())
    ours, plain = (make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                  kind=kind, muon_lr=0.4) for model in models)
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
    optimizer = make_optimizer(model, kind="muon", muon_lr=0.4, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    again = make_optimizer(model, kind="muon", muon_lr=0.8, **options)
    state = optimizer_state(optimizer, CPU_LAUNCH, lambda value, name: value)
    load_optimizer_state(again, state)
    assert again.param_groups[0]["lr_scale"] == 8  # settings are the new ones'
    for p in model.parameters():
        for name, value in optimizer.state[p].items():
            assert torch.equal(again.state[p][name], value)
            assert again.state[p][name] is not value  # a copy: `state` may be memory-mapped
    with pytest.raises(ValueError, match="is momentum, step, not exp_avg, exp_avg_sq, step"):
        load_optimizer_state(make_optimizer(model, **options), state)


# ------------------------------------------------------------------- an optimizer of one's own


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, as a user would write it: one moment, counts in a plain int, and no skipped
    steps."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["moment"], state["count"] = torch.zeros_like(p), 0
                state["count"] += 1
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(state["moment"].lerp(p.grad, 1 - beta1).sign(), alpha=lr)
                state["moment"].lerp_(p.grad, 1 - beta2)


class Factored(Lion):
    """One number per row of a small matrix, or per column of a large one, in bfloat16; a vector has
    no state. So what it holds depends on the size."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    name, dim = ("rows", 1) if len(p) <= 32 else ("columns", 0)
                    mean = p.grad.mean(dim, keepdim=True).bfloat16()
                    moment = self.state[p].setdefault(name, torch.zeros_like(mean))
                    p.sub_(moment.lerp_(mean, 0.5), alpha=group["lr"])


OWN = {"lion": Lion, "factored": Factored, "sgd": torch.optim.SGD,
       "momentum": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9),
       "plain adamw": lambda params, lr: torch.optim.AdamW(params, lr, fused=False)}


def own_optimizer(name: str, model: GPT) -> torch.optim.Optimizer:
    groups = [[p for p in model.parameters() if (p.dim() == 1) is flat] for flat in (False, True)]
    return OWN[name]([{"params": group} for group in groups], lr=1e-3)


def copied(value, name: str):
    return value.clone() if torch.is_tensor(value) else value


@pytest.mark.parametrize("name", OWN)
def test_a_run_with_an_own_optimizer_resumes_exactly(name, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.make_optimizer", lambda model, **options: own_optimizer(name,
                                                                                         model))
    train(tiny(corpus, tmp_path / "whole"), CPU_LAUNCH)
    train(tiny(corpus, interrupted(tmp_path / "whole", tmp_path / "out", 5), resume=True),
          CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole", has_state=name != "sgd")


@pytest.mark.parametrize("name", OWN)
def test_a_step_of_an_own_optimizer_with_a_non_finite_number_is_skipped(name):
    model = GPT(TINY)
    optimizer, before = own_optimizer(name, model), [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    step_if_finite(optimizer, torch.tensor([1.0, math.nan]))
    assert all(map(torch.equal, before, model.parameters()))
    step_if_finite(optimizer, torch.ones(2))
    assert not any(map(torch.equal, before, model.parameters())) or name == "factored"


@pytest.mark.parametrize("name", OWN)
def test_the_bytes_of_an_own_optimizer_are_those_it_will_hold(name):
    model = GPT(TINY)
    optimizer = own_optimizer(name, model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    expected, before = missing_bytes(optimizer), [p.clone() for p in model.parameters()]
    assert not optimizer.state and all(map(torch.equal, before, model.parameters()))
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values()
               if torch.is_tensor(value))
    assert missing_bytes(optimizer) == 0
    assert expected == held


def test_the_bytes_of_adamw_and_muon_are_those_of_their_moments():
    model = GPT(TINY)
    counts = [p.numel() for name, p in model.named_parameters() if is_block_matrix(name, p)]
    others, tensors = model.num_parameters() - sum(counts), len(list(model.parameters()))
    for kind, expected in (("adamw", 8 * model.num_parameters()), ("muon", 4 * sum(counts)
                                                                   + 8 * others)):
        optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                                   kind=kind, muon_lr=0.4)
        assert missing_bytes(optimizer) == expected + 4 * tensors  # of the steps


@pytest.mark.parametrize("saved, loaded, held, wanted", [
    ("lion", "plain adamw", "count, moment", "exp_avg, exp_avg_sq, step"),
    ("plain adamw", "lion", "exp_avg, exp_avg_sq, step", "count, moment"),
    ("momentum", "sgd", "momentum_buffer", "nothing"),
    ("sgd", "momentum", "nothing", "momentum_buffer"),
    ("factored", "lion", "columns", "count, moment")])
def test_a_state_that_does_not_fit_says_what_is_missing(saved, loaded, held, wanted, tmp_path):
    """In one line, which does not advise to delete the checkpoint."""
    model = GPT(TINY)
    optimizer = own_optimizer(saved, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {"optimizer": optimizer_state(optimizer, CPU_LAUNCH, copied), "scaler": {},
             "progress": {"step": 1}}
    message = user_error(restore, tmp_path / "step_000005", state, own_optimizer(loaded, model),
                         torch.amp.GradScaler("cpu", enabled=False))
    assert f"the optimizer's state of a parameter is {held}, not {wanted}" in message
    assert "another --out-dir" in message
    assert not any(word in message for word in ("rm ", "delete", "remove"))
    if saved == "lion":
        smaller = torch.nn.ParameterList([torch.zeros(3)])
        other = Lion(smaller, lr=1e-3)
        assert f"it has {len(list(model.parameters()))} parameters, not 1" in user_error(
            restore, tmp_path / "x", state, other, torch.amp.GradScaler("cpu", enabled=False))
        wider = GPT(dataclasses.replace(TINY, vocab_size=TINY.vocab_size + 1))
        assert "moment is of (50257, 16), not (50258, 16)" in user_error(
            restore, tmp_path / "x", state, own_optimizer("lion", wider),
            torch.amp.GradScaler("cpu", enabled=False))


def test_a_rank_may_own_no_matrix():
    """As when there are more ranks than ZeRO has parameters to give them."""
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    muon = Muon([{"params": [], "muon": True, "momentum": 0.95}, *optimizer.param_groups], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    muon.step()
    assert all((p != old).all() for p, old in zip(model.parameters(), before, strict=True))
