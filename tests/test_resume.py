"""Interrupted runs end bit-equal to uninterrupted ones: killed, moved to another number of ranks,
resumed past damaged checkpoints. And which checkpoints are kept."""

import dataclasses
import errno
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import torch
from helpers.common import CPU_LAUNCH, TINY, make_corpus, user_error
from helpers.ranks import Ranks, wait_until
from helpers.training import (
    assert_same_run,
    curves,
    final_state,
    flags,
    interrupted,
    losses,
    signal_at_the_end_of_a_step,
    tiny,
    trace,
)

from minigpt2 import checkpoint, resume
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state, save_checkpoint
from minigpt2.config import UserError
from minigpt2.distributed import Launch
from minigpt2.faults import StopRequest
from minigpt2.metrics import read_log
from minigpt2.optimizer import set_lr
from minigpt2.resume import CheckpointWriter, TrainState
from model import GPT
from trainer import train

# --------------------------------------------------------------------------------- killed


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_killed_20_times_ends_bit_equal_to_an_uninterrupted_one(corpus, tmp_path, world_size):
    """Killed in turn at a random instant, just after it has saved a checkpoint, and while it writes
    one. Every process is held after 4 steps, so that no kill comes after the last step."""
    config = tiny(corpus, tmp_path / "whole", max_steps=66, micro_batch_size=2, save_interval=3,
                  total_batch_size=64, eval_interval=7, keep_last=2, resume=True)
    whole = Ranks(world_size, "trainer", flags(config), tmp_path / "whole_ranks")
    assert whole.wait() == [0] * world_size, whole.output()

    out, random, newest = tmp_path / "killed", np.random.RandomState(world_size), set()
    argv = flags(dataclasses.replace(config, out_dir=str(out)))
    for kill in range(20):
        saved = list_checkpoints(out)
        ranks = Ranks(world_size, "trainer", argv, tmp_path / f"ranks_{kill}",
                      hold=(4, tmp_path / "never"))
        if kill % 3 == 0:
            time.sleep(random.uniform(0, 1))
        elif kill % 3 == 1:
            wait_until(lambda: list_checkpoints(out) != saved, ranks)  # noqa: B023
            time.sleep(random.uniform(0, 0.05))
        else:  # or just after, where the poll misses it
            wait_until(lambda: any(out.glob(".step_*.tmp")) or list_checkpoints(out) != saved,  # noqa: B023
                       ranks)
            time.sleep(random.uniform(0, 0.02))
        ranks.kill()
        assert ranks.wait() == [-9] * world_size, ranks.output()
        for folder in list_checkpoints(out):
            load_model(folder)
            load_training_state(folder)
            newest.add(folder.name)
    assert len(newest) > 3, newest
    last = Ranks(world_size, "trainer", argv, tmp_path / "last_ranks")
    assert last.wait() == [0] * world_size, last.output()
    assert list_checkpoints(out)[0].name != "step_000003"  # old ones were removed
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_windows_and_losses_do_not_depend_on_the_world_size(tmp_path):
    """Resumed after every third step at 2, 1, 4 and 2 ranks, across shard boundaries and, in step
    7, the epoch boundary."""
    corpus = make_corpus(tmp_path / "data", [700, 323, 320, 321], high=50)  # 59 windows, 8 a step
    config = tiny(corpus, tmp_path / "one", max_steps=12, save_interval=3, eval_interval=3,
                  micro_batch_size=2, keep_last=0)
    whole = Ranks(1, "trainer", flags(config), tmp_path / "one_ranks",
                  record_windows=tmp_path / "one_ranks")
    assert whole.wait() == [0], whole.output()

    def windows(folder, first, last):
        """step -> the sorted windows that all ranks read in it."""
        seen = {}
        for path in folder.glob("windows_*.jsonl"):
            for line in path.read_text().splitlines():
                step, places = json.loads(line)
                seen.setdefault(step, []).extend(map(tuple, places))
        return {step: sorted(seen[step]) for step in range(first, last)}

    out, moves = tmp_path / "moved", [(0, 3, 2), (3, 6, 1), (6, 9, 4), (9, 12, 2)]
    config = dataclasses.replace(config, out_dir=str(out), micro_batch_size=1, resume=True)
    for first, last, world_size in moves:
        if first:
            interrupted(out, tmp_path / "cut", first)
            shutil.rmtree(out)
            (tmp_path / "cut").rename(out)
        folder = tmp_path / f"ranks_{first}"
        ranks = Ranks(world_size, "trainer", flags(config), folder, record_windows=folder)
        assert ranks.wait() == [0] * world_size, ranks.output()
        assert windows(folder, first, last) == windows(tmp_path / "one_ranks", first, last)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    val = [[record["loss"] for record in read_log(folder / "metrics.jsonl")["val"].values()]
           for folder in (out, tmp_path / "one")]
    assert val[0] == pytest.approx(val[1], rel=1e-6)
    starts = read_log(out / "metrics.jsonl")["run"]
    assert {step: record["world_size"] for step, record in starts.items()} == {
        first: world_size for first, _, world_size in moves}


