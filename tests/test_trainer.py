"""trainer.py: the numbers of a run, what it writes, resume, devices, and bad settings."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import signal
import sys
import timeit

import pytest
import torch
from helpers.common import (
    CPU_LAUNCH,
    ROOT,
    STORIES,
    TINY_FLAGS,
    main_error,
    main_of,
    make_corpus,
    make_foreign,
    run_to_end,
    run_torchrun,
    user_error,
    write_rows,
)
from helpers.ranks import NO_WAIT, Ranks
from helpers.training import (
    SCRIPT,
    STEPS,
    assert_same_model,
    assert_same_run,
    final_state,
    flags,
    interrupted,
    losses,
    signal_at_the_end_of_a_step,
    stopped_in_micro_step,
    tiny,
    tiny_corpus,
    trace,
)
from torch._dynamo.testing import CompileCounter
from torch.distributed import HashStore

import finetune
import inference
import trainer
from bench.train import make_training
from dataloader import TokenLoader
from minigpt2 import benchmarks, resume, run
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state
from minigpt2.config import parse_config
from minigpt2.distributed import (
    Launch,
    mean_loss,
    pick_device,
    pick_dtype,
    read_launch,
    start,
    use_fastest_exact_matmul,
)
from minigpt2.faults import StopRequest
from minigpt2.metrics import read_log
from minigpt2.optimizer import set_lr as real_set_lr
from trainer import TrainerConfig, train

SMALL_RUN_TIME = "about 9 minutes on two cores"  # of the small run in the docs

# ------------------------------------------------------------------- losses and gradients


@pytest.fixture
def reference_trace(corpus):
    """(loss, gradient norm, lr) of ten steps of Hugging Face's model under plain AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1337)
    ours = trainer.GPT(trainer.model_config(tiny(corpus, "")))
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2,
                                       embd_pdrop=0, resid_pdrop=0, attn_pdrop=0))
    with torch.no_grad():
        for (name, theirs), p in zip(model.named_parameters(), ours.parameters(), strict=True):
            theirs.copy_(p.t() if "c_" in name and p.dim() == 2 else p)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1},
                                   {"params": rest, "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), eps=1e-8)
    loader = TokenLoader(corpus, "train", sequence_length=16, micro_batch_size=8,
                         total_batch_size=128, vocab_size=50257, seed=1337)
    steps = []
    for step in range(STEPS):
        if step < 3:
            lr = 1e-2 * (step + 1) / 3
        else:
            lr = 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - 3) / 7)) * 9e-3
        inputs, targets = loader.batch(step, 0)
        logits = model(inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        steps.append((loss.item(), norm.item(), lr))
    return steps


def test_ten_steps_match_hugging_face(finished_run, reference_trace):
    got = trace(finished_run, "loss", "grad_norm", "lr")
    assert len(got) == STEPS
    for (loss, norm, lr), (their_loss, their_norm, their_lr) in zip(got, reference_trace,
                                                                    strict=True):
        assert abs(loss - their_loss) < 1e-4 and abs(norm - their_norm) < 1e-4
        assert lr == pytest.approx(their_lr, rel=1e-9)
    assert got[-1][0] < got[0][0] - 0.5


def test_golden_trace(finished_run):
    """The committed losses of the same ten steps: changed by a change of any default or formula."""
    golden = json.loads((ROOT / "tests" / "golden_trace.json").read_text())
    got = trace(finished_run, "loss", "grad_norm", "lr")
    for step, expected in zip(got, golden, strict=True):
        assert step == pytest.approx(tuple(expected), abs=1e-4)


@pytest.mark.slow
def test_gradients_are_reduced_once_a_step_and_overlap_with_backward(corpus, tmp_path):
    """Two micro-steps a step: every byte of the gradients is reduced once, and the first buckets
    while later gradients are still being computed. Beside them, two floats are reduced."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=1, total_batch_size=64, max_steps=3,
                  eval_tokens=16, n_layer=7, n_embd=64)  # blocks of more than one bucket of 1 MB
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks",
                  record_collectives=tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    parameters = list(load_model(tmp_path / "out").parameters())
    for rank in (0, 1):
        lines = (tmp_path / "ranks" / f"collectives_{rank}.jsonl").read_text().splitlines()
        steps, sizes = [[]], []
        for event in map(json.loads, lines):
            if "bucket" in event:
                steps[-1].append(event)
            elif event["elements"] == 1:  # the loss, which ends a step
                steps.append([])
            elif event["elements"] not in {b["bytes"] // 4 for b in steps[-1]}:  # a bucket's own
                sizes.append(event["elements"])
        assert steps.pop() == [] and len(steps) == 3
        for buckets in steps:
            assert [bucket["bucket"] for bucket in buckets] == list(range(len(buckets)))
            assert sum(b["bytes"] for b in buckets) == 4 * sum(p.numel() for p in parameters)
        for buckets in steps[1:]:  # in the first, DDP learns the order of the gradients
            assert len(buckets) > 1 and buckets[0]["ready"] < len(parameters)
        assert sizes == [3, 3]  # of two validations: loss, targets, stop request


@pytest.mark.slow
def test_gradients_lie_in_the_buckets_in_every_micro_step(corpus, tmp_path):
    """Those accumulated under `no_sync` would otherwise be a second copy, beside DDP's buckets."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, max_steps=3, n_embd=64)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks",
                  record_gradients=tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    num_bytes = 4 * load_model(tmp_path / "out").num_parameters()
    for rank in (0, 1):
        lines = (tmp_path / "ranks" / f"gradients_{rank}.jsonl").read_text().splitlines()
        micro_steps = list(map(json.loads, lines))
        assert len(micro_steps) == 2 * 3
        for first, last in zip(micro_steps[::2], micro_steps[1::2], strict=True):
            assert first["gradients"] == last["buckets"] == last["gradients"]
            assert sum(first["gradients"].values()) == num_bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_steps_match_plain_pytorch(dtype, monkeypatch):
    """The trainer's loss and fused AdamW against PyTorch with all logits and its default AdamW, as
    bench/train.py compares them, at a small size."""
    monkeypatch.setattr("minigpt2.distributed.keep_freed_memory", lambda: None)
    before = torch.get_float32_matmul_precision()
    tokens = torch.randint(50, (20 * 65,), generator=torch.Generator().manual_seed(0))
    sizes = trainer.GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32)

    def losses_of(way: str, seed: int = 0) -> torch.Tensor:
        step = make_training(way, sizes, (2, 32), dtype, tokens, seed)
        return torch.tensor([step() for _ in range(20)])

    ours = losses_of("ours")
    torch.set_float32_matmul_precision(before)
    plain, other = losses_of("textbook"), losses_of("textbook", seed=1)
    assert plain[-1] < plain[0]
    difference = ((ours - plain) / plain).abs().max()
    assert difference < (1e-5 if dtype == torch.float32 else
                         min(5e-3, ((other - plain) / plain).abs().max()))


