"""The reward model, its training script, and the report on held-out pairs."""

import json
import math
import random
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.common import CPU_LAUNCH, TINY, main_error, main_of, run_script, user_error
from helpers.ranks import Ranks, wait_until
from helpers.training import losses, num_records, stop_in_micro_steps_and_finish
from helpers.worlds import W
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import chat
import dpo
import evaluate
import finetune
import inference
import reward
from dataloader import row_batches
from inference import sample_responses
from minigpt2.checkpoint import load_model, read_prompt_template, save_checkpoint, weights_sha256
from minigpt2.metrics import read_log
from minigpt2.preferences import make_pairs, sequences
from minigpt2.rewards import RewardModel, pad_batch, score_rows
from minigpt2.sampling import Response
from minigpt2.tokenizer import ALPACA, EOT_TOKEN, encode
from model import GPT, GPTConfig
from reward import RewardConfig, calibration, swap_prompts, train
from rlhf_data.baselines import accuracy_interval

SIZES = GPTConfig(block_size=128, vocab_size=TINY.vocab_size, n_layer=2, n_head=2, n_embd=16)
ROWS = [{"instruction": f"Say the word {word} {n} times.", "input": "loudly" * (n % 2),
         "chosen": f"{word} " * n, "rejected": "No." * (8 - n)} for n in range(1, 8)
        for word in ("yes", "perhaps", "<|endoftext|>", "{braces}")]

COLUMNS = ",".join(f"{key}={key}" for key in ROWS[0])


@pytest.fixture
def reward_model() -> RewardModel:
    torch.manual_seed(0)
    return RewardModel.from_language_model(GPT(SIZES), seed=0).eval()


def tiny(base, rows_file, out, **changes) -> RewardConfig:
    options = {"checkpoint": str(base), "data": str(rows_file), "out_dir": str(out),
               "batch_size": 8, "micro_batch_size": 3, "max_lr": 1e-3, "val_fraction": 0.2,
               "eval_interval": 2, "save_interval": 2, "normalize_samples": 24, "max_tokens": 4,
               "device": "cpu"} | changes
    return RewardConfig(**options)


def arguments(base, rows_file, out, *more) -> list[str]:
    """The command line of `tiny`."""
    config = tiny(base, rows_file, out)
    names = ("checkpoint", "data", "out_dir", "batch_size", "micro_batch_size", "max_lr",
             "val_fraction", "eval_interval", "save_interval", "normalize_samples", "max_tokens",
             "device")
    return [word for name in names
            for word in ("--" + name.replace("_", "-"), str(getattr(config, name)))] + list(more)


@pytest.fixture
def always_stops(monkeypatch):
    """Random weights seldom sample <|endoftext|>: every response counts as stopped."""
    monkeypatch.setattr(inference, "Response",
                        lambda prompt, tokens, reason: Response(prompt, tokens, "stop"))


def report_of(out) -> dict:
    return json.loads((out / reward.REPORT).read_text())


# ------------------------------------------------------------------------------- the model


def test_scores_do_not_depend_on_padding_pad_ids_or_company(reward_model):
    """Rows alone and together, padded with the id of <|endoftext|>, 0, and random ids."""
    rows = sequences(make_pairs([("", row) for row in ROWS], 128)[0])
    alone = torch.cat([reward_model(torch.tensor([row]), torch.ones(1, len(row)).long())
                       for row in rows])
    ids, masks = pad_batch(rows, 128, torch.device("cpu"))
    assert ids.size(1) % 16 == 0 and torch.equal(masks.sum(1), torch.tensor(list(map(len, rows))))
    for pad in (EOT_TOKEN, 0, torch.randint(50257, (len(rows), 128))):
        wide, wide_masks = F.pad(ids, (0, 128 - ids.size(1))), F.pad(masks, (0, 128 - ids.size(1)))
        wide = wide.where(wide_masks.bool(), torch.as_tensor(pad))
        torch.testing.assert_close(reward_model(wide, wide_masks), alone, atol=1e-5, rtol=0)
    for size in (1, 3, len(rows)):
        scores = score_rows(reward_model, rows, rows, CPU_LAUNCH, torch.float32, size)
        torch.testing.assert_close(scores.float(), alone, atol=1e-5, rtol=0)
    assert all(row[-1] == EOT_TOKEN for row in rows)  # the token that is read
    assert alone.std() > 0.1


