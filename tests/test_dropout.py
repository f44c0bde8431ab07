"""Dropout: GPT-2's places, nothing at 0, evaluation mode everywhere but in training steps, and runs
that resume exactly, on one and two ranks."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.common import CPU_LAUNCH, STORIES, main_error, main_of, write_rows
from helpers.ranks import Ranks
from helpers.training import (
    StopAfter,
    assert_same_model,
    assert_same_run,
    curves,
    flags,
    interrupted,
    losses,
    tiny,
)

import dpo
import evaluate
import finetune
import inference
import judge
import model as model_module
import reward
import rlhf
import trainer
from minigpt2.checkpoint import load_model, save_checkpoint, weights_sha256
from minigpt2.config import run_main
from minigpt2.metrics import read_log
from minigpt2.rewards import RewardModel
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=8)
ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(24)]
PAIRS = [{"prompt": f"Say {n}.", "chosen": "yes " * (1 + n % 3), "rejected": "no"}
         for n in range(24)]
TOKENS = torch.randint(0, 500, (3, 12), generator=torch.Generator().manual_seed(1))
WITH_DROPOUT = dataclasses.replace(SIZES, dropout=0.25)


def new_model(config: GPTConfig = SIZES, model_class=GPT) -> GPT:
    torch.manual_seed(0)
    return model_class(config)


def loss_of(model: GPT) -> torch.Tensor:
    torch.manual_seed(5)
    return model(TOKENS, TOKENS.roll(-1, 1), return_logits=False)[1]


# ------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, math.nan, math.inf])
def test_impossible_dropout_is_refused(value, monkeypatch, capsys):
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(dropout=value)
    for script in (trainer, finetune, reward):
        assert "--dropout is" in main_error(main_of(script), ["--dropout", value], monkeypatch,
                                            capsys)


def test_without_dropout_no_random_number_is_drawn_and_nothing_changes(monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("dropout")

    assert GPTConfig().dropout == 0 and "dropout" not in repr(WITH_DROPOUT)
    before, state = loss_of(new_model().eval()), torch.get_rng_state()
    monkeypatch.setattr(torch.nn.functional, "dropout", refused)
    for model in (new_model().train(), new_model(WITH_DROPOUT).eval()):
        assert torch.equal(loss_of(model), before)
        assert torch.equal(torch.get_rng_state(), state)
        assert weights_sha256(model) == weights_sha256(new_model())
    with pytest.raises(AssertionError):
        loss_of(new_model(WITH_DROPOUT).train())


def pattern(x: torch.Tensor, p: float, training: bool = True, inplace: bool = False):
    """Dropout with a mask that depends on the shape alone."""
    mask = torch.arange(x.numel()).mul(7919).remainder(101).view(x.shape) >= 101 * p
    return x * mask / (1 - p) if training and p else x


def attention(q, k, v, is_causal, dropout_p=0.0):
    hidden = torch.ones(q.size(2), k.size(2)).triu(1).bool()
    scores = (q @ k.mT / math.sqrt(q.size(3))).masked_fill(hidden, -math.inf).softmax(-1)
    return pattern(scores, dropout_p) @ v


@pytest.mark.slow
def test_the_places_are_those_of_hugging_face(tmp_path, monkeypatch):
    """Both with the same masks: after the embeddings, on attention probabilities, after both
    projections. Each place counts, and 0.25 is what Hugging Face reads in our config.json."""
    from transformers import GPT2LMHeadModel
    model = new_model(WITH_DROPOUT).train()
    folder = save_checkpoint(tmp_path, 1, model)
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").train()
    config = theirs.config
    assert config.embd_pdrop == config.resid_pdrop == config.attn_pdrop == 0.25
    monkeypatch.setattr(torch.nn.functional, "dropout", pattern)
    monkeypatch.setattr(model_module, "attention", attention)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        assert torch.allclose(model(TOKENS)[0], expected, atol=1e-5)
        for kind, part in (("drop", theirs.transformer.drop),
                           ("attn", theirs.transformer.h[0].attn.attn_dropout),
                           ("resid", theirs.transformer.h[1].attn.resid_dropout),
                           ("mlp", theirs.transformer.h[0].mlp.dropout)):
            part.p = 0.0
            assert not torch.allclose(theirs(TOKENS).logits, expected, atol=1e-4), kind
            part.p = 0.25


def test_dropout_leaves_the_mean_and_drops_its_share():
    module = SimpleNamespace(dropout=0.25, training=True)
    torch.manual_seed(0)
    found = model_module.dropout(torch.ones(100_000), module)
    assert found.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert found.mean().item() == pytest.approx(1, abs=0.01)
    attended = F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 2), is_causal=True,
                                              dropout_p=0.25)
    assert set(attended.flatten().tolist()) != {1.0}  # on a CPU, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_have_the_same_masks(dtype):
    found = []
    for recompute in (False, True):
        model = new_model(WITH_DROPOUT).train()
        model.checkpoint_activations = recompute
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = loss_of(model)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters())])
    for ours, other in zip(*found, strict=True):
        assert torch.allclose(ours, other, rtol=1e-5, atol=1e-7)


def test_a_loaded_configuration_brings_no_dropout(tmp_path):
    """Hugging Face's default is 0.1."""
    folder = save_checkpoint(tmp_path, 1, new_model())
    config = json.loads((folder / "config.json").read_text())
    assert [config[f"{place}_pdrop"] for place in ("embd", "resid", "attn")] == [0.0] * 3
    (folder / "config.json").write_text(json.dumps(config | {
        "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}))
    (folder / "SHA256SUMS").unlink()
    assert load_model(folder).config == SIZES
    assert load_model(folder, dropout=0.25).config == WITH_DROPOUT
    again = save_checkpoint(tmp_path, 2, load_model(folder, dropout=0.25))
    assert json.loads((again / "config.json").read_text())["attn_pdrop"] == 0.25
    value = RewardModel.from_language_model(load_model(folder, dropout=0.25), 0)
    assert value.config.dropout == 0.25


# ---------------------------------------------------------------- evaluation mode, by script


@pytest.fixture
def modes(monkeypatch) -> set[tuple[bool, bool]]:
    """(a module with dropout is in training mode, gradients are computed) of all forward passes."""
    found, real = set(), GPT.hidden_states

    def hidden_states(self, *arguments, **options):
        parts = {part.training for part in self.modules() if hasattr(part, "dropout")}
        found.update((training, torch.is_grad_enabled()) for training in parts)
        return real(self, *arguments, **options)

    monkeypatch.setattr(GPT, "hidden_states", hidden_states)
    return found


BOTH = {(True, True), (False, False)}  # training steps; all else


@pytest.fixture
def files(tmp_path):
    save_checkpoint(tmp_path / "base", 1, new_model())
    save_checkpoint(tmp_path / "reward", 1, new_model(model_class=RewardModel))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "hellaswag.jsonl", STORIES)
    return tmp_path


def options(files, data: str, **changes) -> dict:
    return {"checkpoint": str(files / "base"), "data": str(files / data), "batch_size": 8,
            "out_dir": str(files / "out"), "micro_batch_size": 4, "eval_interval": 1,
            "save_interval": 1, "val_fraction": 0.2, "epochs": 1, "max_lr": 1e-3, "device": "cpu",
            **changes}


def tune(files, **changes) -> None:
    finetune.train(finetune.FinetuneConfig(**options(files, "rows.jsonl", **changes)), CPU_LAUNCH)


def train_reward(files, **changes) -> None:
    config = options(files, "pairs.jsonl", **{"max_tokens": 4} | changes)
    reward.train(reward.RewardConfig(**config), CPU_LAUNCH)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pre_training_evaluates_without_dropout(corpus, files, modes, checkpointing):
    config = tiny(corpus, files / "out", dropout=0.2, sample_tokens=2, hellaswag_interval=2,
                  eval_interval=2, hellaswag=str(files / "hellaswag.jsonl"), max_steps=4,
                  activation_checkpointing=checkpointing)
    model = trainer.train(config, CPU_LAUNCH)
    assert modes == BOTH and not model.training
    assert read_log(files / "out" / "metrics.jsonl")["run"][0]["dropout"] == 0.2
    assert (files / "out" / "samples.jsonl").exists()


def test_fine_tuning_evaluates_without_dropout(files, modes):
    tune(files, dropout=0.2)
    assert modes == BOTH


def test_the_reward_model_scores_without_dropout(files, modes):
    train_reward(files, dropout=0.2)
    assert modes == BOTH


def test_dpo_evaluates_in_evaluation_mode(files, modes):
    dpo.train(dpo.DPOConfig(**options(files, "pairs.jsonl")), CPU_LAUNCH)
    assert modes == BOTH


@pytest.mark.parametrize("advantage", ["gae", "group"])
@pytest.mark.parametrize("model", ["reward", "function:stops"])
def test_rollouts_and_rewards_are_in_evaluation_mode(files, modes, advantage, model):
    """Also those of a value and a reward model."""
    config = options(files, "", reward=model if ":" in model else str(files / model), max_steps=2,
                     prompts=str(files / "rows.jsonl"), group_size=2, max_tokens=2,
                     advantage=advantage)
    del config["data"]
    rlhf.train(rlhf.RLHFConfig(**config), CPU_LAUNCH)
    assert modes == BOTH


def test_scripts_that_only_read_checkpoints_are_in_evaluation_mode(files, modes, monkeypatch,
                                                                   capsys):
    save_checkpoint(files / "base", 2, new_model(WITH_DROPOUT))
    write_rows(files / "choices.jsonl", [{"context": "A", "choices": ["b", "c"], "label": 0}])
    for script, argv in (
            (inference, ["--checkpoint", files / "base", "Hi", "--max-steps", "2"]),
            (evaluate, [files / "base", "--tasks", files / "choices.jsonl"]),
            (judge, [files / "base", "--proxy", files / "reward", "--data", files / "rows.jsonl",
                     "--out-dir", files / "judge", "--val-fraction", "0.2", "--max-response",
                     "2"])):
        modes.clear()
        monkeypatch.setattr("sys.argv", ["script.py", *map(str, [*argv, "--device", "cpu"])])
        with pytest.raises(SystemExit) as stopped:
            run_main(script.main)
        assert stopped.value.code == 0 and modes == {(False, False)}, script.__name__


def test_only_scripts_for_which_it_makes_sense_have_the_flag():
    names = {script.__name__ for script in (trainer, finetune, reward, dpo, rlhf) for config in
             vars(script).values() if isinstance(config, type) and dataclasses.is_dataclass(config)
             and config.__module__ == script.__name__
             and "dropout" in {field.name for field in dataclasses.fields(config)}}
    assert names == {"trainer", "finetune", "reward"}


# ------------------------------------------------------------------------------ resumed runs


@pytest.mark.parametrize("changes", [
    {}, {"activation_checkpointing": True}, {"dtype": "bfloat16"},
    {"micro_batch_size": "auto"}], ids=str)
def test_a_resumed_run_repeats_its_dropout(corpus, tmp_path, changes, monkeypatch):
    """Also after samples and trials of micro-batches, which an uninterrupted run makes elsewhere;
    as the log shows, every step has its own masks."""
    monkeypatch.setattr("minigpt2.faults.on_cpu", lambda device: False)
    config = functools.partial(tiny, corpus, dropout=0.3, sample_tokens=2, **changes)
    trainer.train(config(tmp_path / "whole"), CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "out", 5)
    trainer.train(config(tmp_path / "out", resume=True), CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_activation_checkpointing_changes_no_loss(corpus, tmp_path):
    for name in ("plain", "recomputed"):
        trainer.train(tiny(corpus, tmp_path / name, dropout=0.3,
                           activation_checkpointing=name == "recomputed"), CPU_LAUNCH)
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-6)


def test_dropout_changes_the_losses_of_training_but_not_the_first_validation(
        corpus, tmp_path, finished_run, capsys):
    trainer.train(tiny(corpus, tmp_path / "out", dropout=0.3), CPU_LAUNCH)
    ours, plain = curves(tmp_path / "out"), curves(finished_run)
    assert ours["val"][0] == plain["val"][0] and ours["val"][10] != plain["val"][10]
    assert all(ours["train"][step]["loss"] != plain["train"][step]["loss"] for step in range(10))
    config = json.loads((tmp_path / "out" / "step_000010" / "config.json").read_text())
    assert config["resid_pdrop"] == 0.3
    trainer.train(tiny(corpus, tmp_path / "out", resume=True, max_steps=11), CPU_LAUNCH)
    assert "--resume: dropout was 0.3, is now 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("script", [finetune, reward], ids=["finetune", "reward"])
def test_a_stopped_run_on_rows_resumes_exactly(files, script):
    config_class, data = ((finetune.FinetuneConfig, "rows.jsonl") if script is finetune else
                          (reward.RewardConfig, "pairs.jsonl"))
    more = {} if script is finetune else {"max_tokens": 2, "normalize_samples": 4}
    config = functools.partial(options, files, data, dropout=0.3, epochs=2, **more)
    script.train(config_class(**config(out_dir=str(files / "whole"))), CPU_LAUNCH)
    script.train(config_class(**config()), CPU_LAUNCH, StopAfter(12))
    assert not (files / "out" / "step_000006").exists()
    script.train(config_class(**config(resume=True)), CPU_LAUNCH)
    assert curves(files / "out") == curves(files / "whole")
    model_class = GPT if script is finetune else RewardModel
    assert_same_model(*(load_model(files / out, model_class=model_class)
                        for out in ("out", "whole")))


def masks(folder, rank: int) -> dict[int, list[float]]:
    """step -> the first mask of every micro-step, as a number."""
    found = {}
    for line in (folder / f"masks_{rank}.jsonl").read_text().splitlines():
        step, mask = json.loads(line)
        found.setdefault(step, []).append(mask)
    return found


@pytest.mark.slow
def test_two_ranks_have_different_masks_and_resume_exactly(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "whole", dropout=0.3, micro_batch_size=2)
    seen = {}
    for name in ("whole", "out"):
        if name == "out":
            interrupted(tmp_path / "whole", tmp_path / "out", 5)
        folder = tmp_path / f"ranks_{name}"
        config = dataclasses.replace(config, out_dir=str(tmp_path / name), resume=name == "out")
        ranks = Ranks(2, "trainer", flags(config), folder, record_dropout=folder)
        assert ranks.wait() == [0, 0], ranks.output()
        seen[name] = [masks(folder, rank) for rank in (0, 1)]
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    numbers = [mask for rank in seen["whole"] for step in rank.values() for mask in step]
    assert len(numbers) == len(set(numbers)) == 2 * 10 * 2  # ranks, steps, micro-steps
    for whole, resumed in zip(*seen.values(), strict=True):
        assert resumed == {step: whole[step] for step in range(5, 10)}


@pytest.mark.slow
def test_losses_at_several_world_sizes_agree_up_to_the_noise_of_masks(files):
    """At a learning rate of 0, a step's loss depends on its rows and masks alone. The mean losses
    of 1, 2 and 4 ranks differ by less than 4 standard errors, and these are less than a fourth of
    what dropout adds."""
    tune(files, out_dir=str(files / "tuned"), max_lr=1e-2, epochs=16, eval_interval=1000,
         save_interval=1000)

    def step_losses(name: str, world_size: int, dropout: float) -> torch.Tensor:
        config = finetune.FinetuneConfig(**options(
            files, "rows.jsonl", checkpoint=str(files / "tuned"), out_dir=str(files / name),
            epochs=12, max_lr=0.0, micro_batch_size=2, dropout=dropout, eval_interval=1000,
            save_interval=1000))
        ranks = Ranks(world_size, "finetune", flags(config), files / f"ranks_{name}")
        assert ranks.wait() == [0] * world_size, ranks.output()
        return torch.tensor(losses(files / name), dtype=torch.float64)

    none, one = step_losses("none", 1, 0.0), step_losses("one", 1, 0.5)
    for world_size in (2, 4):
        found = step_losses(f"ranks{world_size}", world_size, 0.5)
        differences = found - one
        error = differences.std().item() / len(differences) ** 0.5
        assert 0 < differences.mean().abs().item() < 4 * error < (one - none).mean().item() / 4
