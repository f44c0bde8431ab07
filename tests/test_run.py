"""minigpt2/run.py serves scripts that do not exist yet, and what it gives them all."""

import contextlib
import dataclasses

import pytest
import torch
from helpers import toy_script
from helpers.common import CPU_LAUNCH, ROOT, user_error
from helpers.ranks import Ranks, wait_until
from helpers.toy_script import ToyConfig
from helpers.training import assert_same_run, final_state
from torch._dynamo.testing import CompileCounter

import dpo
import finetune
import reward
import rlhf
import trainer
from minigpt2 import run
from minigpt2.checkpoint import list_checkpoints
from minigpt2.distributed import Launch
from minigpt2.faults import StopRequest
from minigpt2.metrics import read_log
from minigpt2.resume import check_settings
from minigpt2.run import RunConfig
from model import GPT, GPTConfig

TINY = GPTConfig(block_size=8, vocab_size=32, n_layer=1, n_head=1, n_embd=8)
ARGV = ["--device", "cpu", "--steps", "40", "--save-interval", "2", "--eval-interval", "4",
        "--resume"]


def toy(out_dir, **changes) -> ToyConfig:
    return ToyConfig(**{"out_dir": str(out_dir), "device": "cpu", "steps": 12, "eval_interval": 5,
                        "save_interval": 5} | changes)


