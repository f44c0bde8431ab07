"""dpo.py, reward.py and rlhf.py against TRL's trainers, on the same weights and token ids: losses
and scores of DPO and the reward model within 1e-5, the loss of GRPO within 1e-4. PAIRS_FILE and
REFEREE_CHECKPOINT, environment variables, select real pairs and another checkpoint."""

import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
from helpers.common import CPU_LAUNCH
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dataloader import load_pairs
from dpo import DPOConfig, figure_sums, pair_logprobs
from minigpt2.advantages import group_advantages, preference_loss, whiten
from minigpt2.checkpoint import load_model, save_checkpoint
from minigpt2.distributed import keep_freed_memory
from minigpt2.faults import StopRequest
from minigpt2.preferences import Pair, sequences
from minigpt2.rewards import RewardModel, score_rows
from minigpt2.sampling import Response
from minigpt2.tokenizer import ALPACA
from model import GPT, GPTConfig
from rlhf import PolicyAndValue, RLHFConfig, Rollouts, optimize

trl = pytest.importorskip("trl", reason="pip install -r requirements-referees.txt")
Dataset = pytest.importorskip("datasets").Dataset  # comes with trl

WORDS = "the a river king dog ran slept café naïve it's 1984 Maximiliana\n\n  - quickly".split(" ")
PAIRS = 64
RUN = SimpleNamespace(launch=CPU_LAUNCH, stop=StopRequest(), dtype=torch.float32,
                      micro_batch_size=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model whose logits are as far apart as those of a trained one."""
    if given := os.environ.get("REFEREE_CHECKPOINT"):
        return given
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=2, n_head=2, n_embd=32))
    model.transformer.wte.weight.data *= 10
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), 1, model)


@pytest.fixture(scope="module")
def pairs(checkpoint, tmp_path_factory) -> list[Pair]:
    """64 pairs, of PAIRS_FILE or made up: responses of 1 to 60 words, some with white space at
    their ends."""
    path = os.environ.get("PAIRS_FILE")
    if not path:
        rng = random.Random(0)

        def text(high: int) -> str:
            return " ".join(rng.choices(WORDS, k=rng.randint(1, high))) + rng.choice(["", "\n"])

        rows = [{"instruction": f"{i} {text(20)}", "input": text(9) * (i % 2),
                 "chosen": f"{text(60)} {i}", "rejected": f"The {text(60)}"} for i in range(80)]
        path = tmp_path_factory.mktemp("pairs") / "rows.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
    block_size = load_model(checkpoint).config.block_size
    return load_pairs(str(path), "--data", block_size, ALPACA)[0][:PAIRS]


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    """The same change for the same names, in transformers and here: a policy after some steps."""
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        if parameter.dim() == 1:  # vectors have the same layout in both
            generator = torch.Generator().manual_seed(i)
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def trainer_of(base: type, config: type, tmp_path, model, rows: list[dict], options: dict,
               **settings):
    """A trainer that takes rows of ids as they are: TRL encodes prompt and response together."""
    class OnIds(base):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset

    keep_freed_memory()  # TRL holds all logits of a batch, several times
    settings = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none",
                      per_device_train_batch_size=len(rows), gradient_checkpointing=False,
                      **settings)
    return OnIds(model=model, args=settings, train_dataset=Dataset.from_list(rows), **options)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_loss_of_dpo_equals_trls(checkpoint, pairs, tmp_path, beta):
    policy, reference = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
                         for _ in range(2))
    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            for pair in pairs]
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, tmp_path, perturbed(policy), rows,
                         {"ref_model": reference,
                          "processing_class": AutoTokenizer.from_pretrained(checkpoint)},
                         max_length=None, beta=beta)
    with torch.no_grad():  # in parts: TRL holds all logits of a batch, here 16 GB
        expected = [trainer._compute_loss(trainer.model, trainer.data_collator(rows[i : i + 8]),
                                          False).item() for i in range(0, PAIRS, 8)]

    ref = pair_logprobs(load_model(checkpoint), [pairs], RUN)
    found = pair_logprobs(perturbed(load_model(checkpoint)), [pairs], RUN)
    logprobs, ref_logprobs = (torch.tensor([row[pair.place] for pair in pairs])
                              for row in (found, ref))  # (R, 2)
    assert len(pairs) == PAIRS and (logprobs - ref_logprobs).abs().mean() > 0.3  # it has moved
    loss, accuracy, *_ = (figure_sums(logprobs, pairs, ref, DPOConfig(beta=beta)) / PAIRS).tolist()
    assert loss == pytest.approx(sum(expected) / 8, abs=1e-5)
    metrics = trainer._metrics["train" if trainer.model.training else "eval"]
    assert accuracy == pytest.approx(sum(metrics["rewards/accuracies"]) / 8, abs=1e-6)


def test_scores_and_loss_of_a_reward_model_equal_trls(checkpoint, pairs, tmp_path):
    model = RewardModel.from_language_model(load_model(checkpoint), seed=0)
    folder = save_checkpoint(tmp_path / "reward", 1, model)
    referee = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    ids = sequences(pairs)
    rows = [{"chosen_ids": chosen, "rejected_ids": rejected}
            for chosen, rejected in zip(ids[::2], ids[1::2], strict=True)]
    trainer = trainer_of(trl.RewardTrainer, trl.RewardConfig, tmp_path, referee, rows,
                         {"processing_class": AutoTokenizer.from_pretrained(folder)},
                         max_length=None)
    batch = trainer.data_collator(rows)  # in this order: all chosen, then all rejected
    with torch.no_grad():
        expected, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)

    scores = score_rows(load_model(folder, model_class=RewardModel), ids, ["a row"] * len(ids),
                        CPU_LAUNCH, torch.float32, 7)
    scores = torch.as_tensor(scores, dtype=torch.float64)
    theirs = outputs.logits[:, 0].double().view(2, -1)  # (2, R)
    assert torch.allclose(scores.view(-1, 2).t(), theirs, rtol=0, atol=1e-5)
    loss = preference_loss(scores[::2] - scores[1::2]).mean().item()
    assert loss == pytest.approx(expected.item(), abs=1e-5) and scores.std() > 0.05


# ------------------------------------------------------------------------ policy optimization

GROUP_SIZE, GROUPS = 4, 4


def some_groups(pairs: list[Pair]) -> list[Response]:
    """GROUPS prompts with GROUP_SIZE responses each, of two pairs. All prompts are cut to one
    length, because TRL pads them on the left, which shifts GPT-2's positions."""
    n = min(len(pair.prompt) for pair in pairs)
    return [Response(first.prompt[-n:], tokens, "stop")
            for first, second in zip(pairs[:GROUPS], pairs[1:], strict=False)
            for tokens in (first.chosen, first.rejected, second.chosen, second.rejected)]


# Both types of loss are means over the tokens of the batch
@pytest.mark.parametrize("loss_type, scale, clip_high", [("dapo", False, 0.2),
                                                         ("bnpo", True, 0.28)])
def test_advantages_loss_and_gradient_of_grpo_equal_trls(checkpoint, pairs, tmp_path, loss_type,
                                                         scale, clip_high):
    responses = some_groups(pairs)
    R, generator = len(responses), torch.Generator().manual_seed(0)
    scores = torch.rand(R, generator=generator)
    prompts = [{"prompt": "any"}] * R
    trainer = trainer_of(
        trl.GRPOTrainer, trl.GRPOConfig, tmp_path,
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), prompts,
        {"reward_funcs": lambda **_: scores.tolist(), "processing_class":
         AutoTokenizer.from_pretrained(checkpoint), "rollout_func": lambda *_: {
             "prompt_ids": [one.prompt for one in responses],
             "completion_ids": [one.tokens for one in responses], "logprobs": None}},
        num_generations=GROUP_SIZE, beta=0.0, epsilon=0.2, epsilon_high=clip_high,
        loss_type=loss_type, scale_rewards="group" if scale else "none")
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(prompts)
    # TRL's, from before the change, for both
    mask, ids = batch["completion_mask"].bool(), batch["completion_ids"]  # (R, T)
    with torch.no_grad():
        old, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([batch["prompt_ids"], ids], 1),
            torch.cat([batch["prompt_mask"], mask], 1), ids.size(1), batch_size=8)  # (R, T)
    perturbed(trainer.model).zero_grad()
    expected = trainer._compute_loss(trainer.model, batch | {"old_per_token_logps": old})
    expected.backward()

    advantages = group_advantages(scores, GROUP_SIZE, scale)  # (R,)
    assert torch.allclose(advantages, batch["advantages"], rtol=0, atol=1e-6)
    old, policy, logged = old * mask, perturbed(load_model(checkpoint)), {}
    rollouts = Rollouts(responses, scores, mask, old, old, torch.zeros_like(old), {})
    run = SimpleNamespace(
        launch=CPU_LAUNCH, model=policy, trained=policy.config, step=0, dtype=torch.float32,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        micro_steps=iter, stopping=False, pace=SimpleNamespace(),
        finish_step=lambda loss, *, sums, **figures: logged.update(sums))
    optimize(PolicyAndValue(policy, None), rollouts, advantages[:, None] * mask,
             torch.zeros_like(old), RLHFConfig(
                 advantage="group", epochs=1, minibatches=1, micro_batch_size=5,
                 clip_low=0.2, clip_high=clip_high), run, 0.0, {"reward": 0.0})
    assert logged["policy_loss"].item() == pytest.approx(expected.item(), abs=1e-4)
    assert 0.01 < logged["clip_fraction"] < 0.99 and abs(expected.item()) > 1e-3
    for name in ("wte", "ln_f"):
        ours, theirs = (model.get_submodule(f"transformer.{name}").weight.grad
                        for model in (policy, trainer.model))
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_whitened_advantages_equal_trls():
    from trl.experimental.ppo.ppo_trainer import masked_whiten
    generator = torch.Generator().manual_seed(0)
    x = 3 + 5 * torch.randn(16, 40, generator=generator)
    mask = torch.rand(16, 40, generator=generator) < 0.6
    assert torch.allclose(whiten(x, mask)[mask], masked_whiten(x, mask)[mask], rtol=0, atol=1e-6)
