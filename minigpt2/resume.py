"""Going on with a run: what is saved beside the weights, how it is written while training goes on,
and how the newest checkpoint that is whole is found again.

The training state of a checkpoint holds the optimizer, the gradient scaler, the random generators
of every rank, `TrainState`, and the facts of the run (`metrics.run_metadata`): settings, versions,
the data's SHA-256. The data need no cursor of their own: which rows an update sees follows from its
number alone.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minigpt2.checkpoint import (
    list_step_folders,
    load_training_state,
    model_from_parameters,
    read_config,
    read_tensors,
    save_checkpoint,
    step_folder,
    verify,
)
from minigpt2.config import UserError, first_line, flag_name
from minigpt2.distributed import Launch
from minigpt2.files import folder_lock
from minigpt2.optimizer import load_optimizer_state, optimizer_state
from model import GPT

STATE_PARTS = {"progress", "optimizer", "scaler", "rng", "facts"}


@dataclass
class TrainState:
    """How far a run is, beside its weights and its optimizer."""

    step: int = 0  # updates made, skipped ones included
    val_loss: float | None = None  # of the weights as they are, if they were evaluated
    best_loss: float = math.inf  # the lowest validation loss of a checkpoint
    best_step: int | None = None  # that checkpoint
    skipped: int = 0  # updates in a row that were skipped because they were not finite


# --------------------------------------------------------------------------------- saving


def training_state(progress: TrainState, optimizer: torch.optim.Optimizer,
                   scaler: torch.amp.GradScaler, launch: Launch) -> dict:
    """What a checkpoint holds beside the model, complete on rank 0. All ranks call this: the
    generators of each, and its part of a sharded optimizer, come to rank 0."""
    return {"progress": dataclasses.asdict(progress),
            "optimizer": optimizer_state(optimizer, launch.is_master),
            "scaler": scaler.state_dict(), "rng": launch.gather(rng_state(launch.device))}


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


class CheckpointWriter:
    """Saves on a thread of its own, one checkpoint at a time, from a copy in host memory: training
    waits for the copy, and for the disk only when a save is asked for before the last one is done.

    `facts` are what every checkpoint says of the run.
    """

    def __init__(self, out_dir: Path, launch: Launch, facts: dict, *, keep_last: int,
                 keep_every: int, saved_step: int | None, prompt_template: str | None = None):
        self.out_dir, self.launch, self.facts, self.saved_step = out_dir, launch, facts, saved_step
        self.options = {"keep_last": keep_last, "keep_every": keep_every,
                        "prompt_template": prompt_template}
        self.buffers: dict[str, torch.Tensor] = {}  # reused: pinned memory is slow to get
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.lock = contextlib.ExitStack()  # on the folder: two runs would delete each other's

    def save(self, progress: TrainState, model: GPT, optimizer: torch.optim.Optimizer,
             scaler: torch.amp.GradScaler) -> None:
        """Copies the run as it is and begins to write it, unless this step is saved already and was
        not found to be the best since. All ranks call this. Raises UserError when the checkpoint
        before could not be written."""
        best_before = progress.best_step
        if progress.val_loss is not None and progress.val_loss < progress.best_loss:
            progress.best_loss, progress.best_step = progress.val_loss, progress.step
        if progress.step == self.saved_step and progress.best_step == best_before:
            return
        self.saved_step = progress.step
        state = training_state(progress, optimizer, scaler, self.launch) | {"facts": self.facts}
        if not self.launch.is_master:
            return
        self.wait()
        parameters = self.copy(dict(model.named_parameters()), "model")
        state = self.copy(state, "state")
        if self.launch.device_type == "cuda":
            torch.cuda.synchronize(self.launch.device)  # the copies are there
        self.pending = self.thread.submit(
            save_checkpoint, self.out_dir, progress.step,
            model_from_parameters(model.config, parameters), training_state=state,
            best_step=progress.best_step, **self.options)

    @torch.no_grad()
    def copy(self, value, name: str):
        """A value with every tensor in it copied to the host, into the buffer of that name: tensors
        of the next save have the same names, though not the same identities."""
        if isinstance(value, dict):
            return {key: self.copy(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self.copy(item, f"{name}/{i}") for i, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)

    @property
    def folder(self) -> Path:
        """The newest checkpoint, once it is written."""
        return step_folder(self.out_dir, self.saved_step)

    def poll(self) -> None:
        """Raises UserError, as soon as it is known, when a checkpoint could not be written."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint in hand is on the disk. Raises UserError when it cannot be."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        if self.launch.is_master:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(folder_lock(self.out_dir))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()  # also after an error: what was copied is still good
        except UserError as second:
            if error is None:
                raise
            print(second, file=sys.stderr, flush=True)  # the first one has the last word
        finally:
            self.thread.shutdown()
            self.lock.close()


# -------------------------------------------------------------------------------- finding


