import dataclasses
import json
import math
import shutil
import sys

import pytest
import torch
from helpers.common import (
    CPU_LAUNCH,
    ROOT,
    TINY_FLAGS,
    assert_user_error,
    main_error,
    make_corpus,
    make_foreign,
    run_script,
    run_torchrun,
    user_error,
)
from helpers.ranks import Ranks
from helpers.training import SCRIPT, STEPS, flags, interrupted, losses, tiny, trace
from torch._dynamo.testing import CompileCounter
from torch.distributed import HashStore

import trainer
from bench.train import make_training
from dataloader import TokenLoader
from minigpt2 import run
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state
from minigpt2.distributed import (
    Launch,
    count_micro_steps,
    mean_loss,
    pick_device,
    pick_dtype,
    should_compile,
    start,
    use_fastest_exact_matmul,
)
from minigpt2.metrics import read_log
from minigpt2.optimizer import set_lr as real_set_lr
from trainer import TrainerConfig, train

# ---------------------------------------------------------------------- what is computed


@pytest.fixture
def reference_trace(corpus):
    """The recipe written anew around Hugging Face's model: their loss, torch's plain AdamW."""
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


def test_ten_updates_are_those_of_hugging_faces_model(corpus, tmp_path, reference_trace):
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    got = trace(tmp_path / "out", "loss", "grad_norm", "lr")
    assert len(got) == STEPS
    for (loss, norm, lr), (their_loss, their_norm, their_lr) in zip(got, reference_trace,
                                                                    strict=True):
        assert abs(loss - their_loss) < 1e-4 and abs(norm - their_norm) < 1e-4
        assert lr == pytest.approx(their_lr, rel=1e-9)
    assert got[-1][0] < got[0][0] - 0.5


def test_golden_trace(corpus, tmp_path):
    """The same ten updates as committed: a change of any default or formula shows here."""
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    golden = json.loads((ROOT / "tests" / "golden_trace.json").read_text())
    got = trace(tmp_path / "out", "loss", "grad_norm", "lr")
    for step, expected in zip(got, golden, strict=True):
        assert step == pytest.approx(tuple(expected), abs=1e-4)