def test_a_processor_that_rounds_float32_products_is_detected(monkeypatch):
    use_fastest_exact_matmul()
    assert torch.get_float32_matmul_precision() in ("medium", "highest")
    a, b = torch.randn(2, 128, 128)
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() < 2e-6 * exact.norm()
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b, real=torch.Tensor.__matmul__:
                        real(a.bfloat16(), b.bfloat16()).to(a.dtype)
                        if a.dtype == torch.float32 else real(a, b))
    use_fastest_exact_matmul()
    assert torch.get_float32_matmul_precision() == "highest"


# ----------------------------------------------------------------------- the fast recipe

FAST = {"optimizer": "muon", "schedule": "linear", "zero_init": True, "min_lr": 0.0}


def test_the_fast_recipe_learns_and_resumes_exactly(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "whole", **FAST, keep_last=0)
    model = train(config, CPU_LAUNCH)
    values = losses(tmp_path / "whole")
    assert values[-1] < values[0] - 1  # it learns
    rates = [lr for lr, in trace(tmp_path / "whole", "lr")]
    assert rates[2] == rates[3] == 1e-2
    drop = rates[3] - rates[4]
    assert drop > 0 and rates[-2] - rates[-1] == pytest.approx(drop)  # a straight line
    interrupted(tmp_path / "whole", tmp_path / "again", 5)
    again = train(dataclasses.replace(config, out_dir=str(tmp_path / "again"), resume=True),
                  CPU_LAUNCH)
    assert losses(tmp_path / "again") == values
    assert_same_model(model, again)


@pytest.mark.slow
def test_the_fast_recipe_does_not_depend_on_the_world_size(corpus, tmp_path):
    one = tiny(corpus, tmp_path / "one", **FAST)
    train(one, CPU_LAUNCH)
    two = dataclasses.replace(one, out_dir=str(tmp_path / "two"))
    ranks = Ranks(2, "trainer", flags(two), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_learning_rates_that_the_optimizer_cannot_use_are_refused(corpus, tmp_path, finished_run):
    config = tiny(corpus, tmp_path / "out")
    message = user_error(train, dataclasses.replace(config, muon_lr=1e-3), CPU_LAUNCH)
    assert "--muon-lr" in message and "--optimizer muon" in message
    message = user_error(train, dataclasses.replace(config, optimizer="muon", max_lr=0.0),
                         CPU_LAUNCH)
    assert "--max-lr is 0" in message
    shutil.copytree(finished_run, tmp_path / "out")
    other = dataclasses.replace(config, optimizer="muon", resume=True)
    assert "--optimizer adamw" in user_error(train, other, CPU_LAUNCH)


def test_the_fast_recipe_starts_with_identity_blocks(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "set_lr", lambda optimizer, lr: real_set_lr(optimizer, 0.0))
    model = train(tiny(corpus, tmp_path / "out", **FAST, max_steps=1), CPU_LAUNCH)
    idx = torch.randint(50257, (2, 8))
    expected = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(8))
    assert torch.equal(model.hidden_states(idx), model.transformer.ln_f(expected))


def test_defaults_are_gpt2_on_fineweb():
    config = TrainerConfig()
    assert (config.total_batch_size, config.micro_batch_size, config.sequence_length) == (
        2**19, 32, 1024)
    assert (config.beta1, config.beta2, config.weight_decay, config.grad_clip) == (
        0.9, 0.95, 0.1, 1.0)
    assert (config.max_lr, config.min_lr, config.warmup_steps) == (6e-4, 6e-5, 715)
    assert config.max_steps is None and config.eval_tokens == 10_485_760
    assert trainer.model_config(config) == trainer.GPTConfig()
    medium = dataclasses.replace(config, preset="gpt2-medium")
    assert trainer.model_config(medium).n_layer == 24


@pytest.mark.parametrize("world_size, windows", [(1, 512), (2, 256), (6, None), (8, 64)])
def test_a_micro_batch_divides_a_ranks_share_of_a_step(world_size, windows):
    launch, config = Launch(0, world_size, torch.device("cpu")), TrainerConfig()
    auto = dataclasses.replace(config, micro_batch_size="auto")
    if windows is None:  # 512 windows do not divide by 6
        message = user_error(trainer.micro_batch_sizes, auto, launch)
        assert message.endswith(f"--total-batch-size {85 * 6 * 1024}")
    else:
        assert trainer.micro_batch_sizes(config, launch) == [32]
        sizes = trainer.micro_batch_sizes(auto, launch)
        largest = min(windows, 128)
        assert sizes == [largest >> n for n in range(largest.bit_length())]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_losses_do_not_depend_on_the_micro_batch(corpus, tmp_path, finished_run, micro_batch_size):
    train(tiny(corpus, tmp_path / "out", micro_batch_size=micro_batch_size), CPU_LAUNCH)
    assert losses(tmp_path / "out") == pytest.approx(losses(finished_run), abs=1e-5)


@pytest.mark.slow
def test_two_processes_match_one(corpus, tmp_path, finished_run):
    """torchrun, gloo and the command line."""
    out = tmp_path / "out"
    run_torchrun(2, SCRIPT, *flags(tiny(corpus, out, micro_batch_size=2)))
    assert losses(out) == pytest.approx(losses(finished_run), abs=1e-5)
    validation = [read_log(folder / "metrics.jsonl")["val"] for folder in (finished_run, out)]
    for step in (0, 5, 10):
        assert validation[0][step]["loss"] == pytest.approx(validation[1][step]["loss"], abs=1e-5)
    for p, q in zip(load_model(finished_run).parameters(), load_model(out).parameters(),
                    strict=True):
        assert torch.allclose(p, q, atol=1e-4)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + STEPS + 3 + 1  # only rank 0 writes


