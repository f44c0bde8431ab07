"""The progress bar of a run: what it is doing, and a time left that is true."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import types
import unittest.mock

import pytest
import torch
from helpers import toy_script
from helpers.common import CPU_LAUNCH, ROOT
from helpers.ranks import wait_until
from helpers.toy_script import ToyConfig

from minigpt2 import progress, run
from minigpt2.progress import Pace, progress_bar


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(progress, "perf_counter", lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_only_usual_steps_count(monkeypatch):
    """Not the first one, one that compiles, or what comes between steps."""
    clock = Clock(monkeypatch)
    pace = Pace()
    pace.begin("validating", 5)
    clock.sleep(100)
    pace.begin()
    assert (pace.doing, pace.left(0, 10)) == ("first step", None)
    clock.sleep(50)
    assert pace.end_step() == 50 and pace.left(1, 10) is None
    for seconds in (2, 4):
        clock.sleep(seconds)
        assert pace.end_step() == seconds and pace.doing == ""
    pace.compiling()
    assert pace.doing == "compiling"
    clock.sleep(60)
    assert pace.end_step() == 60 and pace.doing == ""
    assert list(pace.steps) == [2, 4] and pace.overhead_s == 100
    assert pace.left(4, 10) == 6 * 3 + 2 * 100  # validations after steps 5 and 10


def test_a_closed_stderr_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(2, 0, "steps") as bar:
        bar.update()
    assert bar.n == 1


def test_the_time_left_goes_down_also_within_a_part(monkeypatch):
    clock = Clock(monkeypatch)
    pace = Pace(milestones=[12])
    for seconds in (9, 3):
        clock.sleep(seconds)
        pace.end_step()
    assert pace.left(2, 12) == 30
    clock.sleep(2)
    assert pace.left(2, 12) == 28
    clock.sleep(5)
    assert pace.left(2, 12) == 27  # the step in progress takes longer than usual
    pace.begin("saving", 5)
    clock.sleep(7)
    pace.begin("sampling", 0)  # comes once
    clock.sleep(1000)
    pace.begin()
    assert pace.left(2, 12) == 30 + 3 * 7  # after steps 5, 10 and 12
    pace.begin("saving", 5)
    clock.sleep(4)
    assert pace.left(5, 12) == 7 * 3 + 2 * 7 + 3


def test_a_resumed_run_says_that_the_time_of_validations_is_missing(monkeypatch, capsys):
    """Until one has run: a checkpoint whose weights are validated is not validated again."""
    clock = Clock(monkeypatch)
    pace = Pace(milestones=[12])
    with progress_bar(12, 5, "training", pace=pace) as bar:
        pace.begin("saving", 5)
        pace.begin()
        assert str(bar).endswith("? left]")
        for seconds in (9, 3):
            clock.sleep(seconds)
            pace.end_step()
            bar.update()
        assert str(bar).endswith(" 00:15 + validations left]")
        pace.begin("validating", 10)
        clock.sleep(2)
        pace.begin()
        assert str(bar).endswith(" 00:19 left]")  # two to come


class Slow:
    """The parts of a toy run take known times: a first step, a validation, a checkpoint."""

    def __init__(self, monkeypatch, first, step, validation, checkpoint):
        self.clock, self.lefts, count = Clock(monkeypatch), [], iter(range(10**6))
        real_due, real_save = run.Run.eval_due, run.resume.CheckpointWriter.save
        real_micro_steps = run.Run.micro_steps

        def eval_due(this):
            if due := real_due(this):
                assert this.pace.doing == "validating"
                self.clock.sleep(validation)
            return due

        def save(writer, state, *arguments):
            if state.step != writer.saved_step:
                self.clock.sleep(checkpoint)
            real_save(writer, state, *arguments)

        def micro_steps(this, batches):
            if this.step >= 10:
                self.lefts.append((self.clock.now, this.pace.left(this.bar.n, this.max_steps)))
            return real_micro_steps(this, batches)

        def end_step(pace, real=run.Pace.end_step):  # the host has waited for the step
            number = next(count)
            self.clock.sleep(step * (1 + 0.1 * (-1) ** number) if number else first)
            return real(pace)

        monkeypatch.setattr(run.Run, "eval_due", eval_due)
        monkeypatch.setattr(run.resume.CheckpointWriter, "save", save)
        monkeypatch.setattr(run.Run, "micro_steps", micro_steps)
        monkeypatch.setattr(run.Pace, "end_step", end_step)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("parts", [
    {"first": 120, "step": 1, "validation": 40, "checkpoint": 0.5},
    {"first": 1, "step": 0.1, "validation": 30, "checkpoint": 0.1},
    {"first": 0.1, "step": 60, "validation": 0, "checkpoint": 2}])
def test_the_time_left_is_true_within_20_percent_after_the_tenth_step(tmp_path, monkeypatch, parts,
                                                                      late):
    """In a run with validations and checkpoints, at any step from the tenth on."""
    monkeypatch.setitem(run.STEPS_LATE, "cpu", late)
    slow = Slow(monkeypatch, **parts)
    toy_script.train(ToyConfig(out_dir=str(tmp_path), device="cpu", steps=60, eval_interval=16,
                               save_interval=20), CPU_LAUNCH)
    assert len(slow.lefts) == 50
    for now, left in slow.lefts:
        assert left == pytest.approx(slow.clock.now - now, rel=0.2)


def test_a_first_step_that_compiles_says_so(tmp_path, monkeypatch):
    """And does not count, as any later step for which a shape is compiled."""
    doing = []

    def micro_steps(this, batches, real=run.Run.micro_steps):
        for batch in real(this, batches):
            doing.append(this.pace.doing)
            yield batch[:2 if this.step < 3 else 1]
            doing.append(this.pace.doing)

    monkeypatch.setattr(run.Run, "micro_steps", micro_steps)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, real=torch.nn.Module.compile,
                        **options: real(self, **options | {"backend": "eager"}))
    config = ToyConfig(out_dir=str(tmp_path), device="cpu", steps=5, compile=True,
                       micro_batch_size=8)
    paces, real = [], run.Pace
    monkeypatch.setattr(run, "Pace", lambda *a: (paces.append(real(*a)), paces[-1])[1])
    toy_script.train(config, CPU_LAUNCH)
    assert doing == ["first step", "compiling", "", "", "", "", "", "compiling", "", ""]
    assert len(paces[0].steps) == 3


def test_without_a_terminal_there_is_a_line_whatever_the_run_does(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    pace, err = Pace(), []

    def lines() -> int:
        err.append(capsys.readouterr().err)
        return "".join(err).count("\n")

    with progress_bar(50, 10, "training", pace=pace) as bar:
        pace.begin("validating", 5)
        wait_until(lambda: lines() > 5)
        bar.write("a result")
        pace.begin()
        bar.update()
    text = "".join(err) + capsys.readouterr().err
    assert "\r" not in text and all(line.startswith("training") for line in text.splitlines())
    assert "training, validating:  20%|" in text and "| 10/50 [00:0" in text
    assert "| 11/50 [00:0" in text.splitlines()[-1] and "? left]" in text


def test_other_bars_write_lines_too(capsys):
    assert list(progress_bar(3, 0, "reading", unit="file", over=[1, 2, 3])) == [1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading:   0%") and lines[-1].startswith("reading: 100%")
    assert "| 0/3 [" in lines[0] and "| 3/3 [" in lines[-1]  # not 3.00/3.00, as of many tokens
    with progress_bar(3, 0, "reading", enabled=False, pace=Pace()):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("size, expected", [((0, 0), "work: 100%|##"), ((24, 80), "work: 100%|█")])
def test_a_terminal_without_a_size_gets_lines(size, expected):
    """As that of a container: tqdm would draw a bar of no columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, size)
    code = ("from minigpt2.progress import progress_bar\n"
            "with progress_bar(3, 0, 'work') as bar: bar.update(3)")
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, cwd=ROOT,
                   env=os.environ | {"PYTHONUTF8": "1"})
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # EIO is the end
        while part := os.read(ours, 100_000):
            output += part
    assert expected in output.decode()
    os.close(ours)


