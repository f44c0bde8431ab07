"""A training run: what all training scripts share.

Each script defines its batches, forward and backward pass, loss normalization, validation and
schedule. A `Run` does the rest: it finds the checkpoint to resume from, locks the folder, logs,
decides when to validate and save, clips gradients, skips non-finite steps, measures throughput, and
stops on a signal. The script calls the `Run`, never the reverse.

    run = Run(config, launch, stop, label="pre-training", graph="pretrain_loss.png", data=manifest,
              fixed=FIXED_ON_RESUME)
    raw_model = load_model(run.checkpoint) if run.is_resumed else GPT(sizes)
    optimizer = make_optimizer(raw_model, ...)
    model = run.prepare(raw_model, optimizer, max_steps, ...)  # in DDP if world_size > 1
    with run:
        while True:
            if run.eval_due():
                run.log_validation(mean_loss(raw_model, ...))
            if run.save_or_finish():
                break
            for micro_step in range(grad_accum_steps):
                with run.gradient_sync(micro_step == grad_accum_steps - 1):
                    ...  # forward, and run.scaler.scale(loss).backward()
            run.finish_step(loss_sum, lr=lr, tokens=tokens, sequence_length=T)
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from minigpt2.config import flag
from minigpt2.distributed import (
    Dtype,
    Launch,
    data_parallel,
    device_time,
    pick_dtype,
    should_compile,
)
from minigpt2.faults import StopRequest, agree, count_skipped
from minigpt2.graphs import check_image, draw_runs
from minigpt2.memory import find_micro_batch, optimizer_bytes
from minigpt2.metrics import flops_per_token, peak_flops, run_metadata, start_log
from minigpt2.progress import progress_bar
from minigpt2.resume import (
    CheckpointWriter,
    TrainState,
    check_settings,
    find_resume,
    restore,
    seed_rank,
)
from model import GPT

PER_NODE = ("checkpoint", "data", "data_dir", "device")  # settings that may differ between nodes


@dataclass(frozen=True)
class RunConfig:
    """The flags of every training script. A script overrides defaults and adds its own."""

    out_dir: str = flag("out/run", "folder of checkpoints and logs")
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping", minimum=0)
    eval_interval: int = flag(500, "steps between validations", minimum=1)
    save_interval: int = flag(1000, "steps between checkpoints", minimum=1)
    keep_last: int = flag(5, "newest checkpoints to keep, plus the one with the lowest "
                             "validation loss; 0: all", minimum=0)
    keep_every: int = flag(0, "also keep the checkpoints of every N-th step; 0: none", minimum=0)
    log_interval: int = flag(1, "steps between records of the run log", minimum=1)
    seed: int = flag(1337, "random seed of weights, data order and samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "autocast dtype; auto: bfloat16 (or float16) on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile the training step (default: on CUDA)")
    activation_checkpointing: bool = flag(False, "recompute activations in the backward pass: less "
                                                 "memory, a third more computation")
    bf16_residual: bool = flag(False, "residual stream in bfloat16, if that is the autocast dtype: "
                                      "less memory traffic on a GPU, coarser sums")
    shard_optimizer: bool = flag(False, "shard the optimizer state over ranks (ZeRO stage 1)")
    deterministic: bool = flag(False, "deterministic algorithms only (CPU runs always are)")
    resume: bool = flag(False, "resume from the newest intact checkpoint in --out-dir, if any")
    tensorboard: bool = flag(False, "also log to OUT_DIR/tensorboard")
    wandb: str | None = flag(None, "also log to this Weights & Biases project")
    loss_graph: str | None = flag(None, "PNG file of the loss graph (default: in --out-dir)")


class Run:
    """One run of a training script, from resume to the closing line (see the module's docstring).

    Public state: `is_resumed`, `checkpoint` (the folder resumed from, or None), `step` (optimizer
    steps taken so far), `dtype` (of autocast), `scaler` (gradient scaler, enabled in float16),
    `shard_optimizer`; after `prepare` also `micro_batch_size` and `summary`.
    """

    def __init__(self, config: RunConfig, launch: Launch, stop: StopRequest | None, *, label: str,
                 graph: str, data: dict, fixed: Iterable[str], prompt_template: str | None = None,
                 **extra_metadata):
        """`label`: name in the progress bar. `graph`: file name of the loss graph. `data`: its
        SHA-256 goes into every checkpoint. `fixed`: settings that a resumed run may not change.
        Raises UserError before the run writes anything."""
        self.config, self.launch, self.stop = config, launch, stop or StopRequest()
        self.label, self.prompt_template = label, prompt_template
        self.out_dir = Path(config.out_dir)
        self.image = Path(config.loss_graph or self.out_dir / graph)
        check_image(self.image)
        self.metadata = run_metadata(config, world_size=launch.world_size, device=launch.device,
                                     data=data) | extra_metadata
        launch.check_same(self.metadata, except_for=PER_NODE)
        self.checkpoint, self.saved = find_resume(self.out_dir, config.resume, launch)
        self.is_resumed = self.checkpoint is not None
        if self.is_resumed:
            check_settings(self.checkpoint, self.saved, self.metadata, fixed, launch)
        self.state, self.stopping = TrainState(), False
        self.dtype = pick_dtype(config.dtype, launch.device)
        self.scaler = torch.amp.GradScaler(launch.device_type, enabled=self.dtype == torch.float16)
        self.shard_optimizer = config.shard_optimizer and launch.world_size > 1
        if config.shard_optimizer and not self.shard_optimizer:
            launch.print0("--shard-optimizer: ignored, there is only one rank")

    @property
    def step(self) -> int:
        return self.state.step

    # ------------------------------------------------------------------ before the loop

    def prepare(self, model: GPT, optimizer: torch.optim.Optimizer, max_steps: int, *,
                max_steps_flag: str, micro_batch_sizes: list[int], sequence_length: int,
                milestones: Iterable[int] = ()) -> torch.nn.Module:
        """Restores the training state, compiles, chooses the micro-batch, wraps the model in DDP.

        `micro_batch_sizes`: allowed sizes, largest first; `--micro-batch-size auto` picks the first
        that fits, otherwise the first is used. The weights are validated and saved after max_steps
        and after each of the `milestones`. Returns the module to train with.
        Raises UserError if the checkpoint is past max_steps (set by max_steps_flag) or belongs to
        another model, or if no micro-batch fits.
        """
        config, launch = self.config, self.launch
        self.model, self.optimizer = model.train(), optimizer
        self.max_steps, self.milestones = max_steps, {max_steps, *milestones}
        model.checkpoint_activations = config.activation_checkpointing
        model.bf16_residual = config.bf16_residual and self.dtype == torch.bfloat16
        if config.bf16_residual and not model.bf16_residual:
            launch.print0("--bf16-residual: ignored, it needs --dtype bfloat16")
        seed_rank(config.seed, 0, launch)
        if self.is_resumed:
            self.state = restore(self.checkpoint, self.saved, optimizer, self.scaler, launch,
                                 seed=config.seed, max_steps=max_steps, flag=max_steps_flag)
            self.saved = None  # free it: the moments are twice the size of the weights
        compiled = should_compile(config.compile, launch)
        if compiled:
            model.compile()  # in place: parameter names stay as they are
        self.micro_batch_size = micro_batch_sizes[0]
        if config.micro_batch_size == "auto":
            ranks = launch.world_size if self.shard_optimizer else 1
            self.micro_batch_size = find_micro_batch(
                model, micro_batch_sizes, launch=launch, dtype=self.dtype, compiled=compiled,
                sequence_length=sequence_length,
                optimizer_bytes=0 if self.is_resumed else optimizer_bytes(model, ranks))
            self.metadata["micro_batch_size"] = self.micro_batch_size
        self.train_model = data_parallel(model, launch)
        self.summary = (f"{model.num_parameters():,} parameters, "
                        f"{str(self.dtype).removeprefix('torch.')} on {launch.world_size} x "
                        f"{launch.device}{', compiled' if compiled else ''}")
        return self.train_model

    def __enter__(self) -> "Run":
        config, is_master = self.config, self.launch.is_master
        with contextlib.ExitStack() as stack:
            self.writer = stack.enter_context(CheckpointWriter(
                self.out_dir, self.launch, self.metadata, keep_last=config.keep_last,
                keep_every=config.keep_every, prompt_template=self.prompt_template,
                saved_step=self.step if self.is_resumed else None))
            if is_master:
                self.log = stack.enter_context(contextlib.closing(start_log(
                    self.out_dir, fresh=not self.is_resumed, start_step=self.step,
                    metadata=self.metadata, tensorboard=config.tensorboard, wandb=config.wandb)))
            self.bar = stack.enter_context(progress_bar(self.max_steps, self.step, self.label,
                                                        enabled=is_master))
            self.stack = stack.pop_all()
        self.peak_flops = peak_flops(self.launch.device)
        self.first_step, self.overhead_s, self.paused_at = self.step, 0.0, None
        self.t0 = self.restart_clock()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        elapsed = device_time(self.launch.device) - self.t0 if error is None else 0.0
        if error is None and self.launch.is_master and self.step > self.first_step:
            self.log.write(self.step, "end", seconds=elapsed, overhead_s=self.overhead_s)
        self.stack.__exit__(kind, error, traceback)  # waits for the checkpoint being written
        if error is None and self.launch.is_master:
            self.report(elapsed)

    # ------------------------------------------------------------------- validate and save

    def eval_due(self) -> bool:
        """Whether the weights are to be validated now."""
        due = (not self.stopping and self.state.val_loss is None
               and (self.step in self.milestones or self.step % self.config.eval_interval == 0))
        if due:
            self.pause_clock()
        return due

    def log_validation(self, loss: float | None, **figures) -> bool:
        """Records the validation loss of the current weights. None, the result of a validation
        that a signal interrupted, stops the run; returns whether there is a loss."""
        self.state.val_loss, self.stopping = loss, loss is None
        if self.launch.is_master and loss is not None:
            self.log.write(self.step, "val", loss=loss, **figures)
            self.bar.write(f"step {self.step}: validation loss {loss:.4f}")
        return loss is not None

    def save_or_finish(self) -> bool:
        """Saves a checkpoint if one is due; returns whether the run ends here, after its last step
        or because a signal came. All ranks get the same answer."""
        finished = self.stopping or self.step >= self.max_steps
        at_interval = self.step > 0 and self.step % self.config.save_interval == 0
        if finished or at_interval or self.step in self.milestones:
            self.pause_clock()
            self.writer.save(self.state, self.model, self.optimizer, self.scaler)
        if finished:
            self.writer.wait()
        if self.paused_at is not None:
            self.overhead_s += self.restart_clock() - self.paused_at
            self.paused_at = None
        return finished

    # ------------------------------------------------------------------------ one step

    def gradient_sync(self, is_last: bool):
        """The context of one micro-step, forward pass included: DDP averages gradients over ranks
        in the last micro-step of a step and only accumulates them in the others."""
        if is_last or self.train_model is self.model:
            return contextlib.nullcontext()
        return self.train_model.no_sync()

    def finish_step(self, loss_sum: torch.Tensor, *, lr: float, tokens: int, sequence_length: int,
                    **figures) -> None:
        """Clips the gradients, takes the optimizer step, and logs it.

        loss_sum () is this rank's loss, scaled so that its mean over ranks is the loss of the
        global batch; `tokens` are those of all ranks, in sequences of sequence_length (for MFU);
        `figures` are logged as well. A non-finite loss or gradient norm skips the step on all
        ranks; three in a row raise UserError.
        """
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(),
                                                   self.config.grad_clip or math.inf)
        loss, grad_norm, self.stopping = agree(loss_sum, grad_norm, self.stop, self.launch)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        step, state = self.step, self.state
        state.skipped = count_skipped(state.skipped, step, loss, grad_norm, self.scaler,
                                      self.out_dir)
        state.val_loss = None
        state.step += 1
        self.tokens += tokens
        self.flops += tokens * flops_per_token(self.model, sequence_length)
        if step % self.config.log_interval == 0 or state.skipped:
            self.log_step(step, loss=loss, lr=lr, grad_norm=grad_norm, **figures)
        if state.skipped and self.launch.is_master:
            self.bar.write(f"step {step} skipped: loss {loss}, gradient norm {grad_norm}")
        self.writer.poll()
        self.bar.update()

    def log_step(self, step: int, **figures) -> None:
        tokens, flops, t0 = self.tokens, self.flops, self.clock
        seconds = self.restart_clock() - t0
        peak = self.peak_flops and self.peak_flops * self.launch.world_size
        mfu = flops / seconds / peak if peak else None
        if self.launch.is_master:
            skipped = {"skipped": self.state.skipped} if self.state.skipped else {}
            self.log.write(step, "train", **figures, tokens_per_sec=tokens / seconds, mfu=mfu,
                           **skipped)
            self.bar.set_postfix_str(f"loss {figures['loss']:.3f}, {tokens / seconds:,.0f} tok/s"
                                     + (f", MFU {mfu:.1%}" if mfu else ""), refresh=False)

    # ----------------------------------------------------------------------- clock and end

    def restart_clock(self) -> float:
        """Starts the interval of the next throughput figure; returns the time."""
        self.clock, self.tokens, self.flops = device_time(self.launch.device), 0, 0
        return self.clock

    def pause_clock(self) -> None:
        """Validation and saving do not count as training time."""
        if self.paused_at is None:
            self.paused_at = device_time(self.launch.device)

    def report(self, elapsed: float) -> None:
        """Prints the last line; draws the loss graph if the run reached its last step."""
        if self.stopping:
            print(self.stop.report(self.step, self.max_steps, self.writer.folder))
            return
        draw_runs([("", self.out_dir / "metrics.jsonl")], self.image,
                  f"{self.label.capitalize()} loss")
        print(f"finished {self.max_steps:,} steps, validation loss {self.state.val_loss:.4f}: "
              f"{self.writer.folder}, graph {self.image}; validation and checkpoints took "
              f"{self.overhead_s / elapsed:.1%} of {elapsed:,.0f} s")
