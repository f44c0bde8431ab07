"""Checkpoints of a run in progress: written in the background, found again, and restored.

The training state of a checkpoint holds the optimizer, the gradient scaler, `TrainState`, and the
run's metadata (`metrics.run_metadata`: settings, versions, the SHA-256 of the data). Data and
random generators need no state of their own: seed, step and rank determine the batch and seed the
generators.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minigpt2 import checkpoint
from minigpt2.config import UserError, first_line, flag_name
from minigpt2.distributed import Launch
from minigpt2.files import folder_lock
from minigpt2.optimizer import load_optimizer_state, optimizer_state
from model import GPT

STATE_KEYS = {"progress", "optimizer", "scaler", "facts"}  # of training_state.pt
OTHER = {"data_sha256": "other data", "reference_sha256": "another reference (--checkpoint)"}


@dataclass
class TrainState:
    """The state of a run besides its weights and its optimizer; "progress" in training_state.pt."""

    step: int = 0  # steps taken, skipped ones included
    val_loss: float | None = None  # of the current weights; None until they are validated
    best_loss: float = math.inf  # lowest validation loss of a checkpoint
    best_step: int | None = None  # the step of that checkpoint
    skipped: int = 0  # consecutive steps skipped for a non-finite loss or gradient norm
    scored_step: int | None = None  # the last step whose weights were scored on a benchmark


# --------------------------------------------------------------------------------- saving


def training_state(state: TrainState, optimizer: torch.optim.Optimizer,
                   scaler: torch.amp.GradScaler, launch: Launch,
                   copy: Callable[[object, str], object]) -> dict:
    """A copy of what a checkpoint holds besides the model, gathered on rank 0. A collective. For
    `copy` see `optimizer_state`."""
    rest = {"progress": dataclasses.asdict(state), "scaler": scaler.state_dict()}
    return {"optimizer": optimizer_state(optimizer, launch, copy), **copy(rest, "state")}


class CheckpointWriter:
    """Writes checkpoints on a background thread, one at a time, from a copy in host memory.
    Training waits for the copy, and for the disk only if the previous checkpoint is not written
    yet. While entered, rank 0 holds the lock of out_dir. `metadata` goes into every checkpoint."""

    def __init__(self, out_dir: Path, launch: Launch, metadata: dict, *, keep_last: int,
                 keep_every: int, saved_step: int | None, prompt_template: str | None = None):
        self.out_dir, self.launch, self.metadata = out_dir, launch, metadata
        self.saved_step = saved_step
        self.options = {"keep_last": keep_last, "keep_every": keep_every,
                        "prompt_template": prompt_template}
        self.buffers: dict[str, torch.Tensor] = {}  # reused: allocating pinned memory is slow
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None
        self.lock = contextlib.ExitStack()

    def save(self, state: TrainState, model: GPT, optimizer: torch.optim.Optimizer,
             scaler: torch.amp.GradScaler) -> None:
        """Copies the run's state and starts to write it. A collective. Does nothing if this step
        is saved already, unless it has become the best since. Raises UserError if the previous
        checkpoint could not be written."""
        best_before = state.best_step
        if state.val_loss is not None and state.val_loss < state.best_loss:
            state.best_loss, state.best_step = state.val_loss, state.step
        if state.step == self.saved_step and state.best_step == best_before:
            return
        self.saved_step = state.step
        self.wait()  # the buffers are in use until then
        saved = training_state(state, optimizer, scaler, self.launch, self.copy)
        if not self.launch.is_master:
            return
        saved["facts"] = self.metadata
        parameters = self.copy(dict(model.named_parameters()), "model")
        if self.launch.device_type == "cuda":
            torch.cuda.synchronize(self.launch.device)  # the copies are asynchronous
        self.pending = self.thread.submit(
            checkpoint.save_checkpoint, self.out_dir, state.step,
            checkpoint.model_from_parameters(model.config, parameters, type(model)),
            training_state=saved, best_step=state.best_step, **self.options)

    @torch.no_grad()
    def copy(self, value, name: str):
        """`value` with every tensor in it copied to host memory, into the buffer called `name`."""
        if isinstance(value, dict):
            return {key: self.copy(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list):
            return [self.copy(item, f"{name}/{i}") for i, item in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self.buffers[name] = torch.empty(value.shape, dtype=value.dtype,
                                                      pin_memory=value.is_cuda)
        return buffer.copy_(value, non_blocking=value.is_cuda)

    @property
    def folder(self) -> Path:
        """The newest checkpoint, once it is written."""
        return checkpoint.step_folder(self.out_dir, self.saved_step)

    def poll(self) -> None:
        """Raises UserError if the pending checkpoint has failed; does not block."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the pending checkpoint is on disk. Raises UserError if it cannot be."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        if self.launch.is_master:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(folder_lock(self.out_dir))  # a second run would delete ours
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()  # also after an error: the copied state is valid
        except UserError as second:
            if error is None:
                raise
            print(second, file=sys.stderr, flush=True)  # the first error is raised
        finally:
            self.thread.shutdown()
            self.lock.close()