# -------------------------------------------------------------------- damaged checkpoints


@pytest.fixture
def out(tmp_path, finished_run):
    """A copy of the finished run, with checkpoints 5 and 10."""
    return shutil.copytree(finished_run, tmp_path / "out")


def flip_bit(path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


class Bomb:
    """Unpickling it creates a file."""

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
    "bit flip in the configuration": lambda folder: flip_bit(folder / "config.json"),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "truncated weights without sums": lambda folder: (
        os.truncate(folder / "model.safetensors", 9999), (folder / "SHA256SUMS").unlink()),
    "empty sums": lambda folder: os.truncate(folder / "SHA256SUMS", 0),
    "unknown state format": lambda folder: (torch.save(3, folder / "training_state.pt"),
                                            (folder / "SHA256SUMS").unlink()),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "bit flip in the weights": lambda folder: flip_bit(folder / "model.safetensors", 0.9),
    "bit flip in the state": lambda folder: flip_bit(folder / "training_state.pt"),
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 999),
    "no state": lambda folder: (folder / "training_state.pt").unlink(),
    "truncated sums": lambda folder: os.truncate(folder / "SHA256SUMS", 100),
    "bomb": lambda folder: plant_bomb(folder, with_sums=False),
    "bomb with its checksum": lambda folder: plant_bomb(folder, with_sums=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_previous_one(corpus, out, finished_run, damage,
                                                              capsys, monkeypatch):
    monkeypatch.chdir(out.parent)
    DAMAGES[damage](out / "step_000010")
    train(tiny(corpus, out, resume=True), CPU_LAUNCH)
    skipped = [line for line in capsys.readouterr().out.splitlines() if "skipping" in line]
    assert len(skipped) == 1 and "step_000010" in skipped[0]
    assert not (out.parent / "bomb_went_off").exists()
    assert (out / "step_000010.damaged").is_dir()
    assert_same_run(out, finished_run)  # step 10 again, from step 5


def test_every_reader_detects_damaged_weights(out):
    flip_bit(out / "step_000010" / "model.safetensors", 0.7)
    message = user_error(load_model, out)
    assert "step_000010/model.safetensors (it is damaged" in message and "SHA256SUMS" in message
    load_model(out / "step_000005")


@pytest.mark.parametrize("damage", [
    lambda folder: flip_bit(folder / "training_state.pt"), DAMAGES["no configuration"]])
def test_a_run_without_an_intact_checkpoint_is_not_overwritten(corpus, out, damage):
    folders = list_checkpoints(out)
    for folder in folders:
        damage(folder)
    before = (out / "metrics.jsonl").read_bytes()
    message = user_error(train, tiny(corpus, out, resume=True), CPU_LAUNCH)
    assert "none of the 2 checkpoints" in message
    assert (out / "metrics.jsonl").read_bytes() == before
    assert all(folder.is_dir() for folder in folders)


def test_a_newer_damaged_checkpoint_does_not_displace_a_new_one(corpus, tmp_path, monkeypatch):
    """Retention must not delete the checkpoint that was just written."""
    config = tiny(corpus, tmp_path / "out", max_steps=8, save_interval=2, keep_last=0)
    train(config, CPU_LAUNCH)
    flip_bit(tmp_path / "out" / "step_000008" / "model.safetensors")
    with StopRequest() as stop, monkeypatch.context() as patch:
        signal_at_the_end_of_a_step(patch, stop)
        train(dataclasses.replace(config, keep_last=1, eval_interval=1000, resume=True),
              CPU_LAUNCH, stop)
    kept = [folder.name for folder in list_checkpoints(tmp_path / "out")]
    assert "step_000007" in kept and (
        tmp_path / "out" / "latest").readlink().name == "step_000007"


def test_a_disk_that_fails_does_not_discard_a_good_checkpoint(corpus, out, monkeypatch):
    """Only what is damaged or missing is renamed; the next try may find the disk in order."""
    real, newest = checkpoint.sha256_of, list_checkpoints(out)[-1]

    def failing(path):
        if path.parent == newest:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", failing)
        message = user_error(train, tiny(corpus, out, resume=True, max_steps=12), CPU_LAUNCH)
    assert "Input/output error" in message and newest.is_dir()
    train(tiny(corpus, out, resume=True, max_steps=12), CPU_LAUNCH)
    assert not list(out.glob("*.damaged"))


def test_a_line_of_its_own_in_the_samples_does_not_stop_a_run(corpus, out):
    """Nothing reads them again."""
    with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write("note\n")
    train(tiny(corpus, out, resume=True, max_steps=12, eval_interval=1, sample_tokens=2),
          CPU_LAUNCH)
    lines = (out / "samples.jsonl").read_text().splitlines()
    assert "note" in lines and json.loads(lines[-1])["step"] == 12


def test_a_damaged_log_is_reported_at_the_start(corpus, out):
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("garbage\n")
    error = user_error(train, tiny(corpus, out, resume=True, max_steps=12), CPU_LAUNCH)
    assert "is no record, delete it" in error
    assert len(list_checkpoints(out)) == 2


# ------------------------------------------------------------------------------- retention


def test_newest_and_best_checkpoints_are_kept(corpus, tmp_path):
    train(tiny(corpus, tmp_path / "out", max_steps=10, save_interval=1, eval_interval=1,
               keep_last=2), CPU_LAUNCH)
    val = {step: record["loss"] for step, record
           in read_log(tmp_path / "out" / "metrics.jsonl")["val"].items() if step}
    best = min(val, key=val.get)
    kept = {int(folder.name[5:]) for folder in list_checkpoints(tmp_path / "out")}
    assert kept == {9, 10, best}
    assert (tmp_path / "out" / "best").readlink().name == f"step_{best:06d}"
    assert final_state(tmp_path / "out")["progress"]["best_loss"] == val[best]


def test_the_best_checkpoint_is_kept_while_the_loss_rises(corpus, tmp_path, monkeypatch):
    values = iter([5.0, 3.0, 4.0, 4.5, 4.75, 4.8])
    monkeypatch.setattr("trainer.mean_loss", lambda *arguments: next(values))
    changes = {"save_interval": 1, "eval_interval": 1, "keep_last": 1}
    train(tiny(corpus, tmp_path / "out", max_steps=3, **changes), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "out", max_steps=5, resume=True, **changes), CPU_LAUNCH)
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["step_000001", "step_000005"]
    assert (tmp_path / "out" / "best").readlink().name == "step_000001"
    load_model(tmp_path / "out" / "best")


