"""Policy optimization: what is scored and trained, known optima, ranks, resume, and bad input."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import world_rewards
from helpers.common import CPU_LAUNCH, ROOT, main_error, main_of, run_script, user_error, write_rows
from helpers.ranks import NO_WAIT, Ranks, wait_until
from helpers.training import (
    StopAfter,
    assert_same_run,
    final_state,
    flags,
    num_records,
    stopped_in_micro_step,
)
from helpers.worlds import T, W
from transformers import GPT2Config, GPT2LMHeadModel

import dpo
import finetune
import reward
import rlhf
from dataloader import load_prompts, pad_rows
from image import plot_frontier
from inference import generate, logprobs
from minigpt2 import advantages as A
from minigpt2.checkpoint import load_model, save_checkpoint, weights_sha256
from minigpt2.config import parse_config
from minigpt2.faults import StopRequest
from minigpt2.loss import IGNORE_INDEX
from minigpt2.metrics import read_log
from minigpt2.rewards import Reward, RewardModel, pad_batch, response_batch, score_rows
from minigpt2.sampling import Response
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, decode
from model import GPT, GPTConfig
from rlhf import PolicyAndValue, RLHFConfig, train

# A tree like World T whose reference stops sooner: responses of all lengths, 1 to 4
TREE = replace(T, sharpness=1)
RUN = SimpleNamespace(launch=CPU_LAUNCH, stop=StopRequest(), dtype=torch.float32,
                      pace=SimpleNamespace())
CPU = torch.device("cpu")


def settings(world, folder, **changes) -> RLHFConfig:
    """Eight steps of 16 responses to the prompts of a world, with all files in a folder."""
    reference = folder / "reference"
    if not reference.exists():
        world.save_reference(reference)
    options = {"checkpoint": str(reference), "out_dir": str(folder / "out"), "max_steps": 8,
               "prompts": str(world.write_prompts(folder / "prompts.jsonl")),
               "reward": f"{world_rewards.__file__}:{world.reward.__name__}",
               "unstopped_score": world.unstopped, "max_tokens": world.max_new_tokens,
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
    options = {"max_steps": 100, "batch_size": 64, "group_size": 64 // len(world.prompts),
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
        losses, clipped = real(new, old, advantages, *rest)
        return losses + beta * estimate(new, ref), clipped

    return {"rlhf.advantages_and_returns": advantages_and_returns,
            "minigpt2.advantages.policy_loss": policy_loss}


ROOM = "minigpt2.advantages."
MUTATIONS = {  # what is replaced, the world that shows it, and the kinds of advantage
    "right": ({}, W, "gae"),
    "right, group": ({}, W, "group"),
    "right, group, T": ({}, T, "group"),
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
    "k2 in the loss": (kl_in_the_loss(lambda new, ref: (new - ref).square() / 2), T, "group"),
    "k3 in the loss": (kl_in_the_loss(lambda new, ref: (ref - new).exp() - 1 - (ref - new)), T,
                       "group"),
}
SHORT = {W: {"max_steps": 30, "max_lr": 5e-3, "value_lr": 5e-3}, T: {"max_steps": 60}}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_algorithm_does_not_reach_the_optimum(name, tmp_path, monkeypatch):
    """So `test_a_known_optimum_is_reached` would find these errors. The runs are shorter."""
    replaced, world, advantage = MUTATIONS[name]
    for path, mutation in replaced.items():
        monkeypatch.setattr(path, mutation)
    found = optimize_in(world, tmp_path, monkeypatch, advantage=advantage, **SHORT[world])
    assert (found.fraction > 0.95) == (not replaced), found


# ------------------------------------------------------------- a learned reward, a real text


@pytest.mark.slow
def test_a_learned_reward_leads_to_the_same_optimum(tmp_path, monkeypatch):
    """reward.py on the plain pairs of World W, then PPO on its scores, judged by the true rewards.
    Pairs determine scores up to a constant of each prompt, here about -1.2 for both; so the fixed
    score of responses that do not stop is on the scale of the true rewards only after such a shift:
    it is the model's own mean score of them."""
    W.use_small_vocabulary(monkeypatch)
    base = W.save_reference(tmp_path / "reference")
    model = reward.train(reward.RewardConfig(
        checkpoint=str(base), data=str(W.write_rows(tmp_path / "rows.jsonl")), epochs=12,
        out_dir=str(tmp_path / "reward"), batch_size=125, micro_batch_size=500, max_lr=3e-3,
        val_fraction=0.0, eval_interval=10**6, save_interval=10**6, normalize_samples=0,
        device="cpu"), CPU_LAUNCH)
    scores = score_rows(model, W.rows, W.rows, CPU_LAUNCH, torch.float32, 26).view(2, -1)
    offsets = (scores - W.rewards).mean(1)
    assert (scores - W.rewards - offsets[:, None]).abs().max() < 0.25
    found = optimize_in(W, tmp_path, monkeypatch, reward=str(tmp_path / "reward"),
                        unstopped_score=scores[:, -9:].mean().item(), **SHORT[W])
    assert found.fraction > 0.95 and found.total_variation < 0.1, (found, offsets)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """World V: a checkpoint with GPT-2's vocabulary, fine-tuned to answer sums with one digit, any;
    and its rows."""
    folder = tmp_path_factory.mktemp("digits")
    torch.manual_seed(0)
    base = save_checkpoint(folder / "base", 1, GPT(GPTConfig(64, N_VOCAB, 2, 2, 32)))
    data = write_rows(folder / "rows.jsonl", [
        {"instruction": f"{n} + 1 =", "output": str(digit)}
        for n in range(10) for digit in range(10)])
    finetune.train(finetune.FinetuneConfig(
        checkpoint=str(base), data=str(data), out_dir=str(folder / "sft"), epochs=30,
        batch_size=32, micro_batch_size=32, max_lr=1e-2, val_fraction=0.0, eval_interval=10**6,
        save_interval=10**6, device="cpu"), CPU_LAUNCH)
    return str(folder / "sft"), str(data)


