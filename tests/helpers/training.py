"""A tiny run of trainer.py: its configuration, its command line, and what it left behind."""

import dataclasses
import json
import shutil

import torch

from helpers.common import ROOT
from minigpt2.checkpoint import list_checkpoints, load_model, load_training_state
from minigpt2.metrics import read_log
from trainer import TrainerConfig

SCRIPT = ROOT / "trainer.py"
STEPS = 10


def tiny(corpus, out_dir, **changes) -> TrainerConfig:
    """Ten updates of 8 windows of 16 tokens."""
    options = {"data_dir": str(corpus), "out_dir": str(out_dir), "n_layer": 2, "n_head": 2,
               "n_embd": 16, "block_size": 32, "sequence_length": 16, "total_batch_size": 128,
               "micro_batch_size": 4, "max_steps": STEPS, "warmup_steps": 3, "max_lr": 1e-2,
               "min_lr": 1e-3, "eval_interval": 5, "save_interval": 5, "sample_steps": 2,
               "device": "cpu"} | changes
    return TrainerConfig(**options)


def flags(config: TrainerConfig) -> list[str]:
    """The command line that gives this configuration."""
    argv = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            name = "--" + field.name.replace("_", "-")
            argv += [name] if value is True else [name, str(value)]
    return argv


def trace(out_dir, *columns) -> list[tuple]:
    return [tuple(record[c] for c in columns)
            for _, record in sorted(read_log(out_dir / "metrics.jsonl")["train"].items())]


def losses(out_dir) -> list[float]:
    return [loss for loss, in trace(out_dir, "loss")]


def interrupted(whole, out, at: int):
    """A copy of a run as if it had been killed some updates after its checkpoint `at`."""
    shutil.copytree(whole, out)
    for folder in list_checkpoints(out):
        if folder.name > f"step_{at:06d}":
            shutil.rmtree(folder)
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < at + 2]
    (out / "metrics.jsonl").write_text("".join(kept) + kept[-1][:20])


def final_state(out_dir) -> dict:
    return load_training_state(list_checkpoints(out_dir)[-1])


def curves(out_dir) -> dict:
    """What is logged of every step, but for the speed."""
    log = read_log(out_dir / "metrics.jsonl")
    return {kind: {step: {name: value for name, value in record.items()
                          if name not in ("tokens_per_sec", "mfu")}
                   for step, record in log[kind].items()} for kind in ("train", "val")}


def assert_same_run(a, b) -> None:
    """Weights, optimizer state, progress and curves, bit for bit."""
    for p, q in zip(load_model(a).parameters(), load_model(b).parameters(), strict=True):
        assert torch.equal(p, q)
    states = [final_state(out_dir) for out_dir in (a, b)]
    assert states[0]["progress"] == states[1]["progress"]
    moments = [state["optimizer"]["state"] for state in states]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(value, moments[1][index][name])
    for ours, theirs in zip(states[0]["rng"], states[1]["rng"], strict=True):
        assert torch.equal(ours["cpu"], theirs["cpu"])
    assert curves(a) == curves(b)