def test_one_reduction_of_the_gradients_an_update_begun_before_backward_ends(corpus, tmp_path):
    """Two micro-steps an update: gradients are sent once, each byte of them, and the first buckets
    while later ones are still being computed. Beside them go two floats."""
    config = tiny(corpus, tmp_path / "out", micro_batch_size=2, max_steps=3, n_embd=128)  # > 1 MB
    ranks = Ranks(2, "trainer", flags(config), tmp_path / "ranks",
                  note_collectives=tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    parameters = list(load_model(tmp_path / "out").parameters())
    for rank in (0, 1):
        lines = (tmp_path / "ranks" / f"collectives_{rank}.jsonl").read_text().splitlines()
        updates, sizes = [[]], []
        for event in map(json.loads, lines):
            if "bucket" in event:
                updates[-1].append(event)
            elif event["elements"] == 2:  # loss and whether to stop: an update is agreed on
                updates.append([])
            elif event["elements"] not in {b["bytes"] // 4 for b in updates[-1]}:  # a bucket's
                sizes.append(event["elements"])
        assert updates.pop() == [] and len(updates) == 3
        for buckets in updates:
            assert [bucket["bucket"] for bucket in buckets] == list(range(len(buckets)))
            assert sum(b["bytes"] for b in buckets) == 4 * sum(p.numel() for p in parameters)
        for buckets in updates[1:]:  # the first shows DDP in which order gradients come
            assert len(buckets) > 1 and buckets[0]["ready"] < len(parameters)
        assert sizes == [3, 3]  # of two validations: loss, targets, whether to stop


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twenty_updates_of_the_fast_path_are_those_of_the_plain_one(dtype, monkeypatch):
    """The trainer's settings, loss and fused AdamW against eager PyTorch with all logits and its
    default AdamW: what bench.py compares, at a size for tests."""
    monkeypatch.setattr("minigpt2.distributed.keep_freed_memory", lambda: None)
    before = torch.get_float32_matmul_precision()
    tokens = torch.randint(50, (20 * 129,), generator=torch.Generator().manual_seed(0))
    sizes = trainer.GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64)

    def losses_of(way: str, seed: int = 0) -> torch.Tensor:
        update = make_training(way, sizes, (4, 32), dtype, tokens, seed)
        return torch.tensor([update() for _ in range(20)])

    try:
        ours = losses_of("ours")
    finally:
        torch.set_float32_matmul_precision(before)
    plain, other = losses_of("textbook"), losses_of("textbook", seed=1)
    assert plain[-1] < plain[0]
    apart = ((ours - plain) / plain).abs().max()
    assert apart < (1e-5 if dtype == torch.float32 else
                    min(5e-3, ((other - plain) / plain).abs().max()))


def test_a_processor_that_rounds_float32_products_is_found_out(monkeypatch):
    before = torch.get_float32_matmul_precision()
    try:
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
    finally:
        torch.set_float32_matmul_precision(before)


# ----------------------------------------------------------------------- the fast recipe

FAST = {"optimizer": "muon", "schedule": "linear", "zero_init": True, "min_lr": 0.0}


def test_the_fast_recipe_trains_and_goes_on_exactly(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "whole", **FAST, keep_last=0)
    model = train(config, CPU_LAUNCH)
    values = losses(tmp_path / "whole")
    assert values[-1] < values[0] - 1  # it learns
    rates = [lr for lr, in trace(tmp_path / "whole", "lr")]
    assert rates[2] == rates[3] == 1e-2 and rates[-1] < rates[-2]
    interrupted(tmp_path / "whole", tmp_path / "again", 5)
    again = train(dataclasses.replace(config, out_dir=str(tmp_path / "again"), resume=True),
                  CPU_LAUNCH)
    assert losses(tmp_path / "again") == values
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_the_fast_recipe_on_two_ranks_is_that_of_one(corpus, tmp_path):
    one = tiny(corpus, tmp_path / "one", **FAST)
    train(one, CPU_LAUNCH)
    two = dataclasses.replace(one, out_dir=str(tmp_path / "two"))
    ranks = Ranks(2, "trainer", flags(two), tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.output()
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_learning_rates_that_the_optimizer_cannot_use_are_refused(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", max_steps=5)
    message = user_error(train, dataclasses.replace(config, muon_lr=1e-3), CPU_LAUNCH)
    assert "--muon-lr" in message and "--optimizer muon" in message
    message = user_error(train, dataclasses.replace(config, optimizer="muon", max_lr=0.0),
                         CPU_LAUNCH)
    assert "--max-lr is 0" in message
    train(config, CPU_LAUNCH)
    other = dataclasses.replace(config, optimizer="muon", resume=True, max_steps=9)
    assert "--optimizer adamw" in user_error(train, other, CPU_LAUNCH)


def test_the_fast_recipe_begins_with_blocks_that_add_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "set_lr", lambda optimizer, lr: real_set_lr(optimizer, 0.0))
    model = train(tiny(corpus, tmp_path / "out", **FAST, max_steps=1), CPU_LAUNCH)
    idx = torch.randint(50257, (2, 8))
    expected = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(8))
    assert torch.equal(model.hidden_states(idx), model.transformer.ln_f(expected))


def test_defaults_are_the_missions():
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


@pytest.mark.parametrize("world_size, steps", [(1, 16), (2, 8), (8, 2)])
def test_accumulation_is_computed_for_every_launch_form(world_size, steps):
    """One process included, where the earlier repo trained on a batch 16 times too small."""
    assert count_micro_steps(2**19, micro_batch_size=32, sequence_length=1024,
                             world_size=world_size, flag="--total-batch-size") == steps


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
def test_losses_do_not_depend_on_the_micro_batch(corpus, tmp_path, micro_batch_size):
    train(tiny(corpus, tmp_path / "a"), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "b", micro_batch_size=micro_batch_size), CPU_LAUNCH)
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)


def test_two_processes_give_the_losses_of_one(corpus, tmp_path):
    """The real torchrun and gloo, from the command line, one update after the other."""
    config = tiny(corpus, tmp_path / "one", micro_batch_size=2)
    run_script(SCRIPT, *flags(config))
    run_torchrun(2, SCRIPT, *flags(dataclasses.replace(config, out_dir=str(tmp_path / "two"))))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    validation = [read_log(tmp_path / name / "metrics.jsonl")["val"] for name in ("one", "two")]
    for step in (0, 5, 10):
        assert validation[0][step]["loss"] == pytest.approx(validation[1][step]["loss"], abs=1e-5)
    one, two = (load_model(tmp_path / name) for name in ("one", "two"))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-4)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1 + STEPS + 3 + 1  # one rank writes


