"""Policy optimization: what is scored and trained, known optima, ranks, resume, and bad input."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import world_rewards
from helpers.common import CPU_LAUNCH
from helpers.worlds import T, W

import rlhf
from minigpt2 import advantages as A
from minigpt2.metrics import read_log
from minigpt2.sampling import Response
from rlhf import RLHFConfig, train

# A tree like World T whose reference stops sooner: responses of all lengths, 1 to 4
TREE = replace(T, sharpness=1)


def settings(world, folder, **changes) -> RLHFConfig:
    """Eight steps of 16 responses to the prompts of a world, with all files in a folder."""
    reference = folder / "reference"
    if not reference.exists():
        world.save_reference(reference)
    options = {"checkpoint": str(reference), "out_dir": str(folder / "out"), "steps": 8,
               "prompts": str(world.write_prompts(folder / "prompts.jsonl")),
               "reward": f"{world_rewards.__file__}:{world.reward.__name__}",
               "unstopped_score": world.unstopped, "max_response": world.max_new_tokens,
               "batch_size": 16, "group_size": 4, "micro_batch_size": 16, "kl_coef": world.beta,
               "max_lr": 3e-3, "value_lr": 3e-3, "warmup_fraction": 0.0, "val_fraction": 0.0,
               "eval_interval": 10**6, "save_interval": 10**6, "seed": 1, "device": "cpu"}
    return RLHFConfig(**options | changes)


def records(out, kind: str = "train") -> list[dict]:
    return [record for _, record in sorted(read_log(out / "metrics.jsonl")[kind].items())]


# --------------------------------------------------------------------------- known optima


@pytest.mark.parametrize("world, start, best, responses, unstopped", [
    (W, -0.6177, (0.1208, 1.3194), 13, 9), (T, -0.9229, (-0.0193, 3.5669), 781, 625)],
    ids=["W", "T"])
def test_the_worlds_are_what_they_say(world, start, best, responses, unstopped):
    reference = world.make_reference()
    logprobs, optimum = world.response_logprobs(reference), world.best_logprobs(reference)
    assert logprobs.shape == (len(world.prompts), responses)
    assert logprobs.exp().sum(1).tolist() == pytest.approx([1] * len(world.prompts), abs=1e-5)
    assert world.objective(logprobs, logprobs) == pytest.approx((start, 0), abs=1e-4)
    assert world.objective(optimum, logprobs) == pytest.approx(best, abs=1e-4)
    partition = (logprobs + world.rewards / world.beta).logsumexp(1).mean().item()
    assert world.objective(optimum, logprobs)[0] == pytest.approx(world.beta * partition)
    assert sum(response[-1] != world.stop for response in world.responses) == unstopped


def optimize_in(world, folder, monkeypatch, **changes):
    world.use_small_vocabulary(monkeypatch)
    options = {"steps": 100, "batch_size": 64, "group_size": 64 // len(world.prompts),
               "micro_batch_size": 64}
    return world.standing(train(settings(world, folder, **options | changes), CPU_LAUNCH))


@pytest.mark.slow
@pytest.mark.parametrize("world", [W, T], ids=["W", "T"])
@pytest.mark.parametrize("changes", [
    {"advantage": "gae"}, {"advantage": "group"},
    {"advantage": "group", "scale_advantages": True, "seed": 2}], ids=["gae", "group", "scaled"])
def test_a_known_optimum_is_reached(world, changes, tmp_path, monkeypatch):
    """All responses are enumerated, so nothing is noisy but the training."""
    found = optimize_in(world, tmp_path, monkeypatch, **changes)
    assert found.fraction > 0.95 and found.total_variation < 0.1, found
    reference = world.make_reference()
    _, kl = world.objective(world.best_logprobs(reference), world.response_logprobs(reference))
    assert found.kl == pytest.approx(kl, rel=0.1)


# ------------------------------------------------ errors that the known optimum reveals


def negated(real):
    return lambda *arguments: -real(*arguments)


def without_kl(scores, log_ratios, mask, _, real=A.token_rewards):
    return real(scores, log_ratios, mask, 0.0)


def score_shifted_by(shift: int):
    """The score `shift` tokens after the last one; past the end it is lost."""
    def token_rewards(scores, log_ratios, mask, kl_coef, real=A.token_rewards):
        last = mask.sum(1) - 1
        place = (last + shift).clamp(min=0)[:, None]
        is_place = torch.arange(mask.size(1)) == place
        return real(torch.zeros_like(scores), log_ratios, mask, kl_coef) + (
            is_place * scores[:, None] * mask)

    return token_rewards


def ratio_inverted(new, old, *rest, real=A.policy_loss):
    return real(old, new, *rest)


def reference_is_the_policy(module, reference, *rest, real=rlhf.roll_out):
    return real(module, module.policy, *rest)


def ends_not_trained(rollouts, *rest, real=rlhf.advantages_and_returns):
    advantages, *others = real(rollouts, *rest)
    lengths = rollouts.mask.sum(1)
    return advantages * (torch.arange(advantages.size(1)) < lengths[:, None] - 1), *others


def kl_in_the_loss(estimate):
    """`advantages_and_returns` and `policy_loss` with the KL in the loss, per token, instead of in
    the reward. The former hands the log-probabilities of the reference to the latter."""
    def advantages_and_returns(rollouts, config, _, real=rlhf.advantages_and_returns):
        advantages, returns, figures = real(rollouts, config, 0.0)
        beta = torch.full_like(advantages, config.kl_coef)
        return torch.stack([advantages, rollouts.ref_logprobs, beta], -1), returns, figures

    def policy_loss(new, old, extended, *rest, real=A.policy_loss):
        advantages, ref, beta = extended.unbind(1)
        return real(new, old, advantages, *rest) + beta * estimate(new, ref)

    return {"rlhf.advantages_and_returns": advantages_and_returns,
            "minigpt2.advantages.policy_loss": policy_loss}


ROOM = "minigpt2.advantages."
MUTATIONS = {  # what is replaced, the world that shows it, and the kinds of advantage
    "right": ({}, W, "gae"),
    "right, group": ({}, W, "group"),
    "sign": ({ROOM + "whiten": negated(A.whiten)}, W, "gae"),
    "sign, group": ({ROOM + "group_advantages": negated(A.group_advantages)}, W, "group"),
    "no KL": ({ROOM + "token_rewards": without_kl}, W, "gae"),
    "reference drifting": ({"rlhf.roll_out": reference_is_the_policy}, W, "group"),
    "score one late": ({ROOM + "token_rewards": score_shifted_by(1)}, W, "gae"),
    "score one early": ({ROOM + "token_rewards": score_shifted_by(-1)}, W, "gae"),
    "end not trained": ({"rlhf.advantages_and_returns": ends_not_trained}, W, "group"),
    "end not trained, gae": ({"rlhf.advantages_and_returns": ends_not_trained}, W, "gae"),
    "unstopped as if whole": ({"minigpt2.sampling.Response.stopped": property(
        lambda self: True)}, W, "gae"),
    "ratio inverted": ({ROOM + "policy_loss": ratio_inverted}, W, "gae"),
    "k1 in the loss": (kl_in_the_loss(lambda new, ref: new - ref), W, "group"),
    "k2 in the loss": (kl_in_the_loss(lambda new, ref: (new - ref).square() / 2), W, "group"),
    "k3 in the loss": (kl_in_the_loss(lambda new, ref: (ref - new).exp() - 1 - (ref - new)), W,
                       "group"),
}
SHORT = {"steps": 30, "max_lr": 5e-3, "value_lr": 5e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_algorithm_does_not_reach_the_optimum(name, tmp_path, monkeypatch):
    """So `test_a_known_optimum_is_reached` would find these errors. The runs are shorter."""
    replaced, world, advantage = MUTATIONS[name]
    for path, mutation in replaced.items():
        monkeypatch.setattr(path, mutation)
    found = optimize_in(world, tmp_path, monkeypatch, advantage=advantage, **SHORT)
    print(name, found)
    assert (found.fraction > 0.95) == (not replaced), found