def test_the_head_starts_as_in_openais_code():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=1024))
    head = RewardModel.from_language_model(model, seed=0).score.weight
    assert head.shape == (1, 1024) and head.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert torch.equal(head, RewardModel.from_language_model(model, seed=0).score.weight)
    assert not torch.equal(head, RewardModel.from_language_model(model, seed=1).score.weight)


def test_scores_are_float32_under_autocast(reward_model):
    ids = torch.randint(50257, (64, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = reward_model(ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32 and len(scores.unique()) == 64  # bfloat16 has ties


@torch.no_grad()
def test_rescaling_moves_every_score(reward_model):
    ids = torch.randint(50257, (64, 9))
    before = reward_model(ids, torch.ones_like(ids))
    reward_model.rescale(before.mean().item(), before.std(correction=0).item())
    after = reward_model(ids, torch.ones_like(ids))
    torch.testing.assert_close(after, (before - before.mean()) / before.std(correction=0),
                               atol=1e-5, rtol=0)
    assert abs(after.mean()) < 1e-5 and after.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_transformers_loads_the_folder_with_equal_scores(reward_model, tmp_path):
    reward_model.rescale(0.7, 0.2)
    folder = save_checkpoint(tmp_path, 3, reward_model, prompt_template=ALPACA)
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert type(theirs).__name__ == "GPT2ForSequenceClassification" and theirs.num_labels == 1
    rows = sequences(make_pairs([("", row) for row in ROWS], 128)[0])
    ids, masks = pad_batch(rows, 128, torch.device("cpu"))
    ours = reward_model(ids, masks)
    scores = theirs.eval()(ids, attention_mask=masks).logits[:, 0]
    torch.testing.assert_close(scores, ours, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # pads with the id that the model skips
    texts = ["Yes, it is.<|endoftext|>", "No.<|endoftext|>"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    alone = [[*encode(text.removesuffix("<|endoftext|>")), EOT_TOKEN] for text in texts]
    torch.testing.assert_close(theirs(**batch).logits[:, 0].double(), score_rows(
        reward_model, alone, texts, CPU_LAUNCH, torch.float32, 1), atol=1e-5, rtol=0)
    again = load_model(tmp_path, model_class=RewardModel)
    assert torch.equal(again(ids, masks), ours) and read_prompt_template(tmp_path) == ALPACA


@pytest.mark.parametrize("script, argv", [
    (inference, ["--checkpoint", "{}", "Hello"]), (chat, ["--checkpoint", "{}"]),
    (evaluate, ["{}", "--tasks", "val"]), (finetune, ["--checkpoint", "{}"]),
    (dpo, ["--checkpoint", "{}", "--data", "{pairs}"]),
    (reward, ["--checkpoint", "{}", "--data", "{pairs}"])], ids=lambda x: getattr(x, "__name__", 0))
def test_a_reward_model_in_place_of_a_language_model_is_one_line(
        script, argv, reward_model, tmp_path, rows_file, monkeypatch, capsys):
    folder = save_checkpoint(tmp_path / "reward", 1, reward_model)
    monkeypatch.chdir(tmp_path)
    argv = [word.format(folder, pairs=rows_file) for word in argv]
    if script in (finetune, dpo, reward):
        argv += ["--out-dir", str(tmp_path / "out")]
    if script is finetune:
        rows = [{"instruction": "a", "output": "b"}] * 3
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        argv += ["--data", str(tmp_path / "rows.json")]
    error = main_error(main_of(script), [*argv, "--device", "cpu"], monkeypatch, capsys)
    assert f"{folder}/config.json (it is a reward model, expected a language model)" in error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_language_model_in_place_of_a_reward_model_is_one_line(base):
    message = user_error(load_model, base, model_class=RewardModel)
    assert "is a language model, expected a reward model" in message


# ---------------------------------------------------------------------------- the training


def test_what_a_run_writes(base, rows_file, tmp_path, capsys, always_stops):
    out = tmp_path / "out"
    model = train(tiny(base, rows_file, out), CPU_LAUNCH)
    log, printed, report = read_log(out / "metrics.jsonl"), capsys.readouterr().out, report_of(out)
    assert "28 of 28 pairs (left out: none); 21 to train on, 7 held out" in printed
    assert sorted(log["train"]) == [0, 1, 2] and sorted(log["val"]) == [0, 2, 3]
    assert {"loss", "accuracy", "margin", "lr", "grad_norm", "tokens_per_sec"} <= set(
        log["train"][0])
    assert log["val"][3]["loss"] == report["loss"]
    assert log["val"][3]["accuracy"] == report["accuracy"]["reward model"]["accuracy"]
    assert list(report["accuracy"]) == [
        "reward model", "chosen is the shorter", "against another prompt's", "longer", "shorter",
        "no artifact", "bag of words"]
    for name, row in report["accuracy"].items():
        assert f"{name:26} {row['accuracy']:8.4f}" in printed
    assert abs(report["mean"]) + report["deviation"] > 0 and report["samples"] == 21
    for image in ("reward_loss.png", reward.CALIBRATION):
        assert (out / image).read_bytes().startswith(b"\x89PNG")
    assert read_prompt_template(out) == ALPACA
    saved = load_model(out, model_class=RewardModel)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), model.parameters(),
                                                 strict=True))
    assert "already holds a run" in user_error(train, tiny(base, rows_file, out), CPU_LAUNCH)
    assert "is itself a checkpoint" in user_error(train, tiny(base, rows_file, base), CPU_LAUNCH)


def test_the_first_loss_equals_one_computed_row_by_row(base, rows_file, tmp_path):
    """From scores of one unpadded row at a time."""
    config = tiny(base, rows_file, tmp_path / "out", normalize_samples=0)
    train(config, CPU_LAUNCH)
    model = RewardModel.from_language_model(load_model(base), config.seed)
    pairs = reward.read_splits(config, 128, ALPACA)[0]
    pairs = next(row_batches(pairs, lambda pair: pair.num_tokens, 8, config.seed, 0))
    margins = [(model(torch.tensor([pair.prompt + pair.chosen]), torch.ones(
        1, len(pair.prompt + pair.chosen)).long()) - model(torch.tensor(
            [pair.prompt + pair.rejected]), torch.ones(
                1, len(pair.prompt + pair.rejected)).long())).item() for pair in pairs]
    record = read_log(tmp_path / "out" / "metrics.jsonl")["train"][0]
    assert record["loss"] == pytest.approx(
        sum(math.log1p(math.exp(-m)) for m in margins) / 8, abs=1e-5)
    assert record["margin"] == pytest.approx(sum(margins) / 8, abs=1e-5)
    assert record["accuracy"] == sum(m > 0 for m in margins) / 8


def gradients(folder, rank: int = 0) -> list[torch.Tensor]:
    return torch.load(folder / f"gradients_{rank}.pt", weights_only=True)


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_micro_batches_and_ranks(base, tmp_path, monkeypatch):
    """16 pairs of very unequal length: no mean of means. Two ranks as real processes; with
    micro-batches of 3, the last one of rank 1 is smaller, with 5 it is empty."""
    rows = [{"prompt": f"Say {n}.", "chosen": "yes " * (n * n // 4 + 1),
             "rejected": "no " * (17 - n)} for n in range(17)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    shared = ["--val-fraction", "0", "--batch-size", "16", "--grad-clip", "0"]
    found = {}
    for world_size, size in ((1, 16), (1, 8), (1, 5), (1, 1), (2, 8), (2, 5), (2, 3), (2, 1)):
        folder = tmp_path / f"{world_size}x{size}"
        argv = [*arguments(base, tmp_path / "pairs.json", folder / "out", *shared),
                "--micro-batch-size", str(size)]
        folder.mkdir()
        ranks = Ranks(world_size, "reward", argv, folder / "log", save_gradients=folder)
        assert ranks.wait() == [0] * world_size, ranks.output()
        found[folder] = gradients(folder)
    logged = [[read_log(folder / "out" / "metrics.jsonl")["train"][0][name]
               for name in ("loss", "accuracy", "margin", "grad_norm")] for folder in found]
    assert all(row == pytest.approx(logged[0], abs=1e-6) for row in logged)
    first, *others = found.values()
    assert sum(g.square().sum() for g in first) > 1e-4
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_resumes_exactly(base, rows_file, tmp_path, world_size):
    """Killed at its checkpoints and at random instants, in training and in the final evaluation."""
    argv = arguments(base, rows_file, "", "--epochs", "3", "--save-interval", "1", "--resume")
    argv[argv.index("--out-dir") + 1] = str(tmp_path / "whole")
    ranks = Ranks(world_size, "reward", argv, tmp_path / "a")
    assert ranks.wait() == [0] * world_size, ranks.output()
    argv[argv.index("--out-dir") + 1] = str(out := tmp_path / "out")
    chosen = random.Random(world_size)
    for kill in range(4):
        ranks = Ranks(world_size, "reward", argv, tmp_path / f"b{kill}")
        latest, step = out / "latest", 2 * kill + 1
        wait_until(lambda: latest.exists() and int(latest.readlink().name[5:]) >= step, ranks)  # noqa: B023
        instant = chosen.random() / 10
        ranks.wait(instant)  # kills it
    ranks = Ranks(world_size, "reward", argv, tmp_path / "c")
    assert ranks.wait() == [0] * world_size, ranks.output()
    assert_same_reward_run(out, tmp_path / "whole")
    assert max(read_log(out / "metrics.jsonl")["run"]) > 0, "it never resumed"


def assert_same_reward_run(a, b) -> None:
    """Weights, optimizer and curves, bit for bit, and the report."""
    for p, q in zip(*(load_model(out, model_class=RewardModel).parameters() for out in (a, b)),
                    strict=True):
        assert torch.equal(p, q)
    assert losses(a) == losses(b)
    assert read_log(a / "metrics.jsonl")["val"] == read_log(b / "metrics.jsonl")["val"]
    assert report_of(a) == report_of(b)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_a_killed_run_resumes_on_another_number_of_ranks(base, rows_file, tmp_path, before, after):
    """SIGKILL after random numbers of log records, the last of them on `before` ranks."""
    argv = arguments(base, rows_file, "", "--epochs", "3", "--save-interval", "1", "--resume")
    place, whole, out = argv.index("--out-dir") + 1, tmp_path / "whole", tmp_path / "out"
    argv[place] = str(whole)
    ranks = Ranks(1, "reward", argv, tmp_path / "a")
    assert ranks.wait() == [0], ranks.output()
    argv[place] = str(out)
    moments = sorted(random.Random(before).sample(range(2, num_records(whole) - 2), 3))
    for moment, world_size in zip(moments, (before, after, before), strict=True):
        ranks = Ranks(world_size, "reward", argv, tmp_path / f"b{moment}")
        wait_until(lambda: num_records(out) >= moment, ranks)  # noqa: B023
        ranks.kill()
        assert ranks.wait() == [-9] * world_size, ranks.output()
    ranks = Ranks(after, "reward", argv, tmp_path / "c")
    assert ranks.wait() == [0] * after, ranks.output()
    assert losses(out) == pytest.approx(losses(whole), abs=1e-5)
    ours, theirs = (read_log(folder / "metrics.jsonl")["val"] for folder in (out, whole))
    assert ours.keys() == theirs.keys()
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)
    assert report_of(out)["loss"] == pytest.approx(report_of(whole)["loss"], abs=1e-5)


def test_a_signal_ends_a_run_after_a_micro_step(base, rows_file, tmp_path, always_stops):
    """It is resumed exactly, from the last complete step; a step has three micro-steps."""
    assert_same_reward_run(*stop_in_micro_steps_and_finish(
        train, tiny(base, rows_file, tmp_path / "out"), 3))


@pytest.mark.slow
def test_a_signal_saves_and_another_number_of_ranks_resumes(base, rows_file, tmp_path):
    argv = arguments(base, rows_file, "", "--epochs", "6", "--save-interval", "1000",
                     "--eval-interval", "1000", "--resume")
    whole, out = tmp_path / "whole", tmp_path / "out"
    argv[argv.index("--out-dir") + 1] = str(whole)
    ranks = Ranks(1, "reward", argv, tmp_path / "a")
    assert ranks.wait() == [0], ranks.output()
    argv[argv.index("--out-dir") + 1] = str(out)
    ranks = Ranks(2, "reward", argv, tmp_path / "two")
    log = out / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_bytes().count(b"\n") > 3, ranks)
    ranks.kill(1, number=signal.SIGTERM)
    assert ranks.wait() == [0, 0] and "--resume" in ranks.output()
    assert not (out / reward.REPORT).exists() and len(losses(out)) < len(losses(whole))
    ranks = Ranks(1, "reward", argv, tmp_path / "one")
    assert ranks.wait() == [0], ranks.output()
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    ours, theirs = report_of(out), report_of(whole)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_killed_between_report_and_normalization_ends_the_same(base, rows_file, tmp_path,
                                                                     monkeypatch, always_stops):
    """And a finished run that is resumed changes nothing."""
    train(tiny(base, rows_file, tmp_path / "whole"), CPU_LAUNCH)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        def killed(self, *_):
            raise KeyboardInterrupt
        patch.setattr(RewardModel, "rescale", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(base, rows_file, out), CPU_LAUNCH)
    for _ in range(2):
        train(tiny(base, rows_file, out, resume=True), CPU_LAUNCH)
        assert_same_reward_run(out, tmp_path / "whole")
        monkeypatch.setattr(reward, "sample_responses", None)  # a finished run samples no more
    assert report_of(out)["deviation"] > 0 and (out / "step_000003").is_dir()


@pytest.mark.slow
def test_a_signal_in_the_final_evaluation_stops_the_run(base, rows_file, tmp_path, capsys,
                                                        monkeypatch, always_stops):
    config, asked = tiny(base, rows_file, tmp_path / "out"), []
    stop = SimpleNamespace(requested=lambda: bool(asked), name="SIGTERM")
    with monkeypatch.context() as patch:
        patch.setattr(reward, "sample_responses", lambda *args, **options: (
            sample_responses(*args, **options), asked.append(1))[0])
        train(config, CPU_LAUNCH, stop)
    assert "SIGTERM: stopped after" in capsys.readouterr().out
    assert not (tmp_path / "out" / reward.REPORT).exists()
    train(tiny(base, rows_file, tmp_path / "out", resume=True), CPU_LAUNCH)
    train(tiny(base, rows_file, tmp_path / "whole"), CPU_LAUNCH)
    assert_same_reward_run(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_scores_are_normalized_on_samples_of_the_first_checkpoint(base, rows_file, tmp_path,
                                                                  always_stops, monkeypatch):
    """Fresh samples, of another seed, have a mean near 0 and a deviation near 1."""
    changes = {"normalize_samples": 200, "max_tokens": 8}
    rows = [row | {"instruction": f"{row['instruction']} {n}"} for n in range(3) for row in ROWS]
    rows_file.write_text(json.dumps(rows))
    config, temperatures = tiny(base, rows_file, tmp_path / "out", **changes), set()
    monkeypatch.setattr(reward, "sample_responses", lambda *given, temperature=1.0, **options: (
        temperatures.add(temperature), sample_responses(*given, **options))[1])
    model = train(config, CPU_LAUNCH)
    assert temperatures == {1.0}
    pairs, _, _ = reward.read_splits(config, 128, ALPACA)
    fresh = RewardConfig(**vars(config) | {"seed": 7})
    run = SimpleNamespace(launch=CPU_LAUNCH, dtype=torch.float32, micro_batch_size=8,
                          stop=SimpleNamespace(requested=bool),
                          metadata={"reference_sha256": weights_sha256(load_model(base))})
    scores = reward.sampled_scores(fresh, model, pairs, run)
    assert not torch.equal(scores, reward.sampled_scores(config, model, pairs, run))
    assert abs(scores.mean()) < 0.2 and 0.8 < scores.std() < 1.2
    run.dtype = torch.float16  # in which a CPU trains, but cannot sample
    half = reward.sampled_scores(fresh, model, pairs, run)
    torch.testing.assert_close(half, scores, atol=0.05, rtol=0.01)
    run.metadata["reference_sha256"] = "of another model"
    assert "has changed since the start" in user_error(reward.sampled_scores, fresh, model, pairs,
                                                       run)
    report = report_of(tmp_path / "out")
    assert report["samples"] == len(pairs) and report["deviation"] != pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_too_few_samples_that_stop_leave_the_scores_as_they_are(base, rows_file, tmp_path, capsys):
    model = train(tiny(base, rows_file, tmp_path / "a", normalize_samples=0), CPU_LAUNCH)
    capsys.readouterr()
    other = train(tiny(base, rows_file, tmp_path / "b"), CPU_LAUNCH)  # random weights do not stop
    assert "scores are not normalized: 0 samples ended" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(),
                                                 strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_score_that_is_not_finite_stops_the_run_naming_the_row(base, rows_file, tmp_path,
                                                                 monkeypatch, late):
    """In training; on a GPU, the host reads the loss one step late."""
    real, rows = RewardModel.forward, [*ROWS]
    rows[5] = rows[5] | {"rejected": "poison"}
    rows_file.write_text(json.dumps(rows))
    poison = encode("poison")[0]

    def forward(self, ids, masks):
        scores = real(self, ids, masks)
        return torch.where((ids == poison).any(1), torch.nan, scores)

    monkeypatch.setattr(RewardModel, "forward", forward)
    monkeypatch.setattr("minigpt2.run.STEPS_LATE", {"cpu": late})
    config = tiny(base, rows_file, tmp_path / "out", val_data=str(tmp_path / "val.json"))
    (tmp_path / "val.json").write_text(json.dumps(ROWS[:4]))
    assert f"the score of {rows_file.name} row 6 is nan" in user_error(train, config, CPU_LAUNCH)
    config = tiny(base, tmp_path / "val.json", tmp_path / "other", val_data=str(rows_file))
    assert f"the score of {rows_file.name} row 6 is nan" in user_error(train, config, CPU_LAUNCH)


def test_a_processor_that_cannot_sample_in_bfloat16(base, rows_file, tmp_path, monkeypatch):
    """The samples for the normalization, after the training, are in float32 then. One held-out pair
    is enough."""
    monkeypatch.setattr(reward, "can_pack", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr("minigpt2.kernels.can_pack", lambda dtype=torch.float32: False)
    (tmp_path / "val.json").write_text(json.dumps(ROWS[:1]))
    train(tiny(base, rows_file, tmp_path / "out", dtype="bfloat16", max_tokens=2,
               val_data=str(tmp_path / "val.json")), CPU_LAUNCH)
    assert report_of(tmp_path / "out")["accuracy"]["reward model"]["n"] == 1


@pytest.mark.slow
def test_held_out_pairs_of_a_file_of_their_own(base, rows_file, tmp_path, capsys):
    (tmp_path / "val.json").write_text(json.dumps([*ROWS[:3], ROWS[3] | {"instruction": "New"}]))
    config = tiny(base, rows_file, tmp_path / "out", val_data=str(tmp_path / "val.json"))
    train(config, CPU_LAUNCH)
    assert report_of(tmp_path / "out")["accuracy"]["reward model"]["n"] == 4
    printed = capsys.readouterr().out
    assert "4 of 4 pairs (left out: none) held out, 3 with a training prompt" in printed
    assert "--val-fraction and --val-start are not used" in printed
    (tmp_path / "val.json").write_text(json.dumps(ROWS[:2]))
    again = RewardConfig(**vars(config) | {"resume": True})
    assert "trained with other data" in user_error(train, again, CPU_LAUNCH)


@pytest.mark.slow
def test_resume_refuses_other_settings(base, rows_file, tmp_path):
    train(tiny(base, rows_file, tmp_path / "out"), CPU_LAUNCH)
    torch.manual_seed(1)
    other = save_checkpoint(tmp_path / "other", 1, GPT(SIZES))
    for changes, word in (({"batch_size": 4}, "--batch-size 8, not 4"), ({"seed": 1}, "--seed"),
                          ({"val_start": 0.2}, "--val-start"), ({"columns": COLUMNS}, "--columns"),
                          ({"checkpoint": str(other)}, "--checkpoint")):
        again = tiny(base, rows_file, tmp_path / "out", resume=True, **changes)
        assert word in user_error(train, again, CPU_LAUNCH)


# ------------------------------------------------------------------------------ the report


def test_accuracy_with_wilsons_interval_and_ties_counted_half():
    five = accuracy_interval(torch.tensor([1.0] * 4 + [-1.0] * 4 + [0.0] * 2))
    assert five["accuracy"] == 0.5 and five["ties"] == 2 and five["n"] == 10
    assert (five["low"], five["high"]) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    all_right = accuracy_interval(torch.ones(100))
    assert (all_right["low"], all_right["high"]) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_calibration_by_hand():
    """Margins of log 4 are right with probability .8: 8 of 10 is calibrated, 5 of 10 is not."""
    calibrated = torch.tensor([math.log(4)] * 8 + [-math.log(4)] * 2, dtype=torch.float64)
    error, [row] = calibration(calibrated)
    assert error == pytest.approx(0, abs=1e-12) and row["confidence"] == pytest.approx(0.8)
    error, rows = calibration(torch.cat([calibrated.abs() * torch.tensor([1, -1] * 5),
                                         torch.tensor([1e4, 0.0]).double()]))
    assert [row["n"] for row in rows] == [1, 10, 1]
    assert error == pytest.approx((10 * 0.3) / 12)


def test_the_calibration_is_drawn_from_a_report(tmp_path):
    bins = calibration(torch.tensor([1.0, 0.5, -0.1]))[1]
    (tmp_path / "reward.json").write_text(json.dumps({"calibration": bins}))
    (tmp_path / "rows.json").write_text("[]")
    image = tmp_path / "image.png"
    run_script("image/plot_report.py", tmp_path / "reward.json", "--out", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    broken = run_script("image/plot_report.py", tmp_path / "rows.json", "--out", image, check=False)
    assert broken.returncode == 2 and "is not a report of" in broken.stderr


def test_another_prompts_response_is_never_of_an_equal_prompt():
    rows = [{"prompt": f"p{i // 3}", "chosen": f"c{i}", "rejected": "r"} for i in range(30)]
    pairs, _ = make_pairs([("", row) for row in rows], 128)
    swapped = swap_prompts(pairs, 128)
    assert len(swapped) > 20
    of_prompt = {tuple(pair.prompt): [] for pair in pairs}
    for pair in pairs:
        of_prompt[tuple(pair.prompt)].append(pair.chosen)
    for pair in swapped:
        assert pair.chosen in of_prompt[tuple(pair.prompt)]
        assert pair.rejected not in of_prompt[tuple(pair.prompt)]


# ------------------------------------------------------------------------- a known optimum


@pytest.mark.slow
def test_world_w_is_learned_from_plain_rows(tmp_path, monkeypatch):
    """The rewards of all 26 responses, the entropy of the labels as loss, and the best possible
    accuracy. See helpers/worlds.py."""
    W.use_small_vocabulary(monkeypatch)
    rows = W.write_rows(tmp_path / "rows.jsonl")
    config = RewardConfig(
        checkpoint=str(W.save_reference(tmp_path / "base")), data=str(rows),
        val_data=str(rows), out_dir=str(tmp_path / "out"), epochs=16, batch_size=125,
        micro_batch_size=500, max_lr=3e-3, eval_interval=10000, device="cpu", max_tokens=2)
    model = train(config, CPU_LAUNCH)
    sequences = W.rows
    scores = score_rows(model, sequences, sequences, CPU_LAUNCH, torch.float32, 26).view(2, -1)
    report = report_of(tmp_path / "out")
    scores *= report["deviation"]  # normalization has divided by it

    def centered(table):
        return table - table.mean(1, keepdim=True)

    assert (centered(scores) - centered(W.rewards)).abs().max() < 0.1
    first, second = torch.triu_indices(13, 13, 1)
    p = torch.sigmoid(W.rewards[:, first] - W.rewards[:, second])
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean().item()
    assert entropy == pytest.approx(0.6004, abs=1e-4)
    assert report["loss"] == pytest.approx(entropy, abs=0.02)
    best = torch.maximum(p, 1 - p).mean().item()
    assert best == pytest.approx(0.6423, abs=1e-4)
    assert report["accuracy"]["reward model"]["accuracy"] == pytest.approx(best, abs=0.01)
    assert report["calibration_error"] < 0.03