def test_rank_is_not_local_rank(monkeypatch):
    for name, value in {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("minigpt2.distributed.dist.init_process_group",
                        lambda *arguments, **options: None)
    monkeypatch.setattr("minigpt2.distributed.connect_store", lambda timeout, may_host: HashStore())
    monkeypatch.setattr("minigpt2.distributed.agree_on_attempt",
                        lambda store, rank, world_size: "first")
    picked = []
    monkeypatch.setattr("minigpt2.distributed.pick_device", lambda device, local_rank: (
        picked.append(local_rank) or torch.device("cpu")))
    launch = start("cpu")
    assert (launch.rank, launch.world_size, picked) == (11, 16, [3])
    assert not launch.is_master


def test_one_epoch_is_computed_from_the_shards(corpus, tmp_path, capsys):
    train(tiny(corpus, tmp_path / "out", max_steps=None, eval_interval=100), CPU_LAUNCH)
    assert len(losses(tmp_path / "out")) == 23  # 186 windows, 8 an update
    assert "23 steps" in capsys.readouterr().out


def test_validation_is_one_number_for_any_split(corpus, tiny_model):
    def value(world_size, micro_batch_size, sequence_length=16):
        loaders = [TokenLoader(corpus, "val", sequence_length=sequence_length, rank=rank,
                               micro_batch_size=micro_batch_size, world_size=world_size,
                               total_batch_size=0, vocab_size=50257) for rank in range(world_size)]

        class Adds:
            """Stands in for the all-reduce: every rank's sums, one after the other."""
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


# ------------------------------------------------------------------- what is left behind


def test_what_a_run_writes(corpus, tmp_path):
    out = tmp_path / "out"
    model = train(tiny(corpus, out), CPU_LAUNCH)
    log = read_log(out / "metrics.jsonl")
    assert sorted(log) == ["end", "run", "train", "val"]
    assert sorted(log["train"]) == list(range(10)) and sorted(log["val"]) == [0, 5, 10]
    for record in log["train"].values():
        assert {"step", "kind", "loss", "lr", "grad_norm", "tokens_per_sec"} <= set(record)
        assert all(not isinstance(value, dict | list) for value in record.values())
        assert record["tokens_per_sec"] > 0
    assert [p.name for p in list_checkpoints(out)] == ["step_000005", "step_000010"]
    assert (out / "latest").read_text() == "step_000010\n"
    assert (out / "pretrain_loss.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 5, 10]
    assert all(sample["text"].startswith("Hello, I'm a language model,") for sample in samples)
    run = log["run"][0]
    assert run["seed"] == 1337 and run["torch"] == torch.__version__ and run["world_size"] == 1
    state = load_training_state(out / "step_000010")
    assert state["facts"] == {key: run[key] for key in run if key not in ("step", "kind", "time")}
    assert len(state["rng"]) == 1 and run["n_layer"] == 2 and run["vocab_size"] == 50257
    best = min((5, 10), key=lambda step: log["val"][step]["loss"])
    assert (out / "best").read_text() == f"step_{best:06d}\n"
    # the final weights are those after the last update, saved and evaluated
    final = load_model(out)
    for p, q in zip(final.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    val = TokenLoader(corpus, "val", sequence_length=16, micro_batch_size=3, total_batch_size=0,
                      vocab_size=50257)
    loss = mean_loss(final, val.eval_batches(10**9), CPU_LAUNCH, torch.float32)
    assert loss == pytest.approx(log["val"][10]["loss"], abs=1e-6)


@pytest.mark.parametrize("form", ["llm.c", "nanoGPT"])
def test_ready_made_shards_train_to_the_same_losses(corpus, tmp_path, form):
    foreign = make_foreign(corpus, tmp_path / "foreign", form)
    train(tiny(corpus, tmp_path / "ours"), CPU_LAUNCH)
    train(tiny(foreign, tmp_path / "theirs"), CPU_LAUNCH)
    ours, theirs = (read_log(tmp_path / name / "metrics.jsonl") for name in ("ours", "theirs"))
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")
    assert ours["val"] == theirs["val"]


def test_two_runs_are_bit_equal(corpus, tmp_path):
    models = [train(tiny(corpus, tmp_path / name), CPU_LAUNCH) for name in "ab"]
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


# -------------------------------------------------------------------------------- resume


def test_resume_is_exact_even_twice(corpus, tmp_path):
    """10 + 10 + 10 = 30 updates, bit for bit, across shard borders and the epoch border at 23."""
    changes = {"max_steps": 30, "save_interval": 10, "eval_interval": 10, "keep_last": 0}
    whole = train(tiny(corpus, tmp_path / "whole", **changes), CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "once", 10)
    torch.manual_seed(99)  # nothing may depend on the state of a global generator
    train(tiny(corpus, tmp_path / "once", resume=True, **changes), CPU_LAUNCH)
    interrupted(tmp_path / "once", tmp_path / "twice", 20)
    model = train(tiny(corpus, tmp_path / "twice", resume=True, **changes), CPU_LAUNCH)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert losses(tmp_path / "twice") == losses(tmp_path / "whole")
    states = [load_training_state(list_checkpoints(tmp_path / name)[-1])["optimizer"]["state"]
              for name in ("whole", "twice")]
    for index, moments in states[0].items():
        for name, value in moments.items():
            assert torch.equal(value, states[1][index][name])
    validation = [read_log(tmp_path / name / "metrics.jsonl")["val"] for name in ("whole", "twice")]
    assert validation[0] == validation[1]


def test_resume_at_another_world_size_and_micro_batch(corpus, tmp_path):
    changes = {"max_steps": 12, "save_interval": 6, "micro_batch_size": 2}
    train(tiny(corpus, tmp_path / "whole", **changes), CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "two", 6)
    config = tiny(corpus, tmp_path / "two", resume=True, **changes | {"micro_batch_size": 1})
    run_torchrun(2, SCRIPT, *flags(config))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_resume_starts_fresh_when_there_is_nothing(corpus, tmp_path, capsys):
    train(tiny(corpus, tmp_path / "out", resume=True), CPU_LAUNCH)
    assert "starting from scratch" in capsys.readouterr().out
    before = read_log(tmp_path / "out" / "metrics.jsonl")
    train(tiny(corpus, tmp_path / "out", resume=True), CPU_LAUNCH)  # already finished
    after = read_log(tmp_path / "out" / "metrics.jsonl")
    assert [after[kind] == before[kind] for kind in ("train", "val")] == [True, True]
    assert sorted(after["run"]) == [0, 10]
    shutil.rmtree(tmp_path / "out" / "step_000005")
    shutil.rmtree(tmp_path / "out" / "step_000010")  # as if killed before the first checkpoint
    train(tiny(corpus, tmp_path / "out", resume=True, max_steps=4), CPU_LAUNCH)
    assert len(losses(tmp_path / "out")) == 4  # no record of the other run among them


def test_resume_says_what_changed_and_refuses_what_would_corrupt(corpus, tmp_path, capsys):
    out = tmp_path / "out"
    train(tiny(corpus, out), CPU_LAUNCH)
    for change, word in [({"seed": 1}, "--seed 1337, not 1"), ({"n_layer": 3}, "--n-layer 2"),
                         ({"total_batch_size": 256}, "--total-batch-size 128, not 256"),
                         ({"sequence_length": 8}, "--sequence-length 16"),
                         ({"eval_tokens": 8}, "--eval-tokens")]:
        message = user_error(train, tiny(corpus, out, resume=True, **change), CPU_LAUNCH)
        assert word in message and "step_000010" in message
    other = make_corpus(tmp_path / "other", [700, 2000], high=50)
    assert "the data are not" in user_error(train, tiny(other, out, resume=True), CPU_LAUNCH)
    capsys.readouterr()
    train(tiny(corpus, out, resume=True, max_steps=12, grad_clip=0.5), CPU_LAUNCH)
    printed = capsys.readouterr().out
    assert "grad_clip was 1.0, is now 0.5" in printed and "max_steps was 10, is now 12" in printed
    assert len(losses(out)) == 12
    assert "--max-steps" in user_error(train, tiny(corpus, out, resume=True, max_steps=6),
                                       CPU_LAUNCH)


# ------------------------------------------------------------------------- devices, flags


def test_dtype_and_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert "--device" in user_error(pick_device, "gpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        assert "--device cuda" in user_error(pick_device, "cuda", 0)


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float16)])
def test_bf16_only_where_the_gpu_computes_in_it(native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation:
                        native or including_emulation)
    assert pick_dtype("auto", torch.device("cuda", 0)) == dtype


def test_bfloat16_on_cpu_learns_too(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "a"), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "b", dtype="bfloat16"), CPU_LAUNCH)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), abs=0.05)