def exact_success(model: GPT, prompts, ids: list[int]) -> torch.Tensor:
    """The probability (P,) float64 of a response that is one of the ids and then stops."""
    rows = [[*prompt.ids, i, EOT_TOKEN] for prompt in prompts for i in ids]
    with torch.no_grad():
        scores = logprobs(model, *pad_rows(rows)).double()
    ends = torch.tensor([len(row) - 1 for row in rows])[:, None]
    return (scores.gather(1, ends - 1) + scores.gather(1, ends - 2)).exp().view(
        len(prompts), -1).sum(1)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_a_verifiable_reward_reaches_the_frontier(advantage, digits, tmp_path):
    """A reward of 1 for "7", else 0: the reference's probability p0 of it determines the optimum,
    p* = p0 e^(1/beta) / Z with Z = 1 - p0 + p0 e^(1/beta) and J* = beta log Z. A policy with
    probability p has at least the KL of one coin to another, p log(p / p0) + (1 - p) log((1 - p) /
    (1 - p0)). Both probabilities are exact, the policy's KL is that of 640 samples."""
    checkpoint, data = digits
    config = RLHFConfig(
        checkpoint=checkpoint, reward="function:equals=7", prompts=data, max_steps=30, kl_coef=0.5,
        out_dir=str(tmp_path / "out"), advantage=advantage, batch_size=108, group_size=12,
        micro_batch_size=108, epochs=1, max_tokens=2, max_lr=1e-3, value_lr=1e-3,
        warmup_fraction=0.0, val_fraction=0.0, eval_interval=10**6, save_interval=10**6, seed=1,
        device="cpu")
    policy, reference = train(config, CPU_LAUNCH), load_model(checkpoint)
    trained, held_out, _ = load_prompts(data, "--prompts", 64, 2, 0.0)
    prompts = trained + held_out
    ids = [i for i in range(EOT_TOKEN) if decode([i]).split() == ["7"]]
    assert len(prompts) == 10 and len(ids) >= 2  # with and without a space before it
    p0, p = (exact_success(model, prompts, ids) for model in (reference, policy))
    Z = 1 - p0 + p0 * math.exp(2)
    best = (p0 * math.exp(2) / Z).mean().item()
    assert 0.05 < p0.min() and p0.max() < 0.15 and best > 0.3
    assert p.mean().item() == pytest.approx(best, abs=0.05)
    made = Reward(config.reward, "--reward", CPU)
    rollouts = rlhf.roll_out(PolicyAndValue(policy, None), reference, made, prompts * 64, (7,),
                             config, RUN)
    assert rollouts.scores.mean().item() == pytest.approx(p.mean().item(), abs=0.06)
    kl, error = rollouts.kl.mean(), rollouts.kl.std() / len(rollouts.kl) ** 0.5
    frontier = (p * (p / p0).log() + (1 - p) * ((1 - p) / (1 - p0)).log()).mean()
    assert kl >= frontier - 2 * error and frontier > 0.2, (kl, frontier, error)
    assert (p.mean() - 0.5 * kl).item() == pytest.approx(0.5 * Z.log().mean().item(), abs=0.05)


# ----------------------------------------------------------------------------- step 0


def sampled(world, folder, monkeypatch, copies: int = 16, value: bool = False, **changes):
    """Rollouts of a world's reference to its prompts, and what they were made with."""
    world.use_small_vocabulary(monkeypatch)
    config = settings(world, folder, **changes)
    reference = load_model(config.checkpoint)
    prompts, *_ = load_prompts(config.prompts, "--prompts", 8, config.max_tokens, 0.0)
    prompts = [prompt for prompt in prompts for _ in range(copies)]
    policy = load_model(config.checkpoint)
    module = PolicyAndValue(policy, RewardModel.from_language_model(
        load_model(config.checkpoint), 0) if value else None).train()
    made = Reward(config.reward, "--reward", CPU, config.unstopped_score)
    return rlhf.roll_out(module, reference, made, prompts, (0,), config, RUN), module, config


def assert_starts_at_the_reference(config: RLHFConfig) -> None:
    """The first step has one update, whose ratios are all within 1e-6 of 1."""
    train(replace(config, max_steps=1, epochs=1, minibatches=1, clip_low=1e-6, clip_high=1e-6),
          CPU_LAUNCH)
    out = Path(config.out_dir)
    [first], vals = records(out), records(out, "val")
    for record in (first, vals[0]):
        assert record["kl"] == record["kl_k3"] == 0.0 and record["reward"] == record["score"]
    assert first["clip_fraction"] == 0.0 and first["grad_norm"] > 0.01
    assert vals[1]["kl"] != 0.0


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_the_policy_starts_at_the_reference(advantage, tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    assert_starts_at_the_reference(settings(TREE, tmp_path, advantage=advantage,
                                            micro_batch_size=3))


def test_the_value_model_has_its_own_clipping_and_learning_rate(tmp_path, monkeypatch):
    clipped, real = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: (
        clipped.append(limit), real(parameters, limit))[1])
    TREE.use_small_vocabulary(monkeypatch)
    train(settings(TREE, tmp_path, max_steps=1, epochs=1, minibatches=1, value_lr=0.0), CPU_LAUNCH)
    assert clipped == [1.0, 1.0]
    assert final_state(tmp_path / "out")["value"]["score.weight"].eq(0).all()


def test_a_validation_is_of_as_many_prompts_as_asked_for(tmp_path, monkeypatch):
    counts, real = [], rlhf.roll_out

    def roll_out(module, reference, reward, prompts, stream, *more):
        if stream[0] == 1:  # the validations' random streams
            counts.append(len(prompts))
        return real(module, reference, reward, prompts, stream, *more)

    monkeypatch.setattr(rlhf, "roll_out", roll_out)
    TREE.use_small_vocabulary(monkeypatch)
    for rows in (1, 2):
        train(settings(TREE, tmp_path, max_steps=1, val_fraction=0.6, eval_rows=rows,
                       out_dir=str(tmp_path / f"out{rows}")), CPU_LAUNCH)
    assert counts == [1, 1, 2, 2]


def test_a_dtype_without_sampling_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    monkeypatch.setattr("minigpt2.kernels.can_pack", lambda dtype=torch.float32: False)
    config = settings(TREE, tmp_path, dtype="bfloat16")
    assert "no bfloat16 sampling on this cpu" in user_error(train, config, CPU_LAUNCH)
    assert not Path(config.out_dir).exists()


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_the_checkpoint_is_read_once(advantage, tmp_path, monkeypatch, capsys):
    """A run in it that saves meanwhile must not make policy and reference differ. The value model
    recomputes its activations, too; without one, its settings are reported as ignored."""
    TREE.use_small_vocabulary(monkeypatch)
    loaded, values = [], []
    monkeypatch.setattr(rlhf, "load_gpt2", lambda *arguments, real=rlhf.load_gpt2: (
        loaded.append(arguments), real(*arguments))[1])
    monkeypatch.setattr(rlhf, "load_value_model", lambda *arguments, real=rlhf.load_value_model: (
        values.append(real(*arguments)), values[0])[1])
    policy = train(settings(TREE, tmp_path, advantage=advantage, max_steps=1,
                            activation_checkpointing=True), CPU_LAUNCH)
    assert len(loaded) == 1
    assert all(model is None or model.checkpoint_activations for model in (policy, *values))
    is_ignored = "--value-lr is ignored" in capsys.readouterr().out
    assert is_ignored == (advantage == "group") == (values == [None])


