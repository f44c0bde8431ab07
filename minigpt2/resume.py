"""Checkpoints of a run in progress: written in the background, found again, and restored.

The training state of a checkpoint holds the optimizer, the gradient scaler, the random generators
of every rank, `TrainState`, and the run's metadata (`metrics.run_metadata`: settings, versions, the
SHA-256 of the data). The data need no cursor of their own: the step alone determines the batch.
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

STATE_KEYS = {"progress", "optimizer", "scaler", "rng", "facts"}  # of training_state.pt
LARGE_BYTES, BLOCK_BYTES = 2**22, 2**29  # see CheckpointWriter.allocate


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
    rest = {"progress": dataclasses.asdict(state), "scaler": scaler.state_dict(),
            "rng": launch.gather(rng_state(launch.device))}
    return {"optimizer": optimizer_state(optimizer, launch, copy), **copy(rest, "state")}


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


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
        self.block: torch.UntypedStorage | None = None  # the last one, of which `used` is taken
        self.used = 0
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
            checkpoint.model_from_parameters(model.config, parameters),
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
            buffer = self.buffers[name] = self.allocate(value)
        return buffer.copy_(value, non_blocking=value.is_cuda)

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """A host tensor like another, in pinned memory for a CUDA tensor. PyTorch rounds pinned
        allocations up to powers of two (28 GB for the 19 GB of gpt2-xl), so large tensors share
        blocks of such a size, each with its own storage: torch.save writes whole storages."""
        if like.nbytes < LARGE_BYTES:
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
        size = like.nbytes + -like.nbytes % 64  # aligned
        if self.block is None or self.used + size > self.block.nbytes():
            self.block, self.used = torch.empty(
                max(BLOCK_BYTES, 1 << (size - 1).bit_length()), dtype=torch.uint8,
                pin_memory=like.is_cuda).untyped_storage(), 0
        storage = self.block[self.used : self.used + like.nbytes]
        self.used += size
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.shape)

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
            what = ("other data" if name == "data_sha256" else
                    f"{flag_name(name)} {before[name]}, not {metadata[name]}")
            raise UserError(f"--resume: {folder} was trained with {what}: restore that, or start "
                            "in another --out-dir")
    for name in changed:
        if name == "checkpoint":
            launch.print0(f"--resume: --checkpoint {metadata[name]} is ignored, the run started "
                          f"from {before[name]}")
        elif name != "resume" and metadata[name] != "auto":
            launch.print0(f"--resume: {name} was {before[name]}, is now {metadata[name]}")


def restore(folder: Path, saved: dict, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler, launch: Launch, *, seed: int, max_steps: int,
            flag: str) -> TrainState:
    """Loads a training state into the optimizer, the scaler and the generators of this rank. Raises
    UserError if it belongs to another model or lies past max_steps, which `flag` sets."""
    try:
        state = TrainState(**saved["progress"])
    except TypeError as error:
        raise UserError(f"--resume: {folder} was written by another version of this project "
                        f"({error}): start in another --out-dir") from None
    if state.step > max_steps:
        raise UserError(f"--resume: {folder} was saved after {state.step} steps, more than the "
                        f"{max_steps} of this run: raise {flag}")
    try:
        load_optimizer_state(optimizer, saved["optimizer"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"--resume: the optimizer state in {folder} does not fit this model or "
                        f"optimizer ({error}): rm -r {folder} to resume from the previous one"
                        ) from None
    if scaler.is_enabled() and saved["scaler"]:  # empty after a run in another dtype
        scaler.load_state_dict(saved["scaler"])
    launch.print0(f"--resume: continuing from {folder}, after {state.step:,} of {max_steps:,} "
                  "steps")
    seed_rank(seed, state.step, launch)
    if len(saved["rng"]) == launch.world_size:  # at another world size, the new seed stays
        torch.set_rng_state(saved["rng"][launch.rank]["cpu"])
        if launch.device_type == "cuda" and "cuda" in saved["rng"][launch.rank]:
            torch.cuda.set_rng_state(saved["rng"][launch.rank]["cuda"], launch.device)
    return state


def seed_rank(seed: int, step: int, launch: Launch) -> None:
    """Seeds this rank's generators. Nothing here draws from them; code that a user adds, such as
    dropout, may."""
    sequence = np.random.SeedSequence([seed, step, launch.rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