# -------------------------------------------------------------------------------- finding


def find_resume(out_dir: Path, resume: bool, launch: Launch,
                ) -> tuple[Path, dict] | tuple[None, None]:
    """The newest intact checkpoint of out_dir and its training state; (None, None) for a new run.
    Rank 0 searches, prints a line for each damaged checkpoint it skips, and tells the other ranks.
    Raises UserError if the folder holds a run but --resume was not given, if every checkpoint in
    it is damaged, or if a rank does not see the folder."""
    folder = saved = None
    if launch.is_master:
        checkpoint.restore_replaced(out_dir)
        holds_run = checkpoint.list_step_folders(out_dir) or (out_dir / "metrics.jsonl").exists()
        if holds_run and not resume:
            raise UserError(f"--out-dir {out_dir} already holds a run: add --resume to continue "
                            "it, or choose another --out-dir")
        folder, saved = newest_intact(out_dir)
        if resume and folder is None:
            launch.print0(f"--resume: no checkpoint in {out_dir} yet, starting from scratch (with "
                          "a new log)")
    folder = launch.broadcast(folder)
    if folder is not None and saved is None:  # not on rank 0
        if not folder.is_dir():
            raise UserError(f"rank {launch.rank} does not see {folder}, from which rank 0 resumes: "
                            "--out-dir must be a folder that all nodes share")
        saved = checkpoint.load_training_state(folder)
    return folder, saved


def newest_intact(out_dir: Path) -> tuple[Path, dict] | tuple[None, None]:
    """The newest intact checkpoint with its training state. Newer, damaged ones are renamed
    (.damaged): the resumed run will write those steps again."""
    damaged = []
    for folder in reversed(checkpoint.list_step_folders(out_dir)):
        try:
            checkpoint.verify(folder)
            checkpoint.read_config(folder)
            saved = checkpoint.load_training_state(folder)
            if not isinstance(saved, dict) or not STATE_KEYS <= saved.keys():
                raise UserError(f"{folder} was written by another version of this project")
            next(checkpoint.read_tensors(folder), None)  # finds a truncated file without SHA256SUMS
        except (UserError, OSError) as error:
            print(f"--resume: skipping {folder.name}: {first_line(error)}", flush=True)
            damaged.append(folder)
            continue
        for other in damaged:
            renamed = other.with_name(f"{other.name}.damaged")
            shutil.rmtree(renamed, ignore_errors=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(other, renamed)
        return folder, saved
    if damaged:
        raise UserError(f"none of the {len(damaged)} checkpoints in {out_dir} is intact: restore "
                        "one, or start in another --out-dir")
    return None, None


def check_settings(folder: Path, saved: dict, metadata: dict, fixed: Iterable[str],
                   launch: Launch) -> None:
    """Prints what differs from the run that wrote the checkpoint. Raises UserError for a setting
    in `fixed`, which a resumed run may not change."""
    before = saved["facts"]  # older versions lack newer settings
    changed = sorted(name for name in metadata.keys() & before.keys()
                     if metadata[name] != before[name])
    for name in changed:
        if name in fixed:
            what = OTHER.get(name, f"{flag_name(name)} {before[name]}, not {metadata[name]}")
            raise UserError(f"--resume: {folder} was trained with {what}: restore that, or start "
                            "in another --out-dir")
    for name in changed:
        if name == "checkpoint":
            launch.print0(f"--resume: --checkpoint {metadata[name]} is ignored, the run started "
                          f"from {before[name]}")
        elif name != "resume" and metadata[name] != "auto":
            launch.print0(f"--resume: {name} was {before[name]}, is now {metadata[name]}")


def restore(folder: Path, saved: dict, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, launch: Launch, *, max_steps: int,
            flag: str) -> TrainState:
    """Loads a training state into the optimizer and the scaler. Raises UserError if it belongs to
    another model or lies past max_steps, which `flag` sets."""
    try:
        state = TrainState(**saved["progress"])
        load_optimizer_state(optimizer, saved["optimizer"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"--resume: the state in {folder} does not fit this model, optimizer or "
                        f"version of the project ({error}): rm -r {folder} to resume from the "
                        "previous one") from None
    if state.step > max_steps:
        raise UserError(f"--resume: {folder} was saved after {state.step} steps, more than the "
                        f"{max_steps} of this run: raise {flag}")
    if scaler.is_enabled() and saved["scaler"]:  # empty after a run in another dtype
        scaler.load_state_dict(saved["scaler"])
    launch.print0(f"--resume: continuing from {folder}, after {state.step:,} of {max_steps:,} "
                  "steps")
    return state


def seed_rank(seed: int, step: int, launch: Launch) -> None:
    """Seeds this rank's generators for a step. Nothing here draws from them; code that a user adds,
    such as dropout, may, and a resumed run must repeat it."""
    sequence = np.random.SeedSequence([seed, step, launch.rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