def test_dropout_in_a_folder_of_transformers_is_not_used(tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(
        vocab_size=6, n_positions=8, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.5,
        embd_pdrop=0.5, attn_pdrop=0.5)).save_pretrained(tmp_path / "reference")
    assert json.loads((tmp_path / "reference" / "config.json").read_text())["attn_pdrop"] == 0.5
    assert_starts_at_the_reference(settings(TREE, tmp_path))


def test_rollouts_are_what_the_training_function_sees(tmp_path, monkeypatch):
    """With gradients, in other batches, row by row: the same log-probabilities and values; of
    responses of different lengths, from the last token of the prompt on, ends included."""
    rollouts, module, _ = sampled(TREE, tmp_path, monkeypatch, value=True)
    lengths = [len(response.tokens) for response in rollouts.responses]
    assert set(lengths) == {1, 2, 3, 4} and rollouts.mask.sum(1).tolist() == lengths
    assert {response.finish_reason for response in rollouts.responses} == {"stop", "length"}
    for i, response in enumerate(rollouts.responses):
        inputs, targets = response_batch([(response.prompt, response.tokens)], 8, CPU)
        assert targets[targets != IGNORE_INDEX].tolist() == response.tokens
        assert targets[0, len(response.prompt) - 1] == response.tokens[0]
        assert (response.tokens[-1] == TREE.stop) == response.stopped
        assert TREE.stop not in response.tokens[:-1]
        new, values = module(inputs, targets).detach().unbind(1)
        torch.testing.assert_close(rollouts.logprobs[i, : lengths[i]], new, atol=1e-6, rtol=0)
        torch.testing.assert_close(rollouts.values[i, : lengths[i]], values, atol=1e-6, rtol=0)
        alone = logprobs(module.policy, *pad_rows([response.prompt + response.tokens]))
        torch.testing.assert_close(alone[0, len(response.prompt) - 1 :].detach(), new, atol=1e-6,
                                   rtol=0)
    outside = torch.stack([rollouts.logprobs, rollouts.ref_logprobs, rollouts.values])
    assert outside[:, ~rollouts.mask].abs().max() == 0 and rollouts.values.std() > 0.1
    assert torch.equal(rollouts.kl, torch.zeros(len(lengths)))


def test_scores_are_the_table_of_the_world(tmp_path, monkeypatch):
    rollouts, _, config = sampled(TREE, tmp_path, monkeypatch)
    for response, score in zip(rollouts.responses, rollouts.scores.tolist(), strict=True):
        row = TREE.rewards[TREE.prompts.index(tuple(response.prompt))]
        assert score == pytest.approx(row[TREE.responses.index(response.tokens)].item(), abs=1e-6)
    figures = rollouts.figures(config.kl_coef)
    stopped = [response.stopped for response in rollouts.responses]
    assert figures["stopped"] == sum(stopped) / len(stopped) and figures["entropy"] > 0
    assert figures["score"] == pytest.approx(rollouts.scores.mean().item())


def test_an_end_token_in_a_prompt_ends_nothing(tmp_path, monkeypatch):
    """Whether a response has stopped, and its score, depend on the response only."""
    world = replace(TREE, prompts=((TREE.stop, 2), (0, TREE.stop)))
    rollouts, *_ = sampled(world, tmp_path, monkeypatch)
    assert {len(response.tokens) for response in rollouts.responses} == {1, 2, 3, 4}
    for response, score in zip(rollouts.responses, rollouts.scores.tolist(), strict=True):
        assert response.stopped == (response.tokens[-1] == TREE.stop)
        row = world.rewards[world.prompts.index(tuple(response.prompt))]
        assert score == pytest.approx(row[world.responses.index(response.tokens)].item(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_ids_beyond_the_end_of_rows_change_nothing(advantage, tmp_path, monkeypatch):
    """Random ids for padding, in rollouts, scores of a reward model, and training."""
    TREE.use_small_vocabulary(monkeypatch)
    model = RewardModel.from_language_model(TREE.make_reference(), 0)
    config = settings(TREE, tmp_path, advantage=advantage, max_steps=3,
                      reward=str(save_checkpoint(tmp_path / "reward", 1, model)))
    train(config, CPU_LAUNCH)

    def random_padding(rows, block_size, device, real=pad_batch):
        ids, masks = real(rows, block_size, device)
        assert (masks == 0).any()
        return ids.where(masks.bool(), torch.randint_like(ids, 6)), masks

    monkeypatch.setattr("minigpt2.rewards.pad_batch", random_padding)
    train(replace(config, out_dir=str(tmp_path / "other")), CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "other")


# ------------------------------------------------------------------- sampling and prompts


def check_draws(folder, monkeypatch) -> None:
    """4,096 first tokens after one prompt against the probabilities of the training function: the
    0.999 quantile of chi-square with 5 degrees of freedom is 20.5."""
    one = replace(TREE, prompts=TREE.prompts[:1])
    rollouts, module, _ = sampled(one, folder, monkeypatch, copies=4096, max_tokens=1)
    drawn = torch.tensor([response.tokens[0] for response in rollouts.responses])
    counts = drawn.bincount(minlength=6)
    inputs, targets = response_batch([(list(one.prompts[0]), [i]) for i in range(6)], 8, CPU)
    expected = 4096 * module(inputs, targets)[:, 0].detach().double().exp()
    assert expected.sum().item() == pytest.approx(4096, rel=1e-5) and expected.min() > 5
    assert ((counts - expected).square() / expected).sum() < 20.5


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}],
                         ids=["right", "temperature", "top-k", "top-p"])
def test_samples_follow_the_distribution_that_is_trained(changes, tmp_path, monkeypatch):
    """And the check would find other ways to sample, which reach 0.96 to 0.99 of an optimum."""
    def other(model, ids, masks, temperature, max_steps, *, seed, real=rlhf.sample_responses):
        temperature = changes.get("temperature", temperature)
        cuts = {name: value for name, value in changes.items() if name != "temperature"}
        return generate(model, ids, masks, temperature, max_steps, seed=seed, **cuts)

    if not changes:
        return check_draws(tmp_path, monkeypatch)
    monkeypatch.setattr("inference.generate", other)
    with pytest.raises(AssertionError):
        check_draws(tmp_path, monkeypatch)