def test_the_numbers_of_a_step_are_read_after_their_copy():
    """On a GPU, the host's copy holds nothing before its event is reached."""
    copy, logged = torch.zeros(2), {}
    event = types.SimpleNamespace(synchronize=lambda: copy.copy_(torch.tensor([2.5, 0.5])))
    ours = object.__new__(run.Run)
    ours.unread, ours.state = [(copy, event, [], 4, 1.0, {})], run.resume.TrainState(step=1)
    ours.launch, ours.pace = CPU_LAUNCH, Pace()
    ours.scaler, ours.bar = torch.amp.GradScaler("cpu", enabled=False), unittest.mock.Mock()
    ours.log = types.SimpleNamespace(write=lambda step, kind, **values: logged.update(values))
    ours.read_steps()
    assert (logged["loss"], logged["grad_norm"], ours.unread) == (2.5, 0.5, [])


def test_speed_is_of_all_ranks_and_mfu_of_each(monkeypatch):
    """4 tokens in 2 seconds, and 1 FLOP in them: half a FLOP/s by two GPUs of 0.25 FLOP/s."""
    logged, ours = {}, object.__new__(run.Run)
    ours.unread, ours.state = [(torch.ones(2), None, [], 4, 1.0, {})], run.resume.TrainState(step=1)
    ours.launch = run.Launch(0, 2, torch.device("cpu"))
    ours.pace = types.SimpleNamespace(end_step=lambda: 2.0)
    ours.scaler, ours.bar = torch.amp.GradScaler("cpu", enabled=False), unittest.mock.Mock()
    ours.log = types.SimpleNamespace(write=lambda step, kind, **values: logged.update(values))
    monkeypatch.setattr(run, "peak_flops", lambda device: 0.25)
    ours.read_steps()
    assert (logged["tokens_per_sec"], logged["mfu"], logged["loss"]) == (2.0, 1.0, 0.5)
