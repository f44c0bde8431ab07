"""What training scripts share: their flags, and a `Run`, which they call (docs/development.md)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import strftime
from typing import NoReturn

import numpy as np
import torch

from minigpt2 import checkpoint, distributed, resume
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, Launch, device_time
from minigpt2.faults import RESUME_HINT, StopRequest, count_skipped, find_micro_batch, launched
from minigpt2.files import check_folder, folder_lock
from minigpt2.metrics import RunLog, draw_runs, peak_flops, run_metadata
from minigpt2.optimizer import learning_rate, make_optimizer, missing_bytes, step_if_finite
from minigpt2.progress import Pace, progress_bar
from model import GPT

STEPS_LATE = {"cuda": 1, "cpu": 0, "mps": 0}  # the host reads losses late: a GPU never waits


@dataclass(frozen=True)
class RunConfig:
    """The flags of every training script."""

    out_dir: str = flag("out/run", "folder of checkpoints and logs", is_path=True)
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping", minimum=0)
    eval_interval: int = flag(500, "steps between validations", minimum=1)
    save_interval: int = flag(1000, "steps between checkpoints", minimum=1)
    keep_last: int = flag(3, "newest checkpoints to keep, plus the best one; 0: all", minimum=0)
    seed: int = flag(1337, "random seed of weights, data order and samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "autocast dtype; auto: bfloat16 (or float16) on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile the training step (default: on CUDA)")
    activation_checkpointing: bool = flag(False, "recompute activations: less memory, slower")
    shard_optimizer: bool = flag(False, "shard the optimizer state over ranks (ZeRO stage 1)")
    deterministic: bool = flag(False, "deterministic algorithms only (CPU runs always are)")
    resume: bool = flag(False, "resume from the newest intact checkpoint in --out-dir, if any")


@dataclass(frozen=True)
class TuningConfig(RunConfig):
    """The flags of the scripts that train a pre-trained model on rows, epoch by epoch."""

    epochs: int = flag(1, "passes over the training rows", minimum=1)
    batch_size: int = flag(64, "rows per step, over all ranks", minimum=1)
    micro_batch_size: int = flag(8, "rows per rank and micro-step", minimum=1)
    max_lr: float = flag(1e-5, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end; --max-lr if that is lower", minimum=0)
    warmup_fraction: float = flag(0.03, "warm-up, as a fraction of all steps", minimum=0, below=1)
    weight_decay: float = flag(0.0, "weight decay of matrices and embeddings", minimum=0)
    columns: str = flag("", "your rows' keys: instruction=NAME,output=NAME", may_be_empty=True)
    val_fraction: float = flag(0.05, "fraction of rows held out, at least one", minimum=0, below=1)
    eval_interval: int = flag(100, "steps between validations", minimum=1)
    save_interval: int = flag(200, "steps between checkpoints, besides one per epoch", minimum=1)
    compile: bool | None = flag(False, "torch.compile each shape of the step: slower on a CPU")

    def lr_at(self, step: int, max_steps: int, n_embd: int = 768) -> float:
        max_lr = 5e-5 * (768 / n_embd) ** 1.5 if self.max_lr is None else self.max_lr
        return learning_rate(step, warmup_steps=round(max_steps * self.warmup_fraction),
                             max_steps=max_steps, max_lr=max_lr, min_lr=min(self.min_lr, max_lr))

    def make_optimizer(self, model: GPT, shard: bool) -> torch.optim.Optimizer:
        return make_optimizer(model, lr=self.max_lr or 0.0, betas=(0.9, 0.95), eps=1e-8,
                              weight_decay=self.weight_decay, shard=shard)


def run_training(config_class: type[RunConfig], train: Callable, description: str) -> NoReturn:
    """The command line of a training script: calls train(config, launch, stop) and exits."""
    def main() -> None:
        config = parse_config(config_class, description=description)
        with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
            train(config, launch, stop)

    run_main(main)


class Run:
    """One run of a training script, from resume to the closing line. For the script: `is_resumed`,
    `checkpoint` (resumed from), `step` (steps taken), `dtype` (of autocast), `scaler`, and what
    `prepare` sets: `optimizer`, `max_steps`, `micro_batch_size`, `summary`, ..."""

    def __init__(self, config: RunConfig, launch: Launch, stop: StopRequest | None, *, label: str,
                 graph: str, data: dict, fixed: tuple, prompt_template: str | None = None,
                 loss_name: str = "cross-entropy, nats per token", model_class: type[GPT] = GPT,
                 **extra_metadata):
        """`label` names the bar, `loss_name` the axis of `graph`; `data` is hashed; --resume may
        not change what is `fixed`. Raises UserError, writes nothing."""
        self.config, self.launch, self.stop = config, launch, stop or StopRequest()
        self.label, self.prompt_template, self.loss_name = label, prompt_template, loss_name
        self.out_dir, self.image = Path(config.out_dir), Path(config.out_dir) / graph
        check_folder(self.out_dir, f"--out-dir {self.out_dir}")
        if (self.out_dir / checkpoint.CONFIG_FILE).exists():
            raise UserError(f"--out-dir {self.out_dir} is itself a checkpoint: choose another")
        self.metadata = run_metadata(config, world_size=launch.world_size, device=launch.device,
                                     data=data) | extra_metadata | {"label": label}
        self.dtype = distributed.pick_dtype(config.dtype, launch.device)
        launch.check_same(self.metadata | {"--dtype": str(self.dtype)},
                          except_for=("checkpoint", "data", "data_dir", "hellaswag"))
        self.checkpoint = resume.find_resume(self.out_dir, config.resume, launch, model_class)
        self.is_resumed = self.checkpoint is not None
        if self.is_resumed:
            self.saved = checkpoint.load_training_state(self.checkpoint)
            resume.check_settings(self.checkpoint, self.saved, self.metadata, fixed, launch)
        self.state, self.stopping, self.unread, self.updates = resume.TrainState(), False, [], []
        self.scaler = torch.amp.GradScaler(launch.device.type, enabled=self.dtype == torch.float16)
        self.shard_optimizer = config.shard_optimizer and launch.world_size > 1
        if config.shard_optimizer and not self.shard_optimizer:
            launch.print0("--shard-optimizer: ignored, there is only one rank")

    @property
    def step(self) -> int:
        return self.state.step

    def prepare(self, model: GPT, optimizer: torch.optim.Optimizer, max_steps: int, *,
                micro_batch_sizes: list[int], sequence_length: int, milestones: Iterable[int] = (),
                max_steps_flag: str = "--max-steps", trained: torch.nn.Module | None = None,
                value: GPT | None = None) -> torch.nn.Module:
        """Restores the training state, compiles, chooses the first of `micro_batch_sizes`, or with
        "auto" the first that fits, and returns the module to train, in DDP. Weights are validated
        and saved after max_steps, set by max_steps_flag, and `milestones`. `trained` is the module
        to train if it is more than the model; `value` is saved beside it. Raises UserError."""
        config, launch = self.config, self.launch
        launch.check_same({"template": checkpoint.with_hash(self.prompt_template or "")["sha256"]})
        self.model, self.optimizer, self.value = model, optimizer, value
        self.trained = model if trained is None else trained
        self.max_steps, self.milestones = max_steps, {max_steps, *milestones}
        for one in filter(None, (model, value)):
            one.checkpoint_activations = config.activation_checkpointing
        if self.is_resumed:
            self.state = resume.restore(self.checkpoint, self.saved, optimizer, self.scaler)
            self.saved = None  # free it: the moments are twice the size of the weights
            if self.step > max_steps:
                raise UserError(f"--resume: {self.checkpoint} was saved after {self.step} steps, "
                                f"more than the {max_steps} of this run: raise {max_steps_flag}")
            launch.print0(f"--resume: continuing from {self.checkpoint}, after {self.step:,} of "
                          f"{max_steps:,} steps")
        compiled = launch.device.type == "cuda" if config.compile is None else config.compile
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # shapes; compile() takes it since 2.13 only
            model.compile(dynamic=False)  # in place, so names stay
        self.micro_batch_size = micro_batch_sizes[0]
        if config.micro_batch_size == "auto":
            model.train()
            self.micro_batch_size = find_micro_batch(
                model, micro_batch_sizes, launch=launch, dtype=self.dtype, compiled=compiled,
                sequence_length=sequence_length, optimizer_bytes=missing_bytes(optimizer))
            self.metadata["micro_batch_size"] = self.micro_batch_size
        self.train_model = distributed.data_parallel(self.trained.eval(), launch)
        self.summary = (f"{model.num_parameters():,} parameters, {str(self.dtype)[6:]} on "
                        f"{launch.world_size} x {launch.device}{', compiled' if compiled else ''}")
        return self.train_model

    def prepare_epochs(self, model: GPT, num_rows: int, sequence_length: int) -> torch.nn.Module:
        """`prepare` for epochs of num_rows rows. Micro-batches are even parts of a rank's share."""
        config = self.config
        self.batch_size = min(config.batch_size or min(max(num_rows // 25, 8), 64), num_rows)
        self.steps_per_epoch = -(-num_rows // self.batch_size)  # ceiling division
        max_steps = self.steps_per_epoch * (config.epochs or max(2, -(-50 // self.steps_per_epoch)))
        share = -(-self.batch_size // self.launch.world_size)
        wanted = share if config.micro_batch_size == "auto" else min(share, config.micro_batch_size)
        counts = [-(-share // (wanted >> n)) for n in range(wanted.bit_length())]  # of micro-steps
        sizes = [-(-share // count) for count in counts]
        prepared = self.prepare(
            model, config.make_optimizer(model, self.shard_optimizer), max_steps,
            max_steps_flag="--epochs", micro_batch_sizes=sizes, sequence_length=sequence_length,
            milestones=range(self.steps_per_epoch, max_steps, self.steps_per_epoch))
        self.summary += (f"; {max_steps:,} steps of {self.batch_size} rows, "
                         f"{self.micro_batch_size} per rank and micro-step")
        return prepared

    def __enter__(self) -> "Run":
        config, is_master = self.config, self.launch.is_master
        with contextlib.ExitStack() as stack:
            if is_master:
                stack.enter_context(folder_lock(self.out_dir))  # a second run would delete ours
                if (checkpoint.list_checkpoints(self.out_dir) or [None])[-1] != self.checkpoint:
                    raise UserError(f"another run has written to {self.out_dir}: start again")
                if self.is_resumed:  # a kill may have come before they were written
                    checkpoint.write_pointers(self.out_dir, self.step, self.state.best_step)
                self.log = stack.enter_context(contextlib.closing(RunLog(
                    self.out_dir / "metrics.jsonl", fresh=not self.is_resumed)))
                self.log.write(self.step, "run", time=strftime("%FT%T%z"), **self.metadata)
            self.writer = stack.enter_context(resume.CheckpointWriter(
                self.out_dir, self.launch, self.metadata, prompt_template=self.prompt_template,
                keep_last=config.keep_last, saved_step=self.step if self.is_resumed else None))
            self.pace = Pace(self.milestones)
            self.bar = stack.enter_context(progress_bar(
                self.max_steps, self.step, self.label, enabled=is_master, pace=self.pace))
            compiler = torch._dynamo.callback.callback_handler
            stack.callback(compiler.remove_start_callback,
                           compiler.register_start_callback(self.pace.compiling))
            self.stack = stack.pop_all()
        self.first_step, self.t0 = self.step, device_time(self.launch.device)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.pace.begin()
        is_reported = error is None and self.launch.is_master
        if is_reported and self.step > self.first_step:
            self.log.write(self.step, "end", overhead_s=self.pace.overhead_s,
                           seconds=device_time(self.launch.device) - self.t0)
        self.stack.__exit__(kind, error, traceback)  # waits for the checkpoint being written
        folder = checkpoint.step_folder(self.out_dir, self.step)
        if is_reported and self.stopping:
            print(f"{self.stop.name or 'a signal to another rank'}: stopped after {self.step:,} of "
                  f"{self.max_steps:,} steps: {folder}. {RESUME_HINT}")
        elif is_reported:
            with contextlib.suppress(*[UserError] * (self.step == self.first_step)):  # no log
                draw_runs([("", self.out_dir / "metrics.jsonl")], self.image,
                          f"{self.label.capitalize()} loss", self.loss_name)
            print(f"finished {self.max_steps:,} steps, validation loss {self.state.val_loss:.4f}: "
                  f"{folder}, graph {self.image}")

    def eval_due(self) -> bool:
        """Whether the weights are to be validated now."""
        return self.state.val_loss is None and self.is_due("validating", self.config.eval_interval)

    def is_due(self, part: str, interval: int) -> bool:
        """Begins a part, such as "scoring", if it is due; never with interval 0."""
        due = interval > 0 and (self.step in self.milestones or self.step % interval == 0)
        if due:
            self.begin(part, interval)
        return due and not self.stopping

    def log_validation(self, loss: float | None, **figures) -> bool:
        """`log_figures` of a validation, of loss None after a signal. Raises UserError for NaN."""
        self.state.val_loss = loss
        self.begin("sampling", self.config.eval_interval)
        is_complete = self.log_figures("val", None if loss is None else {"loss": loss, **figures})
        if is_complete and not math.isfinite(loss):
            raise UserError(f"the run has diverged: validation loss {loss} after {self.step} steps:"
                            f" lower --max-lr; {RESUME_HINT}")
        return is_complete

    def log_figures(self, kind: str, figures: dict[str, float] | None) -> bool:
        """Records figures under `kind` and returns True; None, after a signal, stops the run."""
        self.stopping = figures is None
        if figures is not None and self.launch.is_master:
            self.log.write(self.step, kind, **figures)
            self.bar.write(f"step {self.step}: {kind} " + ", ".join(
                f"{name} {value:.4f}" for name, value in figures.items()
                if isinstance(value, float) and not name.endswith("_stderr")))
        return not self.stopping

    def save_or_finish(self) -> bool:
        """Saves a checkpoint if one is due; returns, alike on all ranks, whether the run ends."""
        at_interval = self.step > 0 and self.step % self.config.save_interval == 0
        if self.stopping or at_interval or self.step in self.milestones:
            self.begin("saving", self.config.save_interval)
            self.writer.save(self.state, self.model, self.optimizer, self.scaler, self.value)
        finished = self.stopping or self.step >= self.max_steps
        self.writer.wait(block=finished)
        self.pace.begin()
        random = np.random.SeedSequence([self.config.seed, self.step, self.launch.rank])  # dropout
        torch.manual_seed(int(random.generate_state(1, np.uint64)[0]))
        return finished

    def micro_steps(self, batches: Sequence) -> Iterator:
        """Yields the micro-batches of an update: only there are modules in training mode. DDP
        averages gradients in the last, forward pass included. After a signal to any rank, none
        follow, and `finish_step` discards the sum; a step with an update is completed."""
        for number, batch in enumerate(batches, 1):
            is_last = number == len(batches)
            # The first rank that has a signal, or enters a forward pass that waits for all (the
            # last; in the second step any, where DDP rebuilds buckets), decides: none waits in vain
            waits = is_last or self.step == self.first_step + 1
            choice = "stop" if self.stop.requested() else "go" if waits else ""
            if not self.updates and self.launch.first_choice(f"step {self.step}", choice) == "stop":
                self.stopping = True
                return
            synced = is_last or self.train_model is self.trained
            self.trained.train()
            with contextlib.nullcontext() if synced else self.train_model.no_sync():
                yield batch
            self.trained.eval()

    def update(self, loss_sum: torch.Tensor, sums: Iterable[torch.Tensor] = ()) -> None:
        """Clips the gradients, those of a value model by themselves, and takes one optimizer step.
        A non-finite loss, figure in `sums` or gradient norm skips it on all ranks."""
        self.scaler.unscale_(self.optimizer)
        largest = self.config.grad_clip or math.inf
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
                 for model in (self.model, self.value) if model is not None]
        summed = self.launch.sum(torch.stack([loss_sum, *sums]))  # the only all-reduce
        grad_norm = norms[0] + 0 * norms[-1]  # not finite if either is not
        numbers = torch.cat([summed, grad_norm[None]])  # on the device, the same on all ranks
        step_if_finite(self.optimizer, numbers)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self.train_model is self.trained)
        self.updates.append(numbers)

    def finish_step(self, loss_sum: torch.Tensor, *, lr: float, tokens: int, sequence_length: int,
                    sums: dict[str, torch.Tensor] | None = None, **figures) -> None:
        """Takes the last update of a step, and logs means over its updates: of loss_sum (), whose
        mean over ranks is the loss of the global batch, of `sums` (), summed over ranks, and
        `figures`. `tokens` are all ranks'. Raises UserError after three skipped steps in a row."""
        if self.stopping:
            return
        sums = sums or {}
        self.update(loss_sum, sums.values())
        numbers, self.updates = torch.stack(self.updates).mean(0), []
        flops = tokens * self.model.flops_per_token(sequence_length)
        copy = numbers.to("cpu", non_blocking=numbers.is_cuda)  # into pinned memory
        copied = torch.cuda.current_stream().record_event() if numbers.is_cuda else None
        self.unread.append((copy, copied, list(sums), tokens, flops, {"lr": lr, **figures}))
        self.state.val_loss = None
        self.state.step += 1
        self.read_steps(all_but=STEPS_LATE[self.launch.device.type])
        self.writer.wait(block=False)

    def read_steps(self, all_but: int = 0) -> None:
        """Reads and logs the numbers of the steps taken, but for the last `all_but`."""
        while len(self.unread) > all_but:
            step, state = self.step - len(self.unread), self.state
            copy, copied, names, tokens, flops, figures = self.unread.pop(0)
            if copied:
                copied.synchronize()  # waits for this copy, not for steps queued later
            loss, *sums, grad_norm = copy.numpy().tolist()
            loss /= self.launch.world_size
            figures |= {"loss": loss, "grad_norm": grad_norm, **dict(zip(names, sums, strict=True))}
            state.skipped = count_skipped(state.skipped, loss, grad_norm, self.scaler)
            seconds = self.pace.end_step()  # reading has waited for the step
            rate, peak = tokens / seconds, peak_flops(self.launch.device)
            mfu = flops / seconds / peak / self.launch.world_size if peak else None
            self.bar.update()
            self.bar.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tok/s"
                                     + (f", MFU {mfu:.1%}" if mfu else ""), refresh=False)
            if self.launch.is_master:
                if state.skipped:
                    figures["skipped"] = state.skipped
                    self.bar.write(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
                self.log.write(step, "train", **figures, tokens_per_sec=rate, mfu=mfu)

    def begin(self, part: str, every: int = 0) -> None:
        """Begins a part that is not training. First reads all steps: a checkpoint counts skips."""
        self.read_steps()
        self.pace.begin(part, every)