def set_launch(monkeypatch, **changes) -> None:
    """Sets the variables of a rank that torchrun started, with changes; None: not set."""
    complete = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1234"}
    for name, value in (complete | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


ONLY = dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])


@pytest.mark.parametrize("changes", [
    ONLY | {"RANK": "1"}, ONLY | {"RANK": ""}, ONLY | {"WORLD_SIZE": "2"}, ONLY | {"RANK": "0"},
    ONLY | {"LOCAL_RANK": "1"}, ONLY | {"WORLD_SIZE": ""},
    {"RANK": "2"}, {"RANK": "-1"}, {"RANK": None}, {"RANK": "one"}, {"WORLD_SIZE": "0"},
    {"WORLD_SIZE": None}, {"LOCAL_RANK": None}, {"LOCAL_RANK": ""}, {"LOCAL_RANK": "1"},
    {"MASTER_ADDR": None}, {"MASTER_ADDR": ""}, {"MASTER_PORT": None}, {"MASTER_PORT": "x"},
    {"MASTER_PORT": "70000"}])
@pytest.mark.parametrize("script", [trainer, finetune])
def test_incomplete_launch_variables_are_refused(tmp_path, monkeypatch, capsys, script, changes):
    """RANK=1 alone trained to the end and saved nothing; others were a traceback."""
    set_launch(monkeypatch, **changes)
    monkeypatch.setattr("minigpt2.config.RANK_DELAY_S", 0)
    message = main_error(main_of(script), ["--out-dir", tmp_path / "out"], monkeypatch, capsys)
    for name, value in changes.items():
        assert (f"{name!r}: {value!r}" in message) is (value is not None)
    assert "torchrun" in message and not (tmp_path / "out").exists()