def find_resume(out_dir: Path, resume: bool, launch: Launch,
                ) -> tuple[Path, dict] | tuple[None, None]:
    """The newest whole checkpoint of OUT_DIR and its training state; (None, None) for a new run.
    Damaged ones are passed over with a line each.

    Rank 0 looks, the others take what it found. Raises UserError when the folder holds a run but
    --resume was not given, and when every checkpoint in it is damaged.
    """
    folder = state = None
    mapped = launch.device.type != "cpu"  # on a CPU the optimizer keeps these very tensors
    if launch.is_master:
        holds_run = list_step_folders(out_dir) or (out_dir / "metrics.jsonl").exists()
        if holds_run and not resume:
            raise UserError(f"--out-dir {out_dir} already holds a run: add --resume to go on with "
                            "it, or choose another --out-dir")
        folder, state = newest_whole(out_dir, mapped)
        if resume and folder is None:
            launch.print0(f"--resume: no checkpoint in {out_dir} yet, starting from scratch, also "
                          "with its log")
    folder = launch.broadcast(folder)
    if folder is not None and state is None:  # not on rank 0
        if not folder.is_dir():
            raise UserError(f"rank {launch.rank} does not see {folder}, which rank 0 goes on from: "
                            "--out-dir must be a folder that all nodes share")
        state = load_training_state(folder, mapped)
    return folder, state


def newest_whole(out_dir: Path, mapped: bool) -> tuple[Path, dict] | tuple[None, None]:
    """The newest checkpoint that is whole, with its training state. Newer ones are set aside: they
    are of another future than the one that begins now."""
    damaged = []
    for folder in reversed(list_step_folders(out_dir)):
        try:
            verify(folder)
            read_config(folder)
            state = load_training_state(folder, mapped)
            if not isinstance(state, dict) or not STATE_PARTS <= state.keys():
                raise UserError(f"{folder} was written by another version of this project")
            for _ in read_tensors(folder):  # also without checksums: it is not cut
                break
        except (UserError, OSError) as error:
            print(f"--resume: {folder.name} is passed over: {first_line(error)}", flush=True)
            damaged.append(folder)
            continue
        for other in damaged:
            aside = other.with_name(f"{other.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(other, aside)
        return folder, state
    if damaged:
        raise UserError(f"none of the {len(damaged)} checkpoints in {out_dir} can be gone on "
                        "from: restore one, or start in another --out-dir")
    return None, None


def check_settings(folder: Path, state: dict, facts: dict, fixed: Iterable[str],
                   launch: Launch) -> None:
    """Lists what is not as it was when the checkpoint was written. Raises UserError for one of the
    facts that may not change: the model, or what an update sees."""
    before = state["facts"]
    changed = sorted(name for name in facts if facts[name] != before.get(name))
    for name in changed:
        if name not in before:  # written by an earlier version, which knew no such setting
            continue
        if name == "data_sha256" and name in fixed:
            raise UserError(f"--resume: the data are not those that {folder} was trained on: "
                            "restore them, or start in another --out-dir")
        if name in fixed:
            raise UserError(f"--resume: {folder} was trained with {flag_name(name)} "
                            f"{before.get(name)}, not {facts[name]}: give that again, or start in "
                            "another --out-dir")
    for name in changed:
        if name != "resume":
            launch.print0(f"--resume: {name} was {before.get(name)}, is now {facts[name]}")


def restore(folder: Path, state: dict, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, launch: Launch, *, seed: int, max_steps: int,
            flag: str) -> TrainState:
    """Puts a training state back. Raises UserError when it is of another model, or past the end of
    the run, which `flag` sets."""
    try:
        progress = TrainState(**state["progress"])
    except TypeError as error:
        raise UserError(f"--resume: {folder} was written by another version of this project "
                        f"({error}): start in another --out-dir") from None
    if progress.step > max_steps:
        raise UserError(f"--resume: {folder} was made after {progress.step} updates, more than the "
                        f"{max_steps} of this run: raise {flag}")
    try:
        load_optimizer_state(optimizer, state["optimizer"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"--resume: the optimizer's state in {folder} is not that of this model "
                        f"({error}): rm -r {folder} goes back to the one before") from None
    if scaler.is_enabled() and state["scaler"]:  # empty after a run in another dtype
        scaler.load_state_dict(state["scaler"])
    launch.print0(f"--resume: going on from {folder}, {progress.step:,} of {max_steps:,} updates")
    seed_rank(seed, progress.step, launch)
    if len(state["rng"]) == launch.world_size:  # else there are no generators to go on with
        torch.set_rng_state(state["rng"][launch.rank]["cpu"])
        if launch.device_type == "cuda" and "cuda" in state["rng"][launch.rank]:
            torch.cuda.set_rng_state(state["rng"][launch.rank]["cuda"], launch.device)
    return progress


def seed_rank(seed: int, step: int, launch: Launch) -> None:
    """Seeds this rank's own random stream. Nothing here draws from it; what one adds (dropout, say)
    may."""
    sequence = np.random.SeedSequence([seed, step, launch.rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