# --------------------------------------------------------------- checkpoints in the background


def test_training_continues_while_a_checkpoint_is_written(corpus, tmp_path, finished_run,
                                                          monkeypatch):
    """Checkpoint 5 is not written before checkpoint 10 waits for it, four steps later; each holds
    the state of its own step."""
    real_save, real_wait = checkpoint.save_checkpoint, resume.CheckpointWriter.wait
    waiting, last_steps = threading.Event(), []

    def slow_save(out_dir, step, model, **options):
        if step == 5:
            assert waiting.wait(120)
            last_steps.append(max(read_log(out_dir / "metrics.jsonl")["train"]))
        return real_save(out_dir, step, model, **options)

    def wait(self, block=True):
        if block and self.pending is not None:
            waiting.set()
        real_wait(self, block)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow_save)
    monkeypatch.setattr(resume.CheckpointWriter, "wait", wait)
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    assert last_steps == [9]
    for step in ("step_000005", "step_000010"):
        assert ((tmp_path / "out" / step / "model.safetensors").read_bytes()
                == (finished_run / step / "model.safetensors").read_bytes())
    assert_same_run(tmp_path / "out", finished_run)


def test_a_resumed_run_repeats_random_numbers(corpus, tmp_path, finished_run, monkeypatch):
    """Of a user's dropout, for example; every step and every rank has its own."""
    drawn = []

    def set_lr_and_draw(optimizer, lr):
        set_lr(optimizer, lr)
        drawn.append(torch.rand(()).item())

    monkeypatch.setattr("trainer.set_lr", set_lr_and_draw)
    train(tiny(corpus, tmp_path / "out"), CPU_LAUNCH)
    whole, drawn[:] = [*drawn], []
    train(tiny(corpus, interrupted(finished_run, tmp_path / "resumed", 5), resume=True), CPU_LAUNCH)
    assert drawn == whole[5:] and len(set(whole)) == 10
    drawn.clear()
    train(tiny(corpus, tmp_path / "rank_1"), Launch(1, 1, torch.device("cpu")))
    assert len(drawn) == 10 and not {*drawn} & {*whole}


def test_resume_repairs_latest_and_best(corpus, tmp_path, finished_run):
    """As a kill between the rename of a checkpoint and the writing of these files leaves them."""
    out = tmp_path / "out"
    shutil.copytree(finished_run, out, symlinks=True)
    expected = {name: (out / name).readlink() for name in ("latest", "best")}
    (out / "latest").unlink()
    (out / "latest").symlink_to("step_000001")
    (out / "best").unlink()
    train(tiny(corpus, out, resume=True), CPU_LAUNCH)
    assert {name: (out / name).readlink() for name in expected} == expected