def check_targets() -> None:
    """Only the response is trained: of [7, 8 | 9, 3] and [5 | 3], as 2, 1 tokens."""
    inputs, targets = response_batch([([7, 8], [9, 3]), ([5], [3])], 5, CPU)
    assert inputs.tolist() == [[7, 8, 9, 3, 0], [5, 3, 0, 0, 0]]
    no = IGNORE_INDEX
    assert targets.tolist() == [[no, 9, 3, no, no], [3, no, no, no, no]]
    inputs, targets = response_batch([], 5, CPU)  # for a rank without a row
    assert inputs.shape == targets.shape and (targets == no).all()


def test_the_prompt_is_not_trained(monkeypatch):
    check_targets()
    monkeypatch.setattr("minigpt2.rewards.response_targets", lambda ids, starts, ends, real=(
        A.response_targets): real(ids, torch.zeros_like(starts), ends))
    with pytest.raises(AssertionError):
        check_targets()


def test_every_response_has_a_random_stream_of_its_own(tmp_path, monkeypatch):
    """Copies of a prompt differ, and so do two consecutive steps."""
    seeds = []
    monkeypatch.setattr("rlhf.sample_responses", lambda model, prompts, given, *rest, real=(
        rlhf.sample_responses), **options: (
            seeds.extend(given) or real(model, prompts, given, *rest, **options)))
    TREE.use_small_vocabulary(monkeypatch)
    train(settings(TREE, tmp_path, max_steps=3, eval_interval=1), CPU_LAUNCH)
    assert len(seeds) == 3 * 16 + 4  # and one held-out prompt before each step and at the end
    assert len(set(seeds)) == 3 * 16 + 1  # the validations draw alike


def test_an_epoch_visits_every_prompt_once():
    """In groups, and in an order of the seed."""
    prompts = [SimpleNamespace(ids=[i]) for i in range(10)]
    config = RLHFConfig(batch_size=12, group_size=3, seed=1)
    steps = [[prompt.ids[0] for prompt in rlhf.step_prompts(prompts, config, step)]
             for step in range(5)]
    assert all(step == [i for i in step[::3] for _ in range(3)] for step in steps)
    order = [i for step in steps for i in step[::3]]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10)) and order[:10] != order[10:]
    assert steps[0] != [prompt.ids[0] for prompt in rlhf.step_prompts(
        prompts, replace(config, seed=2), 0)]


# ----------------------------------------------------------------------- from rewards on


