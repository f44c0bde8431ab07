"""Runs that are killed, damaged, stopped or moved to another number of ranks end as if they had
not been."""

import dataclasses
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from helpers.common import CPU_LAUNCH, user_error
from helpers.ranks import Ranks, wait_until
from helpers.training import assert_same_run, curves, final_state, flags, interrupted, losses, tiny

from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state, save_checkpoint
from minigpt2.faults import StopRequest
from minigpt2.metrics import read_log
from trainer import train

# --------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_at_20_random_instants_it_ends_as_if_undisturbed(corpus, tmp_path, world_size):
    """In turn: while it starts, while it trains, while it writes a checkpoint."""
    config = tiny(corpus, tmp_path / "whole", max_steps=100, micro_batch_size=2, save_interval=3,
                  eval_interval=7, eval_tokens=64, sample_steps=0, keep_last=2, resume=True)
    Ranks(1, "trainer", ["--help"], tmp_path / "help").wait()  # the server of forks is there
    begun = time.monotonic()
    whole = Ranks(world_size, "trainer", flags(config), tmp_path / "whole_output")
    wait_until((tmp_path / "whole" / "metrics.jsonl").exists, whole)
    started = time.monotonic() - begun
    assert whole.wait() == [0] * world_size
    trained = time.monotonic() - begun - started

    out, random, newest = tmp_path / "killed", np.random.RandomState(world_size), set()
    argv, log = flags(dataclasses.replace(config, out_dir=str(out))), out / "metrics.jsonl"
    for kill in range(20):
        size = log.stat().st_size if log.exists() else 0
        ranks = Ranks(world_size, "trainer", argv, tmp_path / f"output_{kill}")
        if kill % 3 == 0:
            time.sleep(random.uniform(0, started))
        else:
            wait_until(lambda: log.exists() and log.stat().st_size > size, ranks)  # noqa: B023
            time.sleep(random.uniform(0, trained / 12))
        if kill % 3 == 2:
            wait_until(lambda: any(out.glob(".step_*.tmp")), ranks)
        ranks.kill()
        assert ranks.wait() == [-9] * world_size, ranks.output()  # it was not done yet
        for folder in list_checkpoints(out):
            load_model(folder)
            load_training_state(folder)
            newest.add(folder.name)
    assert len(newest) > 1, newest
    last = Ranks(world_size, "trainer", argv, tmp_path / "last_output")
    assert last.wait() == [0] * world_size, last.output()
    assert list_checkpoints(out)[0].name != "step_000003"  # old ones went
    assert_same_run(tmp_path / "whole", out)


def test_windows_and_losses_are_those_of_one_process_at_2_1_4_and_2_ranks(corpus, tmp_path):
    """Moved after every sixth update, across shard borders and the epoch border at update 23.25."""
    changes = {"max_steps": 30, "save_interval": 6, "micro_batch_size": 2, "keep_last": 0,
               "eval_interval": 6}
    one = tiny(corpus, tmp_path / "one", **changes)
    whole = Ranks(1, "trainer", flags(one), tmp_path / "one_output",
                  note_windows=tmp_path / "one_output")
    assert whole.wait() == [0], whole.output()

    def windows(folder, first, last):
        """step -> the sorted windows that all ranks read in it; each was read once."""
        seen = {}
        for path in folder.glob("windows_*.jsonl"):
            for line in path.read_text().splitlines():
                step, places = json.loads(line)
                seen.setdefault(step, []).extend(map(tuple, places))
        return {step: sorted(seen[step]) for step in range(first, last)}

    out, moves = tmp_path / "moved", [(0, 12, 2), (12, 18, 1), (18, 24, 4), (24, 30, 2)]
    config = tiny(corpus, out, **changes | {"micro_batch_size": 1}, resume=True)
    for first, last, world_size in moves:
        if first:
            cut = tmp_path / f"cut_{first}"
            interrupted(out, cut, first)
            shutil.rmtree(out)
            cut.rename(out)
        ranks = Ranks(world_size, "trainer", flags(config), tmp_path / f"output_{first}",
                      note_windows=tmp_path / f"output_{first}")
        assert ranks.wait() == [0] * world_size, ranks.output()
        assert windows(tmp_path / f"output_{first}", first, last) == windows(
            tmp_path / "one_output", first, last)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    val = [[record["loss"] for record in read_log(folder / "metrics.jsonl")["val"].values()]
           for folder in (out, tmp_path / "one")]
    assert val[0] == pytest.approx(val[1], rel=1e-6)
    assert list(read_log(out / "metrics.jsonl")["run"]) == [0, 12, 18, 24]
    assert [read_log(out / "metrics.jsonl")["run"][step]["world_size"]
            for step in (0, 12, 18, 24)] == [2, 1, 4, 2]


# -------------------------------------------------------------------------------- damaged


def finished(corpus, out_dir, **changes):
    """A run of 10 updates with checkpoints 5 and 10, and the configuration to resume it."""
    train(tiny(corpus, out_dir, **changes), CPU_LAUNCH)
    return tiny(corpus, out_dir, resume=True, **changes)