def test_without_a_compiler_one_line_says_so(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minigpt2.distributed.shutil.which", lambda name: None)
    train(tiny(corpus, tmp_path / "out", compile=True, max_steps=1), CPU_LAUNCH)
    assert "torch.compile needs a compiler, " in capsys.readouterr().out


@pytest.mark.parametrize("triton, capability, compiler, missing", [
    (True, (9, 0), "gcc", None), (False, (9, 0), "gcc", "Triton"),
    (True, (6, 1), "gcc", "capability 7.0"), (True, (9, 0), None, "a compiler")])
def test_what_compiling_for_a_gpu_needs(monkeypatch, capsys, triton, capability, compiler, missing):
    monkeypatch.setattr("minigpt2.distributed.importlib.util.find_spec",
                        lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("minigpt2.distributed.shutil.which", lambda name: compiler)
    launch = Launch(0, 1, torch.device("cuda", 0))
    assert should_compile(None, launch) is (missing is None)
    assert (missing or "") in capsys.readouterr().out
    assert should_compile(False, launch) is False


def test_only_the_training_step_is_compiled_and_only_once(corpus, tmp_path, monkeypatch):
    """Three evaluations in batches of other shapes, and samples, compile nothing more."""
    counter, real = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend=counter))
    train(tiny(corpus, tmp_path / "compiled", compile=True), CPU_LAUNCH)
    assert counter.frame_count == 1
    train(tiny(corpus, tmp_path / "eager"), CPU_LAUNCH)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-5)