def rollouts_by_hand(config: RLHFConfig) -> rlhf.Rollouts:
    """Two responses to each of two prompts, of 3, 1, 2 and 2 tokens."""
    mask = A.response_mask(torch.zeros(4), torch.tensor([3, 1, 2, 2]), 3)
    log_ratios = torch.tensor([[1.0, -2, 0], [0, 0, 0], [0.5, 0.5, 0], [-1, 1, 0]])
    values = torch.tensor([[0.5, 0.4, 0.3], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    return rlhf.Rollouts([Response([0], [0], "stop")] * 4, torch.tensor([1.0, 0, 0.5, 0.5]), mask,
                         log_ratios - 2.0 * mask, -2.0 * mask, values, {})


def check_pipeline() -> None:
    """GAE: rewards [-.1, .2, 1], with KL .1 a nat, and values as in `test_advantages`; then the
    whitening of all 8 tokens. Group: scores minus .1 of the KL, which is -1, 0, 1, 0."""
    config = RLHFConfig(advantage="gae", group_size=2, gae_lambda=0.95)
    rollouts = rollouts_by_hand(config)
    assert rollouts.kl.tolist() == pytest.approx([-1, 0, 1, 0])
    figures = rollouts.figures(0.1)  # entropy: 8 tokens of 2 nats, less log ratios that sum to 0
    assert [figures[name] for name in ("entropy", "kl_k3", "response_tokens", "score_std")] == (
        pytest.approx([2.0, 1.51404, 2.0, 0.125 ** 0.5], abs=1e-4))
    found, returns, _ = rlhf.advantages_and_returns(rollouts, config, 0.1)
    raw = torch.tensor([[0.52675, 0.765, 0.7], [0, 0, 0], [0.3775, 0.45, 0], [0.48, 0.4, 0]])
    expected = ((raw - raw[rollouts.mask].mean()) / raw[rollouts.mask].std()).where(
        rollouts.mask, 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert returns[0].tolist() == pytest.approx([1.02675, 1.165, 1.0])
    torch.testing.assert_close(returns[1:], raw[1:])
    config = replace(config, advantage="group")
    found, _, figures = rlhf.advantages_and_returns(rollouts, config, 0.1)
    assert found.tolist() == [pytest.approx(row) for row in (
        [0.55, 0.55, 0.55], [-0.55, 0, 0], [-0.05, -0.05, 0], [0.05, 0.05, 0])]
    assert figures["dead_groups"] == 0.5


def test_advantages_of_a_step_by_hand():
    check_pipeline()


@pytest.mark.parametrize("advantage", ["gae", "group"])
def test_every_epoch_trains_every_token_once(advantage, tmp_path, monkeypatch):
    """The losses that are logged, from the tokens of each optimizer step: means over tokens, not of
    micro-batches; the first step is on-policy, later ones are not."""
    TREE.use_small_vocabulary(monkeypatch)
    calls, made = [], []

    def policy_loss(new, old, advantages, *bounds, real=A.policy_loss):
        calls.append((new.detach(), old, advantages))
        return real(new, old, advantages, *bounds)

    def advantages_and_returns(rollouts, *rest, real=rlhf.advantages_and_returns):
        made.append((rollouts, real(rollouts, *rest)))
        return made[-1][1]

    config = settings(TREE, tmp_path, advantage=advantage, max_steps=1, micro_batch_size=3,
                      max_lr=1e-2)
    monkeypatch.setattr(rlhf, "advantages_and_returns", advantages_and_returns)
    with monkeypatch.context() as patch:
        patch.setattr(A, "policy_loss", policy_loss)
        train(config, CPU_LAUNCH)
    [(rollouts, (advantages, *_))] = made
    assert len(calls) == 2 * 2 * 3  # epochs, minibatches of 8, micro-batches of at most 3
    updates = [[torch.cat(part) for part in zip(*calls[i : i + 3], strict=True)]
               for i in range(0, 12, 3)]
    tokens = sorted(zip(rollouts.logprobs[rollouts.mask].tolist(),
                        advantages[rollouts.mask].tolist(), strict=True))
    for first, second in (updates[:2], updates[2:]):
        assert tokens == sorted(pair for _, old, advantage in (first, second)
                                for pair in zip(old.tolist(), advantage.tolist(), strict=True))
    [record] = records(tmp_path / "out")
    for i, name in enumerate(("policy_loss", "clip_fraction")):
        expected = sum(A.policy_loss(*update, 0.2, 0.2)[i].mean().item() for update in updates) / 4
        assert record[name] == pytest.approx(expected, abs=1e-6), name
    changes = [(new - old).abs().max() for new, old, _ in updates]
    assert changes[0] < 1e-6 and min(changes[1:]) > 1e-3


def test_a_gradient_of_the_value_model_that_is_not_finite_skips_the_step(tmp_path, monkeypatch):
    """Even if its loss is finite, as after an overflow in float16."""
    TREE.use_small_vocabulary(monkeypatch)

    def value_loss(values, *rest, real=A.value_loss):
        return real(values, *rest) + (values - values.detach()).abs().sqrt()  # slope: NaN

    monkeypatch.setattr(A, "value_loss", value_loss)
    policy = train(settings(TREE, tmp_path, max_steps=1, epochs=1, minibatches=1), CPU_LAUNCH)
    [record] = records(tmp_path / "out")
    assert record["skipped"] == 1 and record["grad_norm"] is None
    assert weights_sha256(policy) == weights_sha256(TREE.make_reference())
    assert all(value.isfinite().all() for value in final_state(tmp_path / "out")["value"].values())


# --------------------------------------------------------------------------- ranks


def start(world_size: int, config: RLHFConfig, folder, **hooks) -> Ranks:
    return Ranks(world_size, "rlhf", flags(config), folder, small_vocabulary="T", **hooks)


def finished(world_size: int, config: RLHFConfig, folder, **hooks) -> None:
    ranks = start(world_size, config, folder, **hooks)
    assert ranks.wait() == [0] * world_size, ranks.output()


@pytest.mark.slow
def test_any_split_of_16_responses_gives_the_same_gradient(tmp_path):
    """Over micro-batches and real ranks, of policy and value model, in float32; of 1 to 4 tokens
    each: no mean of means. With micro-batches of 3 the last one of rank 1 is smaller, with 5 it is
    empty."""
    gradients = {}
    for world_size, B in ((1, 16), (1, 5), (1, 3), (1, 1), (2, 8), (2, 5), (2, 3)):
        folder = tmp_path / f"{world_size}x{B}"
        config = settings(TREE, tmp_path, max_steps=1, epochs=1, minibatches=1, grad_clip=0.0,
                          micro_batch_size=B, out_dir=str(folder / "out"))
        finished(world_size, config, folder, save_gradients=folder, start_value_head=0.5)
        for rank in range(world_size):
            gradients[world_size, B, rank] = torch.load(folder / f"gradients_{rank}.pt",
                                                        weights_only=True)
    expected = gradients.pop((1, 16, 0))
    policy, value = (sum(g.square().sum() for g in part) ** 0.5
                     for part in (expected[: len(expected) // 2], expected[len(expected) // 2 :]))
    size = max(gradient.abs().max() for gradient in expected)
    assert policy > 0.05 and value > 0.05
    for case, found in gradients.items():
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() < 1e-6 * max(1, size), case


def assert_close_curves(a, b, tolerance: float) -> None:
    for kind in ("train", "val"):
        for ours, theirs in zip(records(a, kind), records(b, kind), strict=True):
            assert ours.keys() == theirs.keys()
            for name in ours:
                if name not in ("kind", "mfu") and not name.endswith(("_seconds", "_per_sec")):
                    assert ours[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance
                                                       ), (ours["step"], name)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"advantage": "group"}, {"shard_optimizer": True}],
                         ids=["gae", "group", "sharded"])
def test_two_ranks_equal_one(tmp_path, changes):
    """The same responses, and the same rewards, losses and norms to 1e-5."""
    for world_size in (1, 2):
        config = settings(TREE, tmp_path, out_dir=str(tmp_path / f"out{world_size}"), max_steps=5,
                          micro_batch_size=5, eval_interval=2, max_lr=1e-3, **changes)
        finished(world_size, config, tmp_path / f"log{world_size}")
    a, b = (tmp_path / f"out{world_size}" for world_size in (1, 2))
    assert_close_curves(a, b, 1e-5)
    samples = [[json.loads(line)["response"] for line in (out / rlhf.SAMPLES).open()]
               for out in (a, b)]
    assert samples[0] == samples[1] and len(samples[0]) == 4
    assert len({record["score"] for record in records(a)}) > 1


# --------------------------------------------------------------------------- resume


def learned_reward(folder, **sizes) -> str:
    """The folder of a reward model for World T, with a context of its own."""
    model = RewardModel.from_language_model(GPT(GPTConfig(
        **{"block_size": 7, "vocab_size": 6, "n_layer": 1, "n_head": 4, "n_embd": 16} | sizes)), 0)
    return str(save_checkpoint(folder, 1, model))


@pytest.mark.slow
@pytest.mark.parametrize("world_size, advantage", [(1, "gae"), (2, "gae"), (1, "group")])
def test_a_run_killed_at_random_ends_bit_equal_to_an_uninterrupted_one(tmp_path, world_size,
                                                                       advantage):
    """With an adapted weight of the KL and, for gae, a value model that starts from the reward
    model. Killed once before its first checkpoint, then after random numbers of log records."""
    config = settings(TREE, tmp_path, advantage=advantage, save_interval=1, eval_interval=3,
                       max_steps=12, resume=True, kl_target=0.02, unstopped_score=-1.0,
                      reward=learned_reward(tmp_path / "reward"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    finished(world_size, replace(config, out_dir=str(whole)), tmp_path / "a")
    moments = sorted(random.Random(world_size).sample(range(2, num_records(whole) - 2), 4))
    for moment in (1, *moments):
        ranks = start(world_size, config, tmp_path / f"b{moment}")
        wait_until(lambda: num_records(out) >= moment, ranks)  # noqa: B023
        ranks.kill()
        assert ranks.wait() == [-9] * world_size, ranks.output()
    finished(world_size, config, tmp_path / "c")
    assert_same_run(out, whole)
    assert max(read_log(out / "metrics.jsonl")["run"]) > 0, "it never resumed"
    values = [final_state(folder)["value"] for folder in (out, whole)]
    assert (values[0] is None) == (advantage == "group")
    for name in values[0] or ():
        assert torch.equal(values[0][name], values[1][name])
    coefficients = [record["kl_coef"] for record in records(whole)]
    assert len(set(coefficients)) > 6 and final_state(whole)["progress"]["kl_coef"] != (
        config.kl_coef)
    samples = [{(record["step"], record["prompt"]): record for record in map(
        json.loads, (folder / rlhf.SAMPLES).open())} for folder in (out, whole)]
    assert samples[0] == samples[1]


@pytest.mark.slow
def test_another_number_of_ranks_resumes(tmp_path):
    """Two ranks, killed; then one. As one from the start, up to rounding."""
    config = settings(TREE, tmp_path, save_interval=1, eval_interval=2, resume=True, kl_target=0.02,
                      max_lr=1e-3)
    finished(1, replace(config, out_dir=str(tmp_path / "whole")), tmp_path / "a")
    ranks = start(2, config, tmp_path / "b")
    wait_until(lambda: num_records(tmp_path / "out") >= 8, ranks)
    ranks.kill()
    assert ranks.wait() == [-9, -9], ranks.output()
    finished(1, config, tmp_path / "c")
    assert len(read_log(tmp_path / "out" / "metrics.jsonl")["run"]) == 2
    assert_close_curves(tmp_path / "out", tmp_path / "whole", 1e-4)


@pytest.mark.slow
def test_the_reference_never_changes(tmp_path, monkeypatch):
    """And is the same after a resume, from its folder."""
    TREE.use_small_vocabulary(monkeypatch)
    seen = []

    def roll_out(module, reference, *rest, real=rlhf.roll_out):
        seen.append((weights_sha256(reference), weights_sha256(module.policy)))
        assert not any(p.requires_grad for p in reference.parameters())
        return real(module, reference, *rest)

    monkeypatch.setattr(rlhf, "roll_out", roll_out)
    config = settings(TREE, tmp_path, save_interval=2, max_lr=3e-2)
    train(replace(config), CPU_LAUNCH, StopAfter(40))
    steps = len(seen)
    train(replace(config, resume=True), CPU_LAUNCH)
    references, policies = map(set, zip(*seen, strict=True))
    assert references == {weights_sha256(load_model(config.checkpoint))} and steps < len(seen)
    assert len(policies) > 8


def test_a_signal_ends_a_run_after_a_micro_step_of_the_first_update(tmp_path, monkeypatch):
    """A step has four updates of two micro-steps; one that has made an update is completed."""
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, max_steps=3, micro_batch_size=4, kl_target=0.1,
                      out_dir=str(tmp_path / "whole"))
    train(config, CPU_LAUNCH)
    config = replace(config, out_dir=str(tmp_path / "out"), resume=True)
    for number, ran, steps in ((1, 1, 0), (8 + 1, 9, 1), (3, 8, 2)):
        assert stopped_in_micro_step(train, config, number) == (ran, steps)
    train(config, CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_at_any_instant_saves_and_the_run_resumes(tmp_path, monkeypatch, capsys):
    """In a validation, among samples, scores and updates."""
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, max_steps=3, eval_interval=2, out_dir=str(tmp_path / "whole"))
    train(config, CPU_LAUNCH)
    for count in (0, 1, 3, 5, 6, 8, 9, 12, 17):
        again = replace(config, out_dir=str(tmp_path / f"out{count}"))
        capsys.readouterr()
        train(again, CPU_LAUNCH, StopAfter(count))
        assert "SIGTERM: stopped after" in capsys.readouterr().out, count
        train(replace(again, resume=True), CPU_LAUNCH)
        assert_same_run(tmp_path / f"out{count}", tmp_path / "whole")


@pytest.mark.slow
def test_resume_refuses_another_reference_reward_or_prompts(tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, max_steps=2, reward=learned_reward(tmp_path / "reward"))
    train(config, CPU_LAUNCH)
    again = replace(config, resume=True)
    torch.manual_seed(5)
    other = str(save_checkpoint(tmp_path / "other", 1, GPT(TREE.make_reference().config)))
    (tmp_path / "more.jsonl").write_text(Path(config.prompts).read_text() + '{"prompt": "4 4"}\n')
    for changes, words in (
            ({"checkpoint": other}, "another reference (--checkpoint)"),
            ({"reward": learned_reward(tmp_path / "reward2")}, "another reward (--reward)"),
            ({"reward": "function:stops"}, "another reward (--reward)"),
            ({"prompts": str(tmp_path / "more.jsonl")}, "other data"),
            ({"unstopped_score": -2.0}, "--unstopped-score -1.0, not -2.0"),
            ({"group_size": 8}, "--group-size 4, not 8"),
            ({"advantage": "group"}, "--advantage gae, not group"),
            ({"kl_coef": 0.5}, "--kl-coef 0.2, not 0.5"),
            ({"epochs": 1}, "--epochs 2, not 1")):
        assert words in user_error(train, replace(again, **changes), CPU_LAUNCH)
    others = {"max_steps": 9, "batch_size": 8, "group_size": 2, "minibatches": 1, "max_tokens": 3,
              "unstopped_score": 0.5, "kl_target": 1.0, "seed": 2, "val_fraction": 0.01}
    fixed = {name for name in rlhf.FIXED_ON_RESUME if not name.endswith("sha256")}
    # Neither of the last two fits this run: its rows have different keys, and it uses gae
    assert fixed - others.keys() == {"advantage", "kl_coef", "epochs", "columns",
                                     "scale_advantages"}
    for name, value in others.items():
        message = user_error(train, replace(again, **{name: value}), CPU_LAUNCH)
        assert f"--{name.replace('_', '-')} {getattr(again, name)}, not {value}" in message
    copied = save_checkpoint(tmp_path / "copied", 7, load_model(config.checkpoint))
    train(replace(again, checkpoint=str(copied)), CPU_LAUNCH)  # the same weights elsewhere


@pytest.mark.slow
def test_a_changed_file_of_a_reward_function_is_refused(tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    path = tmp_path / "mine.py"
    path.write_text("def score(row, response):\n    return len(response)\n")
    config = settings(TREE, tmp_path, max_steps=1, reward=f"{path}:score")
    train(config, CPU_LAUNCH)
    path.write_text("def score(row, response):\n    return -len(response)\n")
    message = user_error(train, replace(config, resume=True), CPU_LAUNCH)
    assert "another reward (--reward)" in message


@pytest.mark.slow
def test_the_checkpoint_of_another_script_is_refused(tmp_path, monkeypatch):
    """Of dpo.py, with settings that allow both: it has no value model."""
    W.use_small_vocabulary(monkeypatch)
    rows = [*W.preference_rows()[:40], W.held_out_row()]
    config = settings(W, tmp_path, epochs=1, resume=True,
                      prompts=str(write_rows(tmp_path / "pairs.jsonl", rows)))
    shared = ("checkpoint", "out_dir", "batch_size", "val_fraction", "seed", "device")
    dpo.train(dpo.DPOConfig(data=config.prompts, **{
        name: getattr(config, name) for name in shared}), CPU_LAUNCH)
    for advantage in ("gae", "group"):
        message = user_error(train, replace(config, advantage=advantage), CPU_LAUNCH)
        assert "was trained with another script" in message


@pytest.mark.slow
def test_the_frontier_of_runs(tmp_path, monkeypatch, capsys):
    """Also without a KL; runs of other tasks and other logs are refused."""
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, max_steps=2, eval_interval=1, reward="function:stops",
                      unstopped_score=0.0)
    outs = [tmp_path / name for name in "abc"]
    for out, changes in zip(outs, ({}, {"kl_coef": 0.0}, {"max_tokens": 3}), strict=True):
        train(replace(config, out_dir=str(out), **changes), CPU_LAUNCH)

    def argv(*runs) -> list:
        return [*map(str, runs), "--out", str(tmp_path / "f.png"), "--samples", "4"]

    templates = []  # of the prompts that the reference answers
    monkeypatch.setattr(plot_frontier, "shared_template", lambda path: f"{path}: {{instruction}}")
    monkeypatch.setattr(plot_frontier, "load_prompts",
                        lambda *options: templates.append(options[5]) or load_prompts(*options))
    monkeypatch.setattr("sys.argv", ["plot_frontier.py", *argv(*outs[:2])])
    plot_frontier.main()
    assert templates == [f"{config.checkpoint}: {{instruction}}"]
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    *printed, _ = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("b: success")
    again = [*argv(*outs[:2]), "--out", str(tmp_path / "g.png"), "--successes"]
    with monkeypatch.context() as patch:
        patch.setattr(plot_frontier, "weights_sha256", lambda model: "of another model")
        message = main_error(plot_frontier.main, argv(outs[0]), patch, capsys)
    assert f"the checkpoint {config.checkpoint} has changed since the run" in message
    monkeypatch.setattr(plot_frontier, "load_model", None)  # no checkpoint is needed
    monkeypatch.setattr("sys.argv", ["plot_frontier.py", *again, str(tmp_path / "f.json")])
    plot_frontier.main()
    assert capsys.readouterr().out.splitlines()[:-1] == printed[-2:]
    log = outs[0] / "metrics.jsonl"  # a KL that was not finite is null
    records = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(record | {"kl": None} if (
        record["kind"] == "val" and record["step"] == 1) else record) + "\n" for record in records))
    plot_frontier.main()
    assert capsys.readouterr().out.splitlines()[:-1] == printed[-2:]
    for wrong in ("[]", "[2]", "[[0.5]]", '["a"]', "{"):
        (tmp_path / "wrong.json").write_text(wrong)
        assert "--successes" in main_error(
            plot_frontier.main, [*again, str(tmp_path / "wrong.json")], monkeypatch, capsys)
    message = main_error(plot_frontier.main, argv(outs[0], outs[2]), monkeypatch, capsys)
    assert "max_tokens 3" in message
    message = main_error(plot_frontier.main, argv(outs[0] / rlhf.SAMPLES), monkeypatch, capsys)
    assert "is not the log of a run of rlhf.py" in message
    (tmp_path / "f.json").write_text('{"results": {}}')  # a report, not estimates
    assert f"the file beside --out, {tmp_path / 'f.json'}" in main_error(
        plot_frontier.main, argv(outs[0]), monkeypatch, capsys)


def test_the_best_policy_by_hand():
    """p* = p0 e / (1 - p0 + p0 e); without a KL all weight is on successes."""
    kl, p = plot_frontier.best_policy(np.array([0.1]), 0.5)
    assert p == pytest.approx(0.451, abs=1e-3) and kl == pytest.approx(0.408, abs=1e-3)
    assert plot_frontier.best_policy(np.array([0.1, 0.0, 1.0]), 0.0) == pytest.approx(
        (math.log(10) / 3, 2 / 3))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("changes, words", [
    ({"kl_target": 6.0, "kl_coef": 0.0}, "--kl-target adapts --kl-coef, which is 0"),
    ({"advantage": "group", "group_size": 1}, "groups of at least 2"),
    ({"batch_size": 15}, "--batch-size 15: expected at least 2, a multiple of --group-size 4"),
    ({"batch_size": 1, "group_size": 1}, "--batch-size 1"),
    ({"scale_advantages": True}, "gae cannot be scaled"),
    ({"minibatches": 17}, "--batch-size 16: expected at least 2"),
    ({"unstopped_score": math.nan}, "--unstopped-score is nan"),
    ({"reward": "function:nonsense"}, "function:nonsense: KeyError"),
    ({"reward": "function:equals"}, "rows have none, the first is prompts.jsonl line 1"),
    ({"reward": "function:at_most_words"}, "needs an argument"),
    ({"reward": "function:at_most_words=many"}, "ValueError: invalid literal"),
    ({"reward": "{folder}/no.py:score"}, "no.py"),
    ({"reward": "{folder}/mine.py:other"}, "has no function 'other'"),
    ({"reward": "{folder}/mine.py:number"}, "has no function 'number'"),
    ({"reward": "{folder}/broken.py:score"}, "broken.py:score: SyntaxError"),
    ({"reward": "{folder}/nowhere"}, "nowhere"),
    ({"reward": "{folder}/reference"}, "is a language model, expected a reward model"),
    ({"checkpoint": "{folder}/model"}, "is a reward model, expected a language model"),
    ({"max_lr": 0.0, "value_lr": 1e-4, "advantage": "gae"}, "--max-lr is 0, whose schedule"),
    ({"prompts": "{folder}/none.json"}, "none.json (No such file"),
    ({"prompts": "{folder}/empty.json"}, "0 prompts of 0 rows"),
    ({"prompts": "{folder}/bad.json"}, "row 1"),
    ({"max_tokens": 8}, "5 without room for 8 tokens in a context of 8): lower --max-tokens"),
    ({"out_dir": "{folder}/reference/step_000001"}, "is itself a checkpoint")])
def test_bad_settings_are_one_line(changes, words, tmp_path, monkeypatch, capsys):
    """Through the command line: exit status 2, and nothing is written."""
    TREE.use_small_vocabulary(monkeypatch)
    (tmp_path / "mine.py").write_text("number = 3\n\ndef score(row, response):\n    return 1\n")
    (tmp_path / "broken.py").write_text("def score(:\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.json").write_text('[{"text": "a"}]')
    learned_reward(tmp_path / "model")
    changes = {name: value.format(folder=tmp_path) if isinstance(value, str) else value
               for name, value in changes.items()}
    config = settings(TREE, tmp_path, **changes)
    assert words in main_error(main_of(rlhf), flags(config), monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("body, value", [
    ("return float('nan')", "nan"), ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ("return 'good'", "TypeError: "), ("return None", "TypeError: "),
    ("return row['label']", "KeyError: 'label'"), ("return -math.inf", "-inf"),
    ("raise ValueError('no answer\\nin it')", "ValueError: no answer"),
    ("import subprocess; subprocess.run('false', check=True)", "CalledProcessError: Command 'fal")])
def test_what_a_reward_function_must_not_do(body, value, tmp_path, monkeypatch):
    """The run stops with the row and the text, and the user's file is named."""
    TREE.use_small_vocabulary(monkeypatch)
    path = tmp_path / "mine.py"
    path.write_text("import math\n\n\ndef score(row, response):\n    if response == '3 1':\n"
                    f"        {body}\n    return 0\n")
    responses = [Response([2], tokens, "stop") for tokens in ([3, 0, 5], [3, 1, 5], [3, 1, 5])]
    rows, *_ = load_prompts(str(TREE.write_prompts(tmp_path / "prompts.jsonl")), "--prompts", 8, 4,
                            0.0)
    message = user_error(Reward(f"{path}:score", "--reward", CPU), responses, rows, CPU_LAUNCH,
                         torch.float32)
    assert f"the reward function {path}:score gives " in message and value in message
    assert "'3 1 5', a response to prompts.jsonl line 2" in message


@pytest.mark.slow
def test_a_reward_function_that_raises_on_one_rank_ends_all(tmp_path):
    """One line, from the rank that asked it, and no rank waits for the other."""
    path = tmp_path / "mine.py"
    path.write_text("import os\n\n\ndef score(row, response):\n"
                    "    return 1 / (1 - int(os.environ['RANK']))\n")
    config = settings(TREE, tmp_path, reward=f"{path}:score", batch_size=64)
    ranks = start(2, config, tmp_path / "log", constants=NO_WAIT)
    codes = ranks.wait(60)
    assert codes[1] == 2 and codes[0] not in (None, 0), (codes, ranks.output())
    assert "ZeroDivisionError: division by zero" in ranks.output(1)
    assert not any("Traceback" in ranks.output(rank) for rank in range(2)), ranks.output()


def test_a_score_that_is_not_finite_stops_the_run_naming_row_and_text(tmp_path, monkeypatch):
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, reward=learned_reward(tmp_path / "reward"))
    real = RewardModel.forward

    def forward(self, ids, masks):
        is_poisoned = (ids[:, :3] == torch.tensor([2, 1, 5])).all(1)
        return real(self, ids, masks).masked_fill(is_poisoned, math.nan)

    monkeypatch.setattr(RewardModel, "forward", forward)
    message = user_error(train, config, CPU_LAUNCH)
    assert message.startswith("the score of '1 5', a response to prompts.jsonl line 2, is nan")


# --------------------------------------------------------------------- models and a whole run


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"block_size": 7}, {"block_size": 12}, {
    "block_size": 8, "n_embd": 32, "n_layer": 2, "n_head": 4}], ids=["shorter", "longer", "heads"])