def test_the_toy_script_is_short():
    assert len((ROOT / "tests/helpers/toy_script.py").read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_new_script_resumes_exactly_after_kills(tmp_path, world_size):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    ranks = Ranks(world_size, "toy", [*ARGV, "--out-dir", str(whole)], tmp_path / "ranks")
    assert ranks.wait() == [0] * world_size, ranks.output()
    losses = [record["loss"] for record in read_log(whole / "metrics.jsonl")["train"].values()]
    assert losses[-1] < losses[0] / 2  # it learns
    for kill in range(1, 5):
        ranks = Ranks(world_size, "toy", [*ARGV, "--out-dir", str(out)], tmp_path / f"ranks_{kill}")
        wait_until(lambda: any(int(path.name[5:]) >= 7 * kill  # noqa: B023
                               for path in list_checkpoints(out)), ranks)
        ranks.kill()
        assert ranks.wait() == [-9] * world_size, ranks.output()
    last = Ranks(world_size, "toy", [*ARGV, "--out-dir", str(out)], tmp_path / "last")
    assert last.wait() == [0] * world_size, last.output()
    assert_same_run(whole, out)
    assert max(read_log(out / "metrics.jsonl")["run"]) > 0, "it never resumed"


def test_losses_do_not_depend_on_the_micro_batch(tmp_path):
    losses = []
    for size in (1, 2, 8):
        toy_script.train(toy(tmp_path / str(size), micro_batch_size=size), CPU_LAUNCH)
        log = read_log(tmp_path / str(size) / "metrics.jsonl")["train"]
        losses.append([record["loss"] for record in log.values()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] == pytest.approx(losses[2], abs=1e-6)


def test_what_a_run_logs_and_writes(tmp_path, capsys):
    toy_script.train(toy(tmp_path / "out"), CPU_LAUNCH)
    log = read_log(tmp_path / "out" / "metrics.jsonl")
    assert sorted(log["val"]) == [0, 5, 10, 12] and sorted(log["train"]) == list(range(12))
    assert set(log["train"][3]) == {"step", "kind", "loss", "lr", "grad_norm", "rows",
                                    "tokens_per_sec", "mfu"}
    assert log["train"][3]["rows"] == 8 and log["train"][3]["tokens_per_sec"] > 0
    assert set(log["end"][12]) == {"step", "kind", "seconds", "overhead_s"}
    assert 0 < log["end"][12]["overhead_s"] < log["end"][12]["seconds"]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [
        "step_000005", "step_000010", "step_000012"]
    assert (tmp_path / "out" / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "finished 12 steps, validation loss" in capsys.readouterr().out


def test_a_signal_saves_and_skips_the_graph(tmp_path, capsys):
    with StopRequest() as stop:
        stop.name = "SIGTERM"
        toy_script.train(toy(tmp_path / "out"), CPU_LAUNCH, stop)
    assert "SIGTERM: stopped after 0 of 12 steps" in capsys.readouterr().out
    assert final_state(tmp_path / "out")["progress"]["step"] == 0
    assert not (tmp_path / "out" / "toy.png").exists()


def test_a_run_is_not_resumed_past_its_end_or_over_another(tmp_path):
    config = toy(tmp_path / "out")
    toy_script.train(config, CPU_LAUNCH)
    assert "already holds a run" in user_error(toy_script.train, config, CPU_LAUNCH)
    shorter = dataclasses.replace(config, resume=True, steps=6)
    assert "raise --steps" in user_error(toy_script.train, shorter, CPU_LAUNCH)
    other = dataclasses.replace(config, resume=True, seed=2)
    assert "--seed 1337, not 2" in user_error(toy_script.train, other, CPU_LAUNCH)


def test_all_training_scripts_share_the_flags_of_a_run():
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    for config in (trainer.TrainerConfig, finetune.FinetuneConfig, reward.RewardConfig,
                   dpo.DPOConfig, rlhf.RLHFConfig):
        assert issubclass(config, RunConfig)
        assert {field.name for field in dataclasses.fields(config)} > shared


@pytest.mark.parametrize("script, fixed", [
    (trainer, "optimizer n_layer n_head n_embd block_size total_batch_size sequence_length seed "
              "data_sha256 eval_tokens"),
    (finetune, "template columns batch_size epochs val_fraction seed data_sha256"),
    (reward, "columns batch_size epochs val_fraction val_start seed data_sha256 reference_sha256"),
    (dpo, "beta label_smoothing length_normalized batch_size epochs val_fraction columns seed "
          "data_sha256 reference_sha256")])
def test_what_no_resumed_run_may_change(script, fixed):
    assert sorted(script.FIXED_ON_RESUME) == sorted(fixed.split())


@pytest.mark.parametrize("name", ["total_batch_size", "n_embd", "label_smoothing"])
def test_any_setting_that_is_fixed_is_refused(tmp_path, name):
    saved, now = {"facts": {"label": "x", name: 1}}, {"label": "x", name: 2}
    check_settings(tmp_path, saved, now, ("seed",), CPU_LAUNCH)
    message = user_error(check_settings, tmp_path, saved, now, ("seed", name), CPU_LAUNCH)
    assert f"--{name.replace('_', '-')} 1, not 2" in message


def test_every_flag_of_a_run_reaches_what_it_names(monkeypatch):
    groups = finetune.FinetuneConfig(weight_decay=0.5, max_lr=1.0).make_optimizer(
        GPT(TINY), False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert all((group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8) for group in groups)
    monkeypatch.setattr(run, "launched", lambda *given: asked.append(given) or (
        contextlib.nullcontext(CPU_LAUNCH)))
    monkeypatch.setattr("sys.argv", ["x.py", "--device", "cpu", "--deterministic"])
    asked = []
    with pytest.raises(SystemExit):
        run.run_training(RunConfig, lambda *given: None, "")
    assert asked == [("cpu", True)]


def test_ranks_whose_gpus_pick_another_dtype_are_refused(tmp_path, monkeypatch):
    """Of GPUs of two kinds: gradients in bfloat16 would be averaged with scaled ones in float16."""
    def gather(self, facts):
        return [facts, facts | {"--dtype": "torch.float16"}]

    monkeypatch.setattr(Launch, "gather", gather)
    message = user_error(toy_script.train, toy(tmp_path / "out"), CPU_LAUNCH)
    assert "--dtype differs: 'torch.float32' on rank 0, 'torch.float16' on rank 1" in message
    assert not (tmp_path / "out").exists()


def test_in_the_second_step_no_rank_stops_before_the_first_forward_pass(tmp_path, monkeypatch):
    """There DDP rebuilds its buckets, a collective: a rank that stops would leave the others
    waiting in it. In other steps only the last micro-step is one."""
    class Wrapped(torch.nn.Module):  # as DDP does
        def __init__(self, model, _):
            super().__init__()
            self.module = model

        def forward(self, *arguments, **options):
            return self.module(*arguments, **options)

        def no_sync(self):
            return contextlib.nullcontext()

    choices = []
    monkeypatch.setattr("minigpt2.distributed.data_parallel", Wrapped)
    monkeypatch.setattr(Launch, "first_choice", lambda self, name, choice: (
        choices.append((name, choice)), choice)[1])
    toy_script.train(toy(tmp_path / "out", micro_batch_size=4, steps=3), CPU_LAUNCH)
    assert choices == [("step 0", ""), ("step 0", "go"), ("step 1", "go"), ("step 1", "go"),
                       ("step 2", ""), ("step 2", "go")]


def test_compiling_needs_no_more_than_torch_2_11(tmp_path, monkeypatch):
    """torch.compile takes recompile_limit since 2.13 only; up to 26 shapes occur."""
    def compile(model=None, *, fullgraph=False, dynamic=None, backend="inductor", mode=None,
                options=None, disable=False):
        limits.append(torch._dynamo.config.recompile_limit)
        assert dynamic is False
        return model

    limits = []
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(torch, "compile", compile)
    toy_script.train(toy(tmp_path / "out", compile=True), CPU_LAUNCH)
    assert limits == [64]


def test_only_the_training_step_is_compiled(tmp_path, monkeypatch):
    """Validations in eager mode, of any shape; the weights are those of an eager run."""
    counter, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(
        self, backend=counter, **options))
    compiled = toy_script.train(toy(tmp_path / "compiled", compile=True), CPU_LAUNCH)
    assert counter.frame_count >= 1
    eager = toy_script.train(toy(tmp_path / "eager"), CPU_LAUNCH)
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