def test_the_last_weights_are_evaluated_and_saved_whatever_the_intervals(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "out", max_steps=11, eval_interval=5, save_interval=4,
               keep_last=0), CPU_LAUNCH)
    assert sorted(read_log(tmp_path / "out" / "metrics.jsonl")["val"]) == [0, 5, 10, 11]
    assert [path.name for path in list_checkpoints(tmp_path / "out")] == [
        "step_000004", "step_000008", "step_000011"]


def test_float16_learns_with_a_scaler_that_is_resumed(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "a"), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "b", dtype="float16"), CPU_LAUNCH)
    full, half = (trace(tmp_path / name, "loss", "grad_norm") for name in "ab")
    assert half == [pytest.approx(pair, rel=1e-2) for pair in full]
    interrupted(tmp_path / "b", tmp_path / "c", 5)
    train(tiny(corpus, tmp_path / "c", dtype="float16", resume=True), CPU_LAUNCH)
    assert losses(tmp_path / "c") == losses(tmp_path / "b")
    scalers = [load_training_state(list_checkpoints(tmp_path / name)[-1])["scaler"]
               for name in "bc"]
    assert scalers[0] == scalers[1] and scalers[0]["_growth_tracker"] == STEPS
    interrupted(tmp_path / "a", tmp_path / "d", 5)  # from float32, which has no scaler
    train(tiny(corpus, tmp_path / "d", dtype="float16", resume=True), CPU_LAUNCH)
    assert losses(tmp_path / "d") == pytest.approx(losses(tmp_path / "a"), rel=1e-2)


def test_a_resumed_run_takes_the_optimizers_settings_from_the_command_line(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "a", max_steps=5), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "a", resume=True, weight_decay=0.5, beta2=0.9, eps=1e-6),
          CPU_LAUNCH)
    state = load_training_state(list_checkpoints(tmp_path / "a")[-1])["optimizer"]
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.5, 0.0]
    assert all(group["betas"] == (0.9, 0.9) and group["eps"] == 1e-6
               for group in state["param_groups"])


def test_evaluation_and_saving_are_no_training_time(corpus, tmp_path, monkeypatch):
    """A clock of our own: an update takes a second, an evaluation or a checkpoint a thousand."""
    now = [0.0]

    def taking(seconds, function):
        def slow(*arguments, **options):
            now[0] += seconds
            return function(*arguments, **options)
        return slow

    monkeypatch.setattr(run, "device_time", lambda device: now[0])
    for place, name, seconds in ((trainer, "set_lr", 1), (trainer, "mean_loss", 1000),
                                 (run.CheckpointWriter, "save", 1000)):
        monkeypatch.setattr(place, name, taking(seconds, getattr(place, name)))
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    assert trace(tmp_path / "out", "tokens_per_sec") == [(128.0,)] * STEPS
    end = read_log(tmp_path / "out" / "metrics.jsonl")["end"]
    # three validations, two checkpoints, ten updates
    assert end == {STEPS: {"step": STEPS, "kind": "end", "seconds": 5010.0,
                           "overhead_s": 5000.0}}
    train(tiny(corpus, tmp_path / "out", resume=True), CPU_LAUNCH)  # nothing is left to do
    assert read_log(tmp_path / "out" / "metrics.jsonl")["end"] == end