def test_complete_launch_variables(monkeypatch):
    set_launch(monkeypatch, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    assert read_launch() == (5, 1, 8, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "x")
    assert "launch variables" in user_error(read_launch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_launch() == (5, 1, 8, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    set_launch(monkeypatch, **ONLY | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert read_launch() == (0, 0, 1, 1)
    set_launch(monkeypatch, **ONLY | {"MASTER_ADDR": "x", "MASTER_PORT": ""})
    assert read_launch() == (0, 0, 1, 1)


def test_rank_is_not_local_rank(monkeypatch):
    set_launch(monkeypatch, RANK="11", LOCAL_RANK="3", WORLD_SIZE="16")
    monkeypatch.setattr("minigpt2.distributed.dist.init_process_group",
                        lambda *arguments, **options: None)
    store = HashStore()
    monkeypatch.setattr("minigpt2.distributed.dist.TCPStore", lambda *address, **options: store)
    for rank in range(16):
        store.set(f"first/backend/{rank}", "gloo")
    monkeypatch.setattr("minigpt2.distributed.agree_on_attempt",
                        lambda store, rank, world_size: "first")
    picked = []
    monkeypatch.setattr("minigpt2.distributed.pick_device", lambda device, local_rank, ranks: (
        picked.append(local_rank) or torch.device("cpu")))
    launch = start("cpu")
    assert (launch.rank, launch.world_size, picked) == (11, 16, [3])
    assert not launch.is_master
    store.set("first/backend/7", "nccl")  # its group would wait for the others until the timeout
    assert "only some ranks have a usable GPU" in user_error(start, "auto")


def test_max_steps_defaults_to_one_epoch(corpus, tmp_path, capsys):
    train(tiny(corpus, tmp_path / "out", max_steps=None, total_batch_size=256, eval_interval=100),
          CPU_LAUNCH)
    assert len(losses(tmp_path / "out")) == 11  # 186 windows, 16 a step
    assert "11 steps" in capsys.readouterr().out


def test_the_validation_loss_does_not_depend_on_ranks_or_micro_batch(corpus, tiny_model):
    def value(world_size, micro_batch_size, sequence_length=16):
        loaders = [TokenLoader(corpus, "val", sequence_length=sequence_length, rank=rank,
                               micro_batch_size=micro_batch_size, world_size=world_size,
                               total_batch_size=0, vocab_size=50257) for rank in range(world_size)]

        class Adds:
            """Replaces the all-reduce: adds up the sums of the ranks, called one by one."""
            device, total = torch.device("cpu"), torch.zeros(3, dtype=torch.float64)

            def sum(self, tensor):
                self.total = self.total + tensor
                return self.total

        launch = Adds()
        return [mean_loss(tiny_model, data.eval_batches(10**9), launch, torch.float32)
                for data in loaders][-1]

    expected = value(1, 4)
    assert value(1, 1) == pytest.approx(expected, abs=1e-6)
    assert value(3, 2) == pytest.approx(expected, abs=1e-6)
    assert value(5, 7) == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------- output files


def test_what_a_run_writes(corpus, tmp_path):
    out = tmp_path / "out"
    model = train(tiny(corpus, out, sample_tokens=2, eval_tokens=10**9), CPU_LAUNCH)
    log = read_log(out / "metrics.jsonl")
    assert sorted(log) == ["end", "run", "train", "val"]
    assert sorted(log["train"]) == list(range(10)) and sorted(log["val"]) == [0, 5, 10]
    for record in log["train"].values():
        assert {"step", "kind", "loss", "lr", "grad_norm", "tokens_per_sec"} <= set(record)
        assert all(not isinstance(value, dict | list) for value in record.values())
        assert record["tokens_per_sec"] > 0
    assert [p.name for p in list_checkpoints(out)] == ["step_000005", "step_000010"]
    assert (out / "latest").readlink().name == "step_000010"
    assert (out / "pretrain_loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 5, 10]
    assert all(sample["text"].startswith("Hello, I'm a language model,") for sample in samples)
    start = log["run"][0]
    assert (start["seed"] == 1337 and start["torch"] == torch.__version__
            and start["world_size"] == 1)
    state = load_training_state(out / "step_000010")
    assert state["facts"] == {key: start[key] for key in start
                              if key not in ("step", "kind", "time")}
    assert start["n_layer"] == 2 and start["vocab_size"] == 50257
    best = min((5, 10), key=lambda step: log["val"][step]["loss"])
    assert (out / "best").readlink().name == f"step_{best:06d}"
    final = load_model(out)  # the weights after the last step, saved and validated
    assert_same_model(final, model)
    val = TokenLoader(corpus, "val", sequence_length=16, micro_batch_size=3, total_batch_size=0,
                      vocab_size=50257)
    loss = mean_loss(final, val.eval_batches(10**9), CPU_LAUNCH, torch.float32)
    assert loss == pytest.approx(log["val"][10]["loss"], abs=1e-6)


@pytest.mark.parametrize("form", ["llm.c", "nanoGPT"])
def test_foreign_shards_give_the_same_run(corpus, tmp_path, finished_run, form):
    foreign = make_foreign(corpus, tmp_path / "foreign", form)
    train(tiny(foreign, tmp_path / "out"), CPU_LAUNCH)
    ours, theirs = (read_log(folder / "metrics.jsonl") for folder in (finished_run,
                                                                      tmp_path / "out"))
    assert losses(tmp_path / "out") == losses(finished_run)
    assert ours["val"] == theirs["val"]


def test_two_runs_are_bit_equal(corpus, tmp_path, finished_run):
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    assert_same_run(tmp_path / "out", finished_run)


# -------------------------------------------------------------------------------- resume


def test_resuming_twice_is_exact(tmp_path):
    """5 + 5 + 5 = 15 steps, bit for bit, across shard boundaries and an epoch's at step 9."""
    corpus = make_corpus(tmp_path / "data", [200, 203, 200, 201], high=50)  # 3 x 12 windows
    changes = {"max_steps": 15, "total_batch_size": 64, "keep_last": 0, "sample_tokens": 2}
    whole = train(tiny(corpus, tmp_path / "whole", **changes), CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "once", 5)
    torch.manual_seed(99)  # the state of the global generator must not matter
    train(tiny(corpus, tmp_path / "once", resume=True, **changes), CPU_LAUNCH)
    interrupted(tmp_path / "once", tmp_path / "twice", 10)
    model = train(tiny(corpus, tmp_path / "twice", resume=True, **changes), CPU_LAUNCH)
    assert_same_model(whole, model)
    assert_same_run(tmp_path / "whole", tmp_path / "twice")


@pytest.mark.slow
def test_resume_at_another_world_size_and_micro_batch(corpus, tmp_path, finished_run):
    interrupted(finished_run, tmp_path / "two", 5)
    config = tiny(corpus, tmp_path / "two", resume=True, micro_batch_size=1)
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    assert losses(tmp_path / "two") == pytest.approx(losses(finished_run), rel=1e-6)


def test_resume_without_a_checkpoint_starts_from_scratch(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    train(tiny(corpus, out, resume=True, max_steps=6), CPU_LAUNCH)
    assert "starting from scratch" in capsys.readouterr().out
    before = read_log(out / "metrics.jsonl")
    train(tiny(corpus, out, resume=True, max_steps=6), CPU_LAUNCH)  # already finished
    after = read_log(out / "metrics.jsonl")
    assert [after[kind] == before[kind] for kind in ("train", "val")] == [True, True]
    assert sorted(after["run"]) == [0, 6]
    shutil.rmtree(out / "step_000005")
    shutil.rmtree(out / "step_000006")  # as if killed before the first checkpoint
    train(tiny(corpus, out, resume=True, max_steps=4), CPU_LAUNCH)
    assert len(losses(out)) == 4  # no record of the earlier run is left


def test_resume_prints_changed_settings_and_refuses_harmful_ones(corpus, tmp_path, finished_run,
                                                                  capsys):
    out = shutil.copytree(finished_run, tmp_path / "out")
    for change, word in [({"seed": 1}, "--seed 1337, not 1"), ({"n_layer": 3}, "--n-layer 2"),
                         ({"total_batch_size": 256}, "--total-batch-size 128, not 256"),
                         ({"sequence_length": 8}, "--sequence-length 16"),
                         ({"eval_tokens": 8}, "--eval-tokens")]:
        message = user_error(train, tiny(corpus, out, resume=True, **change), CPU_LAUNCH)
        assert word in message and "step_000010" in message
    other = make_corpus(tmp_path / "other", [700, 2000], high=50)
    assert "trained with other data" in user_error(train, tiny(other, out, resume=True), CPU_LAUNCH)
    capsys.readouterr()
    train(tiny(corpus, out, resume=True, max_steps=12, grad_clip=0.5, dtype="float32"), CPU_LAUNCH)
    printed = capsys.readouterr().out
    assert "grad_clip was 1.0, is now 0.5" in printed and "max_steps was 10, is now 12" in printed
    train(tiny(corpus, out, resume=True, max_steps=12), CPU_LAUNCH)
    assert "dtype was float32, is now auto" in capsys.readouterr().out
    assert len(losses(out)) == 12
    assert "--max-steps" in user_error(train, tiny(corpus, out, resume=True, max_steps=6),
                                       CPU_LAUNCH)


# ------------------------------------------------------------- HellaSwag during a training run


def scored(corpus, out_dir, **changes) -> TrainerConfig:
    """A tiny run that also scores 16 rows every three steps."""
    path = write_rows(corpus.parent / "stories.jsonl", STORIES)
    return tiny(corpus, out_dir, **{"hellaswag_interval": 3, "hellaswag": str(path)} | changes)


def scores_of(out_dir) -> dict[int, dict]:
    return read_log(out_dir / "metrics.jsonl")["hellaswag"]


def test_hellaswag_is_scored_at_its_interval_and_at_the_end(corpus, tmp_path, finished_run, capsys):
    """By the figures of evaluate.py; the run is otherwise the same."""
    model = train(scored(corpus, tmp_path / "out"), CPU_LAUNCH)
    records = scores_of(tmp_path / "out")
    assert sorted(records) == [0, 3, 6, 9, STEPS]
    rows = [(str(number), row) for number, row in enumerate(STORIES)]
    questions = benchmarks.make_questions(tmp_path, rows, benchmarks.multiple_choice, 32)
    figures = benchmarks.question_figures(model, questions, CPU_LAUNCH, torch.float32)
    assert records[STEPS] == {"step": STEPS, "kind": "hellaswag"} | figures
    assert figures["rows"] == 16 and {"accuracy_summed", "accuracy_per_token",
                                      "accuracy_per_character"} <= set(figures)
    printed = capsys.readouterr()
    assert f"step 10: hellaswag accuracy_summed {figures['accuracy_summed']:.4f}" in (
        printed.out + printed.err)
    assert losses(tmp_path / "out") == losses(finished_run)
    assert_same_model(model, load_model(finished_run))


@pytest.mark.slow
def test_a_resumed_run_repeats_the_scores_from_its_checkpoint_on(corpus, tmp_path):
    """Checkpoint 6 was saved after its weights were scored; they are scored again."""
    options = {"save_interval": 3, "keep_last": 0}
    train(scored(corpus, tmp_path / "whole", **options), CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "again", 6)
    train(scored(corpus, tmp_path / "again", resume=True, **options), CPU_LAUNCH)
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    assert scores_of(tmp_path / "again") == scores_of(tmp_path / "whole")
    lines = list(map(json.loads, (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()))
    steps = [line["step"] for line in lines if line["kind"] == "hellaswag"]
    assert steps == [0, 3, 6, 6, 9, STEPS]


def test_scores_after_the_checkpoint_of_a_resumed_run_are_discarded(corpus, tmp_path):
    """Scores of steps 3 and 4 are in the log when step 3 is resumed with another interval."""
    config = scored(corpus, tmp_path / "out", save_interval=3, max_steps=4, hellaswag_interval=1)
    train(config, CPU_LAUNCH)
    shutil.rmtree(tmp_path / "out" / "step_000004")
    train(dataclasses.replace(config, hellaswag_interval=5, max_steps=6, resume=True), CPU_LAUNCH)
    assert sorted(scores_of(tmp_path / "out")) == [0, 1, 2, 3, 5, 6]


def test_a_signal_interrupts_scoring_and_the_resumed_run_scores(corpus, tmp_path, monkeypatch):
    train(scored(corpus, tmp_path / "whole"), CPU_LAUNCH)
    config, calls = scored(corpus, tmp_path / "out", resume=True), []
    with StopRequest() as stop, monkeypatch.context() as patch:
        def score_batch(*arguments, real=benchmarks.score_batch):
            calls.append(None)
            if len(calls) == 2:  # step 0 needs one batch
                stop.handle(signal.SIGTERM, None)
            return real(*arguments)

        def tiny_batches(*arguments, real=benchmarks.score, **options):
            return real(*arguments, batch_tokens=10**4 if not calls else 100, **options)

        patch.setattr(benchmarks, "score_batch", score_batch)
        patch.setattr(benchmarks, "score", tiny_batches)
        train(config, CPU_LAUNCH, stop)
    assert len(calls) == 2 and sorted(scores_of(tmp_path / "out")) == [0]
    assert final_state(tmp_path / "out")["progress"]["step"] == 3
    train(config, CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    assert scores_of(tmp_path / "out") == scores_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_hellaswag_scores_do_not_depend_on_the_world_size(corpus, tmp_path, world_size):
    """Two batches: one for each rank of two, none for one of three."""
    config = scored(corpus, tmp_path / "one", hellaswag_interval=10, micro_batch_size=1,
                    total_batch_size=96)
    write_rows(corpus.parent / "stories.jsonl", STORIES * 7)
    train(config, CPU_LAUNCH)
    two = dataclasses.replace(config, out_dir=str(tmp_path / "two"))
    ranks = Ranks(world_size, "trainer", flags(two), tmp_path / "ranks")
    assert ranks.wait() == [0] * world_size, ranks.output()
    assert scores_of(tmp_path / "two") == scores_of(tmp_path / "one")
    assert sorted(scores_of(tmp_path / "two")) == [0, 10]


@pytest.mark.parametrize("changes, words", [
    ({"hellaswag": "/does/not/exist.parquet"}, ["exist.parquet", "evaluate.py --download"]),
    ({"hellaswag_interval": 0}, ["--hellaswag needs --hellaswag-interval"]),
    ({"block_size": 8, "sequence_length": 8}, ["line 1", "10 tokens"])])
def test_hellaswag_settings_that_cannot_be_used(corpus, tmp_path, monkeypatch, capsys, changes,
                                                words):
    argv = flags(scored(corpus, tmp_path / "out", **changes))
    message = main_error(main_of(trainer), argv, monkeypatch, capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- devices, flags


def test_dtype_and_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert "--device" in user_error(pick_device, "gpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        assert "--device cuda" in user_error(pick_device, "cuda", 0)


def test_more_ranks_than_gpus_are_refused_on_every_rank(monkeypatch):
    """Else those that have a GPU would wait for the others until torchrun kills them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in range(4):
        message = user_error(pick_device, "cuda", rank, 4)
        assert message.startswith("--device cuda: 4 needed, 2 visible: lower"), message
    assert pick_device("cuda", 1, 2) == pick_device("cuda:1") == torch.device("cuda", 1)
    assert "cuda:2: 3 needed" in user_error(pick_device, "cuda:2")
    assert pick_device("cpu", 3, 4) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # torchrun --virtual-local-rank
    assert pick_device("cuda", 0, 8) == torch.device("cuda", 0)
    picked = []
    monkeypatch.setattr("minigpt2.distributed.pick_device", lambda *given: picked.append(given)
                        or torch.device("cpu"))
    set_launch(monkeypatch, WORLD_SIZE="1", LOCAL_WORLD_SIZE="4")
    start("cuda")
    assert picked == [("cuda", 0, 4)]


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bfloat16_only_on_gpus_that_support_it(native, dtype, monkeypatch):
    """Of the GPU in use, which need not be the current one."""
    current = []

    @contextlib.contextmanager
    def select(device):
        current.append(device.index)
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "device", select)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation:
                        (native and current == [1]) or including_emulation)
    assert pick_dtype("auto", torch.device("cuda", 1)) == dtype


@pytest.mark.parametrize("factor, said", [(0.5, ""), (1.1, ""), (4.0, "4.0 times as long")])
def test_a_dtype_that_a_cpu_emulates_is_named(factor, said, monkeypatch, capsys):
    """Emulated bfloat16 is slower than float32. "auto" never chooses it, and times nothing."""
    seconds = {torch.float32: 1.0, torch.bfloat16: factor, torch.float16: factor}
    monkeypatch.setattr(timeit, "repeat", lambda call, **_: [seconds[call.args[0].dtype]])
    for dtype in ("bfloat16", "float16"):
        assert pick_dtype(dtype, torch.device("cpu")) == getattr(torch, dtype)
        error = capsys.readouterr().err
        assert (f"--dtype {dtype}" in error and said in error) if said else error == ""
    for dtype in ("auto", "float32"):
        assert pick_dtype(dtype, torch.device("cpu")) == torch.float32
    monkeypatch.setenv("RANK", "1")
    pick_dtype("bfloat16", torch.device("cpu"))
    assert capsys.readouterr().err == ""


def test_bfloat16_on_a_cpu_learns(corpus, tmp_path, finished_run):
    train(tiny(corpus, tmp_path / "out", dtype="bfloat16"), CPU_LAUNCH)
    assert losses(tmp_path / "out") == pytest.approx(losses(finished_run), abs=0.05)


@pytest.mark.slow
def test_a_missing_compiler_is_reported(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.compiler.reset()
    message = main_error(main_of(trainer), flags(tiny(corpus, tmp_path / "out", compile=True)),
                         monkeypatch, capsys)
    assert "torch.compile failed (" in message and "--no-compile" in message


@pytest.mark.slow
def test_only_the_training_step_is_compiled_and_only_once(corpus, tmp_path, finished_run,
                                                          monkeypatch):
    """Validations with batches of other shapes, HellaSwag and samples compile nothing."""
    counter, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(
        self, backend=counter, **options))
    train(scored(corpus, tmp_path / "compiled", compile=True, sample_tokens=2), CPU_LAUNCH)
    assert counter.frame_count == 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(finished_run), abs=1e-5)


SYNCHRONIZING = ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_the_device(optimizer, corpus, tmp_path, monkeypatch):
    """Calls that wait for a GPU, counted in the steps of a compiled run. The numbers of a step are
    read once, from a copy in host memory: `numpy` raises an error for a tensor on a device."""
    calls, counts = [], []

    def counted(place, name):
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *arguments, **options: (
            calls.append(name), real(*arguments, **options))[1])

    def finish_step(self, *arguments, **options):
        real_finish(self, *arguments, **options)
        counts.append([*calls])  # of this step, its micro-steps included
        calls.clear()

    real_finish, real_compile = run.Run.finish_step, torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda self, **options: real_compile(
                            self, backend=CompileCounter(), **options))
    monkeypatch.setattr(run.Run, "finish_step", finish_step)
    for name in (*SYNCHRONIZING, "numpy"):
        counted(torch.Tensor, name)
    counted(run, "device_time")
    train(tiny(corpus, tmp_path / "out", compile=True, optimizer=optimizer, eval_interval=100,
               save_interval=100), CPU_LAUNCH)
    assert counts[1:] == [["numpy"]] * (STEPS - 1)


@pytest.mark.parametrize("late", [0, 1])
def test_a_signal_ends_a_run_after_a_micro_step(corpus, tmp_path, monkeypatch, capsys, late):
    """A step has 8 micro-steps. What they have summed is discarded: the checkpoint is that of the
    last complete step, and the resumed run equals an uninterrupted one bit for bit."""
    monkeypatch.setitem(run.STEPS_LATE, "cpu", late)
    options = {"micro_batch_size": 1, "max_steps": 4, "save_interval": 100, "resume": True,
               "activation_checkpointing": bool(late)}
    train(tiny(corpus, tmp_path / "whole", **options), CPU_LAUNCH)
    for number, steps in ((3, 0), (8 + 8, 2), (8 + 1, 3), (1, 3)):
        config = tiny(corpus, tmp_path / "out", **options)
        assert stopped_in_micro_step(train, config, number) == (number, steps)
        assert f"SIGTERM: stopped after {steps} of 4 steps" in capsys.readouterr().out
    train(tiny(corpus, tmp_path / "out", **options), CPU_LAUNCH)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_reading_numbers_a_step_late_changes_no_run(corpus, tmp_path, monkeypatch):
    """As on a GPU. A run that a signal stopped after each step, and resumed, is the same."""
    options = {"resume": True}
    train(tiny(corpus, tmp_path / "whole", **options), CPU_LAUNCH)
    monkeypatch.setitem(run.STEPS_LATE, "cpu", 1)
    train(tiny(corpus, tmp_path / "late", **options), CPU_LAUNCH)
    assert_same_run(tmp_path / "late", tmp_path / "whole")
    for steps in range(1, 7):  # the numbers of a step are read before it is saved
        with StopRequest() as stop, monkeypatch.context() as patch:
            signal_at_the_end_of_a_step(patch, stop)
            train(tiny(corpus, tmp_path / "stopped", **options), CPU_LAUNCH, stop)
        assert final_state(tmp_path / "stopped")["progress"]["step"] == steps
    train(tiny(corpus, tmp_path / "stopped", **options), CPU_LAUNCH)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_last_weights_are_validated_and_saved_at_any_interval(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "out", max_steps=5, eval_interval=3, save_interval=2,
               keep_last=0), CPU_LAUNCH)
    assert sorted(read_log(tmp_path / "out" / "metrics.jsonl")["val"]) == [0, 3, 5]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [
        "step_000002", "step_000004", "step_000005"]


@pytest.mark.slow
def test_float16_learns_and_its_scaler_is_resumed(corpus, tmp_path):
    """Few tokens: processors without float16 units multiply it ten times slower than float32."""
    changes = {"max_steps": 6, "save_interval": 3, "eval_interval": 6, "eval_tokens": 16,
               "total_batch_size": 32, "micro_batch_size": 1}
    train(tiny(corpus, tmp_path / "a", **changes), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "b", dtype="float16", **changes), CPU_LAUNCH)
    full, half = (trace(tmp_path / name, "loss", "grad_norm") for name in "ab")
    assert half == [pytest.approx(pair, rel=1e-2) for pair in full]
    interrupted(tmp_path / "b", tmp_path / "c", 3)
    train(tiny(corpus, tmp_path / "c", dtype="float16", resume=True, **changes), CPU_LAUNCH)
    assert losses(tmp_path / "c") == losses(tmp_path / "b")
    scalers = [load_training_state(list_checkpoints(tmp_path / name)[-1])["scaler"]
               for name in "bc"]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] == 6
    interrupted(tmp_path / "a", tmp_path / "d", 3)  # from float32, which has no scaler
    train(tiny(corpus, tmp_path / "d", dtype="float16", resume=True, **changes), CPU_LAUNCH)
    assert losses(tmp_path / "d") == pytest.approx(losses(tmp_path / "a"), rel=1e-2)


def test_a_resumed_run_takes_optimizer_settings_from_the_command_line(corpus, tmp_path,
                                                                      finished_run):
    out = interrupted(finished_run, tmp_path / "out", 5)
    train(tiny(corpus, out, resume=True, weight_decay=0.5, beta2=0.9, eps=1e-6), CPU_LAUNCH)
    state = load_training_state(list_checkpoints(out)[-1])["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]
    assert all(group["betas"] == (0.9, 0.9) and group["eps"] == 1e-6
               for group in state["param_groups"])


def test_validation_and_saving_do_not_count_as_training_time(corpus, tmp_path, monkeypatch):
    """On a fake clock: a step takes a second; a validation, HellaSwag or a checkpoint 1,000."""
    now = [0.0]

    def taking(seconds, function):
        def slow(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)
        return slow

    monkeypatch.setattr(run, "device_time", lambda device: now[0])
    monkeypatch.setattr("minigpt2.progress.perf_counter", lambda: now[0])
    for place, name, seconds in ((trainer, "set_lr", 1), (trainer, "mean_loss", 1000),
                                 (trainer, "question_figures", 1000),
                                 (resume.CheckpointWriter, "save", 1000)):
        monkeypatch.setattr(place, name, taking(seconds, getattr(place, name)))
    config = scored(corpus, tmp_path / "out", hellaswag_interval=6)
    train(config, CPU_LAUNCH)
    assert trace(tmp_path / "out", "tokens_per_sec") == [(128.0,)] * STEPS
    end = read_log(tmp_path / "out" / "metrics.jsonl")["end"]
    # three validations, three scores, two checkpoints, ten steps
    assert end == {STEPS: {"step": STEPS, "kind": "end", "seconds": 8010.0,
                           "overhead_s": 8000.0}}
    train(dataclasses.replace(config, resume=True), CPU_LAUNCH)  # nothing is left to do
    assert read_log(tmp_path / "out" / "metrics.jsonl")["end"] == end


def test_a_diverging_run_stops_before_it_saves(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", max_lr=1e30, warmup_steps=0, save_interval=1)
    message = user_error(train, config, CPU_LAUNCH)
    assert "diverged" in message and "--max-lr" in message
    for path in list_checkpoints(tmp_path / "out"):
        assert all(p.isfinite().all() for p in load_model(path).parameters())


def test_ranks_with_different_settings_name_the_setting(monkeypatch):
    def gather(values, value):
        values[:] = [value, value, value | {"max_lr": 0.5}]

    monkeypatch.setattr("minigpt2.distributed.dist.all_gather_object", gather)
    launch = Launch(0, 3, torch.device("cpu"))
    message = user_error(launch.check_same, {"data": "abc", "max_lr": 0.1})
    assert "max_lr differs: 0.1 on rank 0, 0.5 on rank 2" in message
    launch.check_same({"data": "abc", "max_lr": 0.5})


def test_a_node_may_have_other_cards_and_no_git(monkeypatch):
    def gather(values, value):
        values[:] = [value, dict.fromkeys(value)]

    monkeypatch.setattr("minigpt2.distributed.dist.all_gather_object", gather)
    launch = Launch(0, 2, torch.device("cpu"))
    launch.check_same({"device": "cuda:0", "device_name": "H100", "git_commit": "abc"})
    assert "seed differs" in user_error(launch.check_same, {"seed": 1})


def test_paths_may_differ_between_nodes(corpus, tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(Launch, "check_same", lambda self, facts, except_for=(): compared.append(
        (facts.keys(), set(except_for))))
    train(tiny(corpus, tmp_path / "out", max_steps=1), CPU_LAUNCH)
    facts, except_for = compared[0]
    assert {"data_dir", "hellaswag"} <= except_for & facts
    assert {"max_lr", "code_sha256", "data_sha256", "hellaswag_sha256"} <= facts - except_for


def test_a_gpu_index_is_refused_under_torchrun(monkeypatch):
    set_launch(monkeypatch)
    assert "--device cuda:0" in user_error(start, "cuda:0")


def test_a_gpu_index_with_a_leading_zero_is_refused():
    assert "--device cuda:01 is unknown" in user_error(pick_device, "cuda:01")


def test_the_learning_rate_never_exceeds_max_lr(corpus, tmp_path):
    """Also below the default of --min-lr."""
    train(tiny(corpus, tmp_path / "out", max_lr=1e-4, min_lr=1e-3, max_steps=6), CPU_LAUNCH)
    assert [lr for lr, in trace(tmp_path / "out", "lr")][2:] == [1e-4] * 4


def test_a_sample_prompt_that_does_not_fit_is_refused(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", block_size=16, sample_prompt="word " * 20,
                  sample_tokens=2, max_steps=1)
    assert "--sample-prompt has 21 tokens; the context is 16" in user_error(
        train, config, CPU_LAUNCH)
    assert not (tmp_path / "out").exists()  # before anything is written
    train(dataclasses.replace(config, sample_tokens=0), CPU_LAUNCH)
    empty = tiny(corpus, tmp_path / "empty", block_size=1, sequence_length=1, sample_prompt="",
                 sample_tokens=2, max_steps=1)  # it is <|endoftext|>, which fills this context
    assert "--sample-prompt has 1 tokens; the context is 1" in user_error(train, empty, CPU_LAUNCH)
    assert not (tmp_path / "empty").exists()


def test_a_validation_is_of_as_many_tokens_as_asked_for(corpus, tmp_path, monkeypatch):
    asked, real = [], TokenLoader.eval_batches
    monkeypatch.setattr(TokenLoader, "eval_batches", lambda self, tokens: (
        asked.append(tokens), real(self, tokens))[1])
    train(tiny(corpus, tmp_path / "out", max_steps=1, eval_tokens=160), CPU_LAUNCH)
    assert {*asked} == {160}


@pytest.mark.parametrize("changes, words", [
    ({"total_batch_size": 100}, ["--total-batch-size 100", "or use --total-batch-size 128"]),
    ({"micro_batch_size": 3}, ["3 x 16", "--micro-batch-size", "-batch-size 144"]),
    ({"micro_batch_size": 16}, ["16 x 16", "or use --total-batch-size 256"]),
    ({"sequence_length": 64}, ["--sequence-length 64", "--block-size 32"]),
    ({"n_head": 3}, ["n_embd 16", "n_head 3"]),
    ({"data_dir": "/does/not/exist"}, ["/does/not/exist", "pretrain_data/"]),
    ({"device": "quantum"}, ["--device quantum"]),
    ({"max_steps": None, "total_batch_size": 2**14}, ["--total-batch-size"]),
    ({"warmup_steps": -1}, ["--warmup-steps"]),
    ({"preset": "gpt3"}, ["gpt3"]),
    ({"out_dir": "/dev/null/out"}, ["--out-dir /dev/null/out", "/dev/null is not a folder"]),
    ({"out_dir": "/dev/null"}, ["--out-dir /dev/null cannot be written"]),
])
def test_bad_settings_give_one_line_and_write_nothing(corpus, tmp_path, changes, words, monkeypatch,
                                                      capsys):
    config = tiny(corpus, **{"out_dir": tmp_path / "out"} | changes)
    message = main_error(main_of(trainer), flags(config), monkeypatch, capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_quoted_home_folder_and_odd_paths(tmp_path, monkeypatch, capsys):
    """Through a resume and a reading of the checkpoint."""
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "a b[1]*? $x café\nnew line"
    data = tiny_corpus(tmp_path / f"data {name}")
    for more in ([], ["--resume", "--max-steps", "2"]):
        argv = flags(tiny(f"~/{data.name}", f"~/{name}", max_steps=1, warmup_steps=1)) + more
        monkeypatch.setattr(sys, "argv", ["trainer.py", *argv])
        run_to_end(trainer)
    capsys.readouterr()
    assert (tmp_path / name / "pretrain_loss.png").exists()
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / name)] == [1, 2]
    load_model(tmp_path / name)


def test_samples_use_another_stream_each_time(corpus, tmp_path, monkeypatch):
    """A function of seed and step, also of a resumed run; an empty prompt samples from nothing."""
    seeds, prompts, real = [], [], inference.generate

    def generate(model, ids, masks, *, seed, **options):
        seeds.append(seed)
        prompts.append(ids.tolist())
        return real(model, ids, masks, seed=seed, **options)

    monkeypatch.setattr(inference, "generate", generate)
    options = {"sample_tokens": 4, "sample_prompt": "", "seed": 7, "resume": True}
    train(tiny(corpus, tmp_path / "out", max_steps=5, **options), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "out", **options), CPU_LAUNCH)
    assert seeds == [7, 12, 17] and prompts == [[[50256]]] * 3
    config = parse_config(TrainerConfig, ["--sample-prompt", "", "--sample-steps", "3"],
                          description="")
    assert (config.sample_prompt, config.sample_tokens) == ("", 3)


def test_a_folder_that_holds_a_run_is_not_overwritten(corpus, tmp_path, finished_run, monkeypatch,
                                                      capsys):
    out = shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    message = main_error(main_of(trainer), flags(tiny(corpus, out)), monkeypatch, capsys)
    assert "--resume" in message and "--out-dir" in message
    files = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
             for folder in (out, finished_run)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_truncated_shard_stops_every_rank(corpus, tmp_path):
    path = corpus / "shard_000002.npy"
    path.write_bytes(path.read_bytes()[:-100])
    ranks = Ranks(2, "trainer", flags(tiny(corpus, tmp_path / "out", micro_batch_size=1)),
                  tmp_path / "ranks", constants=NO_WAIT)
    assert ranks.wait() == [2, 2]
    assert "shard_000002.npy is truncated" in ranks.output()
    assert not (tmp_path / "out" / "latest").exists()


def test_fields_of_launch():
    assert [field.name for field in dataclasses.fields(Launch)] == [
        "rank", "world_size", "device", "store"]


def test_the_small_run_is_described_alike_in_three_places():
    """The same flags but for the data, and how long it takes."""
    found = []
    for path in ("README.md", "docs/training.md", "trainer.py"):
        text = (ROOT / path).read_text(encoding="utf-8").replace("\\\\\n", "\\\n")
        assert SMALL_RUN_TIME in text, path
        command = re.search(r"trainer\.py (--data-dir (?:[^\n]*\\\n)+[^\n#]*)", text)[1]
        words = command.replace("\\", "").replace("--resume", "").split()
        found.append(set(zip(words[4::2], words[5::2], strict=True)))  # after --data-dir, --out-dir
    assert found[0] == found[1] == found[2] and ("--max-steps", "400") in found[0]


def test_the_command_line_keeps_its_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--help"])
    with pytest.raises(SystemExit):
        main_of(trainer)()
    text = capsys.readouterr().out
    for name in ("data-dir out-dir total-batch-size micro-batch-size sequence-length max-steps "
                 "warmup-steps max-lr min-lr n-layer n-head n-embd block-size eval-interval "
                 "save-interval seed device dtype compile no-compile resume").split():
        assert f"--{name}" in text
    assert set(TINY_FLAGS[::2]) <= set(text.replace(",", " ").split())