def test_a_reward_model_of_other_sizes_is_the_value_model(sizes, tmp_path, monkeypatch):
    """With its own trunk and a head of 0 at first; a resumed run continues with it."""
    TREE.use_small_vocabulary(monkeypatch)
    config = settings(TREE, tmp_path, max_steps=4, save_interval=1, keep_last=0,
                      reward=learned_reward(tmp_path / "reward", **sizes))
    train(replace(config, out_dir=str(tmp_path / "whole")), CPU_LAUNCH)
    train(config, CPU_LAUNCH, StopAfter(25))
    assert 0 < len(records(tmp_path / "out")) < 4
    train(replace(config, resume=True), CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert records(tmp_path / "whole")[0]["explained_variance"] == pytest.approx(0, abs=1e-6)


def stopping_model(folder, p_stop: float) -> Path:
    """A checkpoint with GPT-2's vocabulary that ends each response with about this probability."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(96, N_VOCAB, 1, 2, 8))
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1)  # a constant in every hidden state
        model.transformer.wte.weight[EOT_TOKEN] = math.log(N_VOCAB * p_stop / (1 - p_stop)) / 8
    return save_checkpoint(folder, 1, model)


ROWS = [{"instruction": f"Name {n} animals.", "input": "", "output": "cat " * n}
        for n in range(1, 9)]


def test_the_number_of_steps_is_max_steps_as_in_pre_training():
    """The earlier name of the flag is accepted too."""
    for words in ([], ["--max-steps", "7"], ["--steps", "7"]):
        config = parse_config(RLHFConfig, words, description="")
        assert config.max_steps == (7 if words else 200)


@pytest.mark.slow
def test_the_command_line_with_a_function_of_a_file(rows_file, tmp_path):
    """All files of a run, and the rewards of the user's function: the length of the text."""
    (tmp_path / "mine.py").write_text(
        "def length(row, response):\n    assert row['output'].startswith('cat')\n"
        "    return min(len(response), 100) / 100\n")
    base = stopping_model(tmp_path / "base", 0.3)
    out = tmp_path / "out"
    result = run_script(
        ROOT / "rlhf.py", "--checkpoint", base, "--reward", f"{tmp_path / 'mine.py'}:length",
        "--prompts", rows_file, "--out-dir", out, "--max-steps", 2, "--batch-size", 8,
        "--group-size", 2, "--max-tokens", 6, "--val-fraction", "0.2", "--device", "cpu",
        "--eval-interval", 1)
    assert "8 prompts of 8 rows (left out: 0 repeated" in result.stdout
    assert "2 steps of 8 responses, 2 per prompt" in result.stdout
    assert "finished 2 steps" in result.stdout and (out / "step_000002").is_dir()
    assert (out / "rlhf_reward.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / rlhf.SAMPLES).open(encoding="utf-8")]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    stopped = [sample for sample in samples if sample["finish_reason"] == "stop"]
    assert stopped and len(stopped) < len(samples)
    for sample in samples:
        text = sample["response"].removesuffix("<|endoftext|>")
        expected = min(len(text), 100) / 100 if sample in stopped else 0.0
        assert sample["score"] == pytest.approx(expected, abs=1e-6)
    assert set(records(out)[0]) >= {
        "score", "score_std", "reward", "kl", "kl_k3", "kl_coef", "entropy", "stopped",
        "response_tokens", "policy_loss", "value_loss", "clip_fraction", "explained_variance",
        "grad_norm", "lr", "rollout_seconds", "score_seconds", "update_seconds"}