def test_a_run_that_diverges_stops_before_it_saves(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", max_lr=1e30, warmup_steps=0, save_interval=1)
    message = user_error(train, config, CPU_LAUNCH)
    assert "diverged" in message and "--max-lr" in message
    for path in list_checkpoints(tmp_path / "out"):
        assert all(p.isfinite().all() for p in load_model(path).parameters())


def test_ranks_that_differ_are_told_in_what(monkeypatch):
    def gather(values, value):
        values[:] = [value, value, value | {"max_lr": 0.5}]

    monkeypatch.setattr("minigpt2.distributed.dist.all_gather_object", gather)
    launch = Launch(0, 3, torch.device("cpu"))
    message = user_error(launch.check_same, {"data": "abc", "max_lr": 0.1})
    assert "max_lr differs: 0.1 on rank 0, 0.5 on rank 2" in message
    launch.check_same({"data": "abc", "max_lr": 0.5})


def test_a_gpu_by_number_is_refused_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cuda:0" in user_error(start, "cuda:0")


def test_a_sample_prompt_that_does_not_fit_is_said(corpus, tmp_path, capsys):
    train(tiny(corpus, tmp_path / "out", block_size=16, sample_prompt="word " * 20, max_steps=1),
          CPU_LAUNCH)
    assert "no samples" in capsys.readouterr().out
    assert not (tmp_path / "out" / "samples.jsonl").exists()


@pytest.mark.parametrize("changes, words", [
    ({"total_batch_size": 100}, ["--total-batch-size 100", "64 or 128"]),
    ({"micro_batch_size": 3}, ["3 x 16", "96 or 144", "--micro-batch-size 2"]),
    ({"micro_batch_size": 16}, ["--total-batch-size 256", "--micro-batch-size 8"]),
    ({"sequence_length": 64}, ["--sequence-length 64", "--block-size 32"]),
    ({"n_head": 3}, ["n_embd 16", "n_head 3"]),
    ({"data_dir": "/does/not/exist"}, ["/does/not/exist", "pretrain_data/"]),
    ({"device": "quantum"}, ["--device quantum"]),
    ({"max_steps": None, "total_batch_size": 2**14}, ["--total-batch-size"]),
    ({"warmup_steps": -1}, ["--warmup-steps"]),
    ({"preset": "gpt3"}, ["gpt3"]),
])
def test_bad_settings_are_one_line_and_leave_nothing(corpus, tmp_path, changes, words, monkeypatch,
                                                     capsys):
    message = main_error(trainer.main, flags(tiny(corpus, tmp_path / "out", **changes)),
                         monkeypatch, capsys)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_not_overwritten(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "out", max_steps=1)
    run_script(SCRIPT, *flags(config))
    files = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert_user_error(run_script(SCRIPT, *flags(config), check=False), "--resume", "--out-dir")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == files


def test_a_truncated_shard_stops_every_rank(corpus, tmp_path):
    path = corpus / "shard_000002.npy"
    path.write_bytes(path.read_bytes()[:-100])
    result = run_torchrun(2, SCRIPT, *flags(tiny(corpus, tmp_path / "out", micro_batch_size=1)),
                          check=False)
    assert result.returncode != 0 and "shard_000002.npy is truncated" in result.stderr
    assert not (tmp_path / "out" / "latest").exists()


def test_launch_is_all_that_a_process_knows_of_the_others():
    assert [field.name for field in dataclasses.fields(Launch)] == [
        "rank", "world_size", "device"]


def test_fixed_interface_of_the_command_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py", "--help"])
    with pytest.raises(SystemExit):
        trainer.main()
    text = capsys.readouterr().out
    for name in ("data-dir out-dir total-batch-size micro-batch-size sequence-length max-steps "
                 "warmup-steps max-lr min-lr n-layer n-head n-embd block-size eval-interval "
                 "save-interval seed device dtype compile no-compile resume").split():
        assert f"--{name}" in text
    assert set(TINY_FLAGS[::2]) <= set(text.replace(",", " ").split())