def test_resume_finds_a_checkpoint_whose_replacement_was_interrupted(corpus, out, finished_run,
                                                                     capsys):
    (out / "step_000010").rename(out / ".step_000010.replaced")
    train(tiny(corpus, out, resume=True), CPU_LAUNCH)
    assert "after 10 of 10 steps" in capsys.readouterr().out
    assert_same_run(out, finished_run)


def test_a_failed_save_stops_the_run(corpus, tmp_path, monkeypatch):
    real = checkpoint.save_checkpoint

    def failing(out_dir, step, model, **options):
        if step == 5:
            raise UserError("cannot write step_000005: is the disk full?")
        return real(out_dir, step, model, **options)

    monkeypatch.setattr(checkpoint, "save_checkpoint", failing)
    config = tiny(corpus, tmp_path / "out", max_steps=10_000, save_interval=5)
    assert "disk full" in user_error(train, config, CPU_LAUNCH)
    assert len(trace(tmp_path / "out", "loss")) < 1000


def test_a_pending_checkpoint_is_written_although_the_run_fails(corpus, tmp_path, monkeypatch):
    real, failing = checkpoint.save_checkpoint, threading.Event()

    def slow(out_dir, step, model, **options):
        assert step == 1 or failing.wait(120)
        return real(out_dir, step, model, **options)

    def exit_writer(self, *arguments):
        failing.set()
        return real_exit(self, *arguments)

    real_exit = resume.CheckpointWriter.__exit__
    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(resume.CheckpointWriter, "__exit__", exit_writer)
    monkeypatch.setattr(Launch, "sum", lambda self, tensor: (  # float32: of a training step
        tensor * float("nan") if tensor.dtype == torch.float32 else tensor))
    config = tiny(corpus, tmp_path / "out", save_interval=1)
    assert "diverged" in user_error(train, config, CPU_LAUNCH)
    assert [f.name for f in list_checkpoints(tmp_path / "out")] == ["step_000001", "step_000002"]


def test_a_run_stopped_before_its_last_validation_gets_its_best(corpus, tmp_path, monkeypatch):
    with StopRequest() as stop, monkeypatch.context() as patch:
        signal_at_the_end_of_a_step(patch, stop)
        train(tiny(corpus, tmp_path / "out", max_steps=1, eval_interval=1000), CPU_LAUNCH, stop)
    assert final_state(tmp_path / "out")["progress"]["step"] == 1
    assert not (tmp_path / "out" / "best").exists()
    train(tiny(corpus, tmp_path / "out", max_steps=1, eval_interval=1000, resume=True), CPU_LAUNCH)
    assert (tmp_path / "out" / "best").readlink().name == "step_000001"
    assert final_state(tmp_path / "out")["progress"]["best_step"] == 1


def test_zero_init_of_a_resumed_run_is_reported_as_ignored(corpus, tmp_path, finished_run, capsys):
    out = interrupted(finished_run, tmp_path / "out", 5)
    train(tiny(corpus, out, resume=True, zero_init=True), CPU_LAUNCH)
    assert "--zero-init True is ignored, the run began with False" in capsys.readouterr().out
    assert curves(out) == curves(finished_run)


def test_a_checkpoint_of_an_older_version_is_resumed(corpus, tmp_path, finished_run):
    out = interrupted(finished_run, tmp_path / "out", 5)
    folder = out / "step_000005"
    state = load_training_state(folder)
    for name in ("optimizer", "schedule", "zero_init"):
        del state["facts"][name]
    state["facts"] |= {"recipe": "gpt2", "code_sha256": "of then"}
    state["progress"]["scored_step"] = None  # recorded by later versions, not by this one
    model = load_model(folder)
    shutil.rmtree(folder)
    save_checkpoint(out, 5, model, training_state=state)
    train(tiny(corpus, out, resume=True), CPU_LAUNCH)
    assert curves(out) == curves(finished_run)


def test_a_gpu_has_finished_all_copies_before_they_are_written(tmp_path, monkeypatch):
    order, model = [], GPT(TINY)
    monkeypatch.setattr(CheckpointWriter, "copy",
                        lambda self, value, name: order.append(name) or value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("synchronize"))
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *_, **__: order.append("write"))
    launch = dataclasses.replace(CPU_LAUNCH, device=torch.device("cuda"))
    with CheckpointWriter(tmp_path, launch, {}, saved_step=None) as writer:
        writer.save(TrainState(step=1), model, torch.optim.AdamW(model.parameters()),
                    torch.amp.GradScaler("cpu", enabled=False), value=model)
    assert order == ["model", "value", "synchronize", "write"]
