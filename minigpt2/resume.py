"""Checkpoints of a run in progress: written in the background, found again, and restored."""

import contextlib
import errno
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt2 import checkpoint
from minigpt2.config import UserError, flag_name
from minigpt2.distributed import Launch
from minigpt2.files import folder_lock
from minigpt2.optimizer import load_optimizer_state, optimizer_state
from model import GPT

STATE_KEYS = {"progress", "optimizer", "scaler", "facts"}  # of training_state.pt
OTHER = {"data_sha256": "other data", "reference_sha256": "another reference (--checkpoint)",
         "reward_sha256": "another reward (--reward)", "label": "another script"}


@dataclass
class TrainState:
    """The state of a run besides its weights and its optimizer; "progress" in training_state.pt."""

    step: int = 0  # steps taken, skipped ones included
    val_loss: float | None = None  # of the current weights; None until they are validated
    best_loss: float = float("inf")  # lowest validation loss of a checkpoint
    best_step: int | None = None  # the step of that checkpoint
    skipped: int = 0  # consecutive steps skipped for a non-finite loss or gradient norm
    kl_coef: float | None = None  # of policy optimization, which may adapt it


class CheckpointWriter(contextlib.AbstractContextManager):
    """Writes checkpoints on a background thread, one at a time, from a copy in host memory for
    which training waits. `metadata` goes into each of them, `options` to `save_checkpoint`."""

    def __init__(self, out_dir: Path, launch: Launch, metadata: dict, *, saved_step: int | None,
                 **options):
        self.out_dir, self.launch, self.metadata = out_dir, launch, metadata
        self.saved_step, self.options = saved_step, options
        self.buffers: dict[str, torch.Tensor] = {}  # reused: allocating pinned memory is slow
        self.thread = ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def save(self, state: TrainState, model: GPT, optimizer: torch.optim.Optimizer,
             scaler: torch.amp.GradScaler, value: GPT | None = None) -> None:
        """Copies the run's state and starts to write it, unless this step is saved already and has
        not become the best since. A collective. Raises UserError if the previous write failed."""
        best_before = state.best_step
        if state.val_loss is not None and state.val_loss < state.best_loss:
            state.best_loss, state.best_step = state.val_loss, state.step
        if state.step == self.saved_step and state.best_step == best_before:
            return
        self.saved_step = state.step
        self.wait()  # the buffers are in use until then
        moments = optimizer_state(optimizer, self.launch, self.copy)
        if not self.launch.is_master:
            return
        parameters = self.copy(dict(model.named_parameters()), "model")
        saved = {"progress": asdict(state), "optimizer": moments,
                 "scaler": scaler.state_dict(), "facts": self.metadata,
                 "value": value and self.copy(dict(value.named_parameters()), "value")}
        if self.launch.device.type == "cuda":
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
        if not isinstance(value, torch.Tensor):
            return value
        if name not in self.buffers:
            self.buffers[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.buffers[name].copy_(value, non_blocking=value.is_cuda)

    def wait(self, block: bool = True) -> None:
        """Waits for the pending checkpoint, or only looks. Raises UserError if writing failed."""
        if self.pending is not None and (block or self.pending.done()):
            pending, self.pending = self.pending, None
            pending.result()

    def __exit__(self, kind, error, traceback) -> None:
        self.thread.shutdown()  # writes the pending one, also after an error: its copy is valid
        try:
            self.wait()
        except UserError as second:
            if error is None:
                raise
            print(second, file=sys.stderr, flush=True)  # the first error is raised


def find_resume(out_dir: Path, resume: bool, launch: Launch, model_class: type[GPT]) -> Path | None:
    """The newest intact checkpoint of out_dir; None for a new run. Raises UserError if the folder
    holds a run and `resume` is false, has no intact checkpoint, is in use, or is not shared."""
    folder = None
    holds_run = checkpoint.list_checkpoints(out_dir) or (out_dir / "metrics.jsonl").exists()
    if launch.is_master and holds_run:
        if not resume:
            raise UserError(f"--out-dir {out_dir} already holds a run: add --resume or change it")
        with folder_lock(out_dir):
            folder = newest_intact(out_dir, model_class)
    folder = launch.gather(folder)[0]  # of rank 0
    if resume and folder is None:
        launch.print0(f"--resume: no checkpoint in {out_dir}, starting from scratch")
    if folder is not None and not folder.is_dir():
        raise UserError(f"rank {launch.rank} does not see {folder}: all nodes must share --out-dir")
    return folder


def newest_intact(out_dir: Path, model_class: type[GPT]) -> Path | None:
    """The newest checkpoint that can be read; newer, damaged ones are renamed and printed."""
    checkpoint.clean_up(out_dir)
    damaged = []
    for folder in reversed(checkpoint.list_checkpoints(out_dir)):
        try:
            checkpoint.load_model(folder, model_class=model_class)
            saved = checkpoint.load_training_state(folder)
            if not isinstance(saved, dict) or not STATE_KEYS <= saved.keys():
                raise UserError(f"{folder} was written by another version of this project")
        except UserError as error:
            if getattr(error.__context__, "errno", errno.ENOENT) != errno.ENOENT:
                raise  # the disk or the network failed, perhaps not for long
            print(f"--resume: skipping {folder.name}: {error}")
            damaged.append(folder)
        else:
            for other in damaged:
                shutil.rmtree(f"{other}.damaged", ignore_errors=True)
                other.replace(f"{other}.damaged")
            return folder
    if damaged:
        raise UserError(f"none of the {len(damaged)} checkpoints in {out_dir} is intact: restore "
                        "one, or start in another --out-dir")
    return None


def check_settings(folder: Path, saved: dict, metadata: dict, fixed: tuple, launch: Launch) -> None:
    """Prints what differs from the run that wrote the checkpoint. Raises UserError for `fixed`."""
    before = saved["facts"]  # older versions lack newer settings
    changed = {name: (before[name], metadata[name]) for name in metadata.keys() & before.keys()
               if before[name] != metadata[name]}
    for name in filter(changed.get, ("label", *fixed)):
        what = OTHER.get(name, "{} {}, not {}".format(flag_name(name), *changed[name]))
        raise UserError(f"--resume: {folder} was trained with {what}: restore that, or start in "
                        "another --out-dir")
    for name, (was, now) in sorted(changed.items()):
        if name in ("checkpoint", "zero_init"):
            launch.print0(f"--resume: {flag_name(name)} {now} is ignored, the run began with {was}")
        elif name != "resume" and (name, now) != ("micro_batch_size", "auto"):
            launch.print0(f"--resume: {name} was {was}, is now {now}")


def restore(folder: Path, saved: dict, optimizer: torch.optim.Optimizer,
            scaler: torch.amp.GradScaler) -> TrainState:
    """Loads a training state into optimizer and scaler. Raises UserError if it does not fit."""
    try:
        if saved["progress"]["step"]:  # else there is no state yet
            load_optimizer_state(optimizer, saved["optimizer"])
        if scaler.is_enabled() and saved["scaler"]:  # empty after a run in another dtype
            scaler.load_state_dict(saved["scaler"])
        return TrainState(**{name: saved["progress"].get(name, default)  # older ones had others
                             for name, default in vars(TrainState()).items()})
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"--resume: {folder} does not fit this model and optimizer ({error}): "
                        "restore its settings, or start in another --out-dir") from None
