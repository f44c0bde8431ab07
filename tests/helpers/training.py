"""A tiny run of trainer.py: its configuration, its command line, and comparisons of runs."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from helpers.common import CPU_LAUNCH, ROOT, make_corpus
from minigpt2 import run
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state
from minigpt2.faults import StopRequest
from minigpt2.metrics import read_log
from trainer import TrainerConfig

SCRIPT = ROOT / "trainer.py"
STEPS = 10


def tiny_corpus(folder: Path) -> Path:
    """700 validation tokens and 3 training shards of 62 windows of 16 tokens. Only 50 distinct ids
    occur, so the loss falls within ten steps."""
    return make_corpus(folder, [700, 1003, 1000, 1001], high=50)


def tiny(corpus: Path, out_dir: Path, **changes) -> TrainerConfig:
    """Ten steps of 8 windows of 16 tokens."""
    options = {"data_dir": str(corpus), "out_dir": str(out_dir), "n_layer": 2, "n_head": 2,
               "n_embd": 16, "block_size": 32, "sequence_length": 16, "total_batch_size": 128,
               "micro_batch_size": 4, "max_steps": STEPS, "warmup_steps": 3, "max_lr": 1e-2,
               "min_lr": 1e-3, "eval_interval": 5, "eval_tokens": 160, "save_interval": 5,
               "sample_tokens": 0, "device": "cpu"} | changes
    return TrainerConfig(**options)


def flags(config) -> list[str]:
    """The command line that gives this configuration."""
    argv = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            name = "--" + field.name.replace("_", "-")
            argv += [name] if value is True else [name, str(value)]
    return argv


def trace(out_dir: Path, *columns: str) -> list[tuple]:
    """The given columns of the train records, by step."""
    return [tuple(record[c] for c in columns)
            for _, record in sorted(read_log(out_dir / "metrics.jsonl")["train"].items())]


def losses(out_dir: Path) -> list[float]:
    return [loss for loss, in trace(out_dir, "loss")]


def num_records(out_dir: Path) -> int:
    """Complete lines in the run log."""
    path = out_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def interrupted(whole: Path, out_dir: Path, at: int) -> Path:
    """Copies a run to out_dir as if it had been killed two steps after checkpoint `at`, while it
    wrote a line of its log."""
    shutil.copytree(whole, out_dir, symlinks=True, ignore=lambda _, names: [
        name for name in names if name.startswith("step_") and name > f"step_{at:06d}"])
    lines = (out_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < at + 2]
    (out_dir / "metrics.jsonl").write_text("".join(kept) + kept[-1][:20])
    return out_dir


def final_state(out_dir: Path) -> dict:
    return load_training_state(list_checkpoints(out_dir)[-1])


def curves(out_dir: Path) -> dict:
    """The train and val records, without the measured speed."""
    log = read_log(out_dir / "metrics.jsonl")
    return {kind: {step: {name: value for name, value in record.items()
                          if name not in ("tokens_per_sec", "mfu")
                          and not name.endswith("_seconds")}
                   for step, record in log[kind].items()} for kind in ("train", "val")}


def assert_same_model(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def assert_same_run(a: Path, b: Path, has_state: bool = True) -> None:
    """Equal weights, optimizer state, progress and curves, bit for bit."""
    assert_same_model(load_model(a), load_model(b))
    states = [final_state(out_dir) for out_dir in (a, b)]
    assert states[0]["progress"] == states[1]["progress"]
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys() and (moments[0] or not has_state)
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(moments[1][index][name]))
    assert curves(a) == curves(b)


def signal_at_the_end_of_a_step(monkeypatch, stop: StopRequest) -> None:
    """A signal while a step is taken, after its last micro-step: the step is completed."""
    real = run.step_if_finite
    monkeypatch.setattr(run, "step_if_finite", lambda *arguments: (
        real(*arguments), stop.handle(signal.SIGTERM, None)))


def stopped_in_micro_step(train, config, number: int) -> tuple[int, int]:
    """Runs a script until it ends after a signal in its micro-step `number` (from 1). Returns how
    many micro-steps it ran, and the steps of its newest checkpoint."""
    real, numbers = run.Run.micro_steps, []

    def micro_steps(self, batches):
        for batch in real(self, batches):
            numbers.append(len(numbers) + 1)
            if len(numbers) == number:
                stop.handle(signal.SIGTERM, None)
            yield batch

    with pytest.MonkeyPatch.context() as patch, StopRequest() as stop:
        patch.setattr(run.Run, "micro_steps", micro_steps)
        train(config, CPU_LAUNCH, stop)
    return len(numbers), final_state(Path(config.out_dir))["progress"]["step"]


def stop_in_micro_steps_and_finish(train, config, micro_steps: int) -> tuple[Path, Path]:
    """Runs a script whose steps have so many micro-steps uninterrupted, and again with signals in
    the first micro-step, in the last but one of the second step, and in the next run's first: each
    leaves the last complete step. Returns the folders of both, for the test to compare."""
    config = dataclasses.replace(config, save_interval=1000, eval_interval=1000, resume=True)
    whole = dataclasses.replace(config, out_dir=f"{config.out_dir}_whole")
    train(whole, CPU_LAUNCH)
    for number, steps in ((1, 0), (2 * micro_steps - 1, 1), (1, 1)):
        assert stopped_in_micro_step(train, config, number) == (number, steps)
    train(config, CPU_LAUNCH)
    return Path(config.out_dir), Path(whole.out_dir)


class StopAfter(StopRequest):
    """A signal that comes when it has been asked for `count` times."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def requested(self) -> bool:
        self.count -= 1
        if self.count < 0:
            self.name = "SIGTERM"
        return super().requested()