def flip_bit(path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch bomb_went_off",))


def plant_bomb(folder, with_sums: bool) -> None:
    from hashlib import sha256
    path = folder / "training_state.pt"
    old = sha256(path.read_bytes()).hexdigest()
    torch.save({"progress": {"step": 10}, "optimizer": Bomb()}, path)
    if with_sums:
        sums = (folder / "SHA256SUMS").read_text()
        new = sha256(path.read_bytes()).hexdigest()
        (folder / "SHA256SUMS").write_text(sums.replace(old, new))


DAMAGES = {
    "a bit of the configuration": lambda folder: flip_bit(folder / "config.json"),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "weights cut, no sums": lambda folder: (os.truncate(folder / "model.safetensors", 9999),
                                            (folder / "SHA256SUMS").unlink()),
    "empty sums": lambda folder: os.truncate(folder / "SHA256SUMS", 0),
    "a state of another form": lambda folder: (torch.save(3, folder / "training_state.pt"),
                                               (folder / "SHA256SUMS").unlink()),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a bit of the weights": lambda folder: flip_bit(folder / "model.safetensors", 0.9),
    "a bit of the state": lambda folder: flip_bit(folder / "training_state.pt"),
    "weights cut": lambda folder: os.truncate(folder / "model.safetensors", 999),
    "state missing": lambda folder: (folder / "training_state.pt").unlink(),
    "sums cut": lambda folder: os.truncate(folder / "SHA256SUMS", 100),
    "a bomb": lambda folder: plant_bomb(folder, with_sums=False),
    "a bomb with its checksum": lambda folder: plant_bomb(folder, with_sums=True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(corpus, tmp_path, damage, capsys,
                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = finished(corpus, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    DAMAGES[damage](tmp_path / "out" / "step_000010")
    capsys.readouterr()
    train(config, CPU_LAUNCH)
    said = [line for line in capsys.readouterr().out.splitlines() if "skipping" in line]
    assert len(said) == 1 and "step_000010" in said[0]
    assert not (tmp_path / "bomb_went_off").exists()
    assert (tmp_path / "out" / "step_000010.damaged").is_dir()
    assert_same_run(tmp_path / "out", tmp_path / "whole")  # made again from step 5


def test_damaged_weights_are_found_by_every_reader(corpus, tmp_path):
    finished(corpus, tmp_path / "out")
    flip_bit(tmp_path / "out" / "step_000010" / "model.safetensors", 0.7)
    assert "model.safetensors is damaged" in user_error(load_model, tmp_path / "out")
    load_model(tmp_path / "out" / "step_000005")


def test_when_all_are_damaged_nothing_is_overwritten(corpus, tmp_path):
    config = finished(corpus, tmp_path / "out")
    for folder in list_checkpoints(tmp_path / "out"):
        flip_bit(folder / "training_state.pt")
    before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
    assert "none of the 2 checkpoints" in user_error(train, config, CPU_LAUNCH)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == before
    assert len(list_checkpoints(tmp_path / "out")) == 2


def test_a_run_whose_checkpoints_all_lack_their_configuration_is_not_begun_anew(corpus, tmp_path):
    config = finished(corpus, tmp_path / "out")
    for folder in list_checkpoints(tmp_path / "out"):
        (folder / "config.json").unlink()
    assert "none of the 2 checkpoints" in user_error(train, config, CPU_LAUNCH)
    assert len(losses(tmp_path / "out")) == 10


def test_what_is_newer_than_the_run_does_not_push_its_checkpoints_out(corpus, tmp_path):
    """A newer, damaged checkpoint is no reason to delete the one that was just written."""
    config = finished(corpus, tmp_path / "out", max_steps=20, save_interval=5, keep_last=0)
    flip_bit(tmp_path / "out" / "step_000020" / "model.safetensors")
    with StopRequest() as stop:
        stop.name = "SIGTERM"
        train(dataclasses.replace(config, keep_last=1, eval_interval=1000), CPU_LAUNCH, stop)
    kept = [folder.name for folder in list_checkpoints(tmp_path / "out")]
    assert "step_000016" in kept and (tmp_path / "out" / "latest").read_text() == "step_000016\n"


def test_a_log_that_is_no_log_is_said_at_once(corpus, tmp_path):
    config = finished(corpus, tmp_path / "out")
    with open(tmp_path / "out" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("garbage\n")
    assert "is not a record" in user_error(train, dataclasses.replace(config, max_steps=12),
                                           CPU_LAUNCH)
    assert len(list_checkpoints(tmp_path / "out")) == 2


# ------------------------------------------------------------------------------- retention


def test_newest_every_kth_and_best_are_kept(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "out", max_steps=20, save_interval=2, eval_interval=2,
               keep_last=2, keep_every=8), CPU_LAUNCH)
    val = {step: record["loss"] for step, record
           in read_log(tmp_path / "out" / "metrics.jsonl")["val"].items() if step}
    best = min(val, key=val.get)
    kept = {int(folder.name[5:]) for folder in list_checkpoints(tmp_path / "out")}
    assert kept == {8, 16, 18, 20, best}
    assert (tmp_path / "out" / "best").read_text() == f"step_{best:06d}\n"
    assert final_state(tmp_path / "out")["progress"]["best_loss"] == val[best]


def test_the_best_is_kept_while_the_loss_rises(corpus, tmp_path, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 4.5, 4.75, 4.8])
    monkeypatch.setattr("trainer.mean_loss", lambda *arguments: next(values))
    changes = {"save_interval": 2, "eval_interval": 2, "keep_last": 1}
    train(tiny(corpus, tmp_path / "out", max_steps=6, **changes), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "out", max_steps=10, resume=True, **changes), CPU_LAUNCH)
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["step_000002", "step_000010"]
    assert (tmp_path / "out" / "best").read_text() == "step_000002\n"
    load_model(tmp_path / "out" / "best")


# ------------------------------------------------------------------------ in the background


def test_training_goes_on_while_a_checkpoint_is_written(corpus, tmp_path, monkeypatch):
    """Writing is held up until five more updates are made; what lands is the state of its step."""
    from minigpt2 import resume
    real, held = resume.save_checkpoint, []

    def slow(out_dir, step, model, **options):
        if step == 5:
            wait_until(lambda: 9 in read_log(out_dir / "metrics.jsonl")["train"])
            time.sleep(0.5)  # update 10 is to be saved; its copy has to wait for this one
            held.append(step)
        return real(out_dir, step, model, **options)

    monkeypatch.setattr(resume, "save_checkpoint", slow)
    train(tiny(corpus, tmp_path / "slow"), CPU_LAUNCH)
    monkeypatch.setattr(resume, "save_checkpoint", real)
    train(tiny(corpus, tmp_path / "quick"), CPU_LAUNCH)
    assert held == [5]
    for step in ("step_000005", "step_000010"):
        assert ((tmp_path / "slow" / step / "model.safetensors").read_bytes()
                == (tmp_path / "quick" / step / "model.safetensors").read_bytes())
    assert_same_run(tmp_path / "slow", tmp_path / "quick")


def test_a_failed_save_stops_the_run_before_the_next_one(corpus, tmp_path, monkeypatch):
    from minigpt2 import resume
    from minigpt2.config import UserError
    real = resume.save_checkpoint

    def failing(out_dir, step, model, **options):
        if step == 5:
            raise UserError("cannot write step_000005: is the disk full?")
        return real(out_dir, step, model, **options)

    monkeypatch.setattr(resume, "save_checkpoint", failing)
    config = tiny(corpus, tmp_path / "out", max_steps=10_000, save_interval=5)
    assert "disk full" in user_error(train, config, CPU_LAUNCH)
    assert max(losses_by_step(tmp_path / "out")) < 1000


def test_a_checkpoint_in_hand_is_written_though_the_run_fails(corpus, tmp_path, monkeypatch):
    from minigpt2 import resume
    real = resume.save_checkpoint

    def slow(*arguments, **options):
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(resume, "save_checkpoint", slow)
    monkeypatch.setattr("minigpt2.run.agree", lambda *arguments: (float("nan"), 1.0, False))
    config = tiny(corpus, tmp_path / "out", save_interval=1)
    assert "diverged" in user_error(train, config, CPU_LAUNCH)
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["step_000001", "step_000002"]


def test_a_run_stopped_before_its_last_validation_gets_its_best(corpus, tmp_path, monkeypatch):
    with StopRequest() as stop, monkeypatch.context() as patch:
        patch.setattr("trainer.set_lr", lambda optimizer, lr: os.kill(os.getpid(), signal.SIGTERM))
        train(tiny(corpus, tmp_path / "out", max_steps=1, eval_interval=1000), CPU_LAUNCH, stop)
    assert final_state(tmp_path / "out")["progress"]["step"] == 1
    assert not (tmp_path / "out" / "best").exists()
    train(tiny(corpus, tmp_path / "out", max_steps=1, eval_interval=1000, resume=True), CPU_LAUNCH)
    assert (tmp_path / "out" / "best").read_text() == "step_000001\n"
    assert final_state(tmp_path / "out")["progress"]["best_step"] == 1


def losses_by_step(out_dir) -> dict[int, float]:
    return {step: record["loss"]
            for step, record in read_log(out_dir / "metrics.jsonl")["train"].items()}


def test_a_checkpoint_from_when_there_was_a_recipe_flag_is_resumed(corpus, tmp_path):
    config = tiny(corpus, tmp_path / "whole", keep_last=0)
    train(config, CPU_LAUNCH)
    interrupted(tmp_path / "whole", tmp_path / "again", 5)
    folder = tmp_path / "again" / "step_000005"
    state = load_training_state(folder)
    for name in ("optimizer", "schedule", "zero_init"):
        del state["facts"][name]
    state["facts"] |= {"recipe": "gpt2", "code_sha256": "of then"}
    model = load_model(folder)
    shutil.rmtree(folder)
    save_checkpoint(tmp_path / "again", 5, model, training_state=state)
    train(dataclasses.replace(config, out_dir=str(tmp_path / "again"), resume=True), CPU_LAUNCH)
    assert curves(tmp_path / "again") == curves(tmp_path / "whole")
