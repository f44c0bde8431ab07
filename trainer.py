"""Pre-trains a GPT-2 on token shards, in one process or under torchrun.

    python trainer.py --data-dir pretrain_data/pydocs --out-dir out/small --n-layer 4 --n-head 4 \\
        --n-embd 256 --block-size 256 --sequence-length 256 --micro-batch-size 8 \\
        --total-batch-size 4096 --max-lr 3e-3 --warmup-steps 20                    # a laptop's CPU
    python trainer.py                                                              # one GPU
    torchrun --standalone --nproc-per-node=8 trainer.py                            # eight GPUs
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=1 \\
        --rdzv-endpoint=HOST:29500 --max-restarts=3 trainer.py --resume            # on each of two

Writes OUT_DIR/step_NNNNNN/, OUT_DIR/latest and OUT_DIR/best (see checkpoint.py),
OUT_DIR/metrics.jsonl, OUT_DIR/samples.jsonl and, at the end, the graph of the run. SIGTERM, SIGINT
and SIGUSR1 make it save and stop; --resume goes on from the newest checkpoint that is whole.
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dataloader import TokenLoader
from inference import decode_generation, generate, tokenize_batch_input
from minigpt2.checkpoint import load_model
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import (
    Dtype,
    Launch,
    autocast,
    count_micro_steps,
    data_parallel,
    device_time,
    mean_loss,
    pick_dtype,
    should_compile,
    to_device,
)
from minigpt2.faults import StopRequest, agree, count_skipped, launched
from minigpt2.graphs import check_image, draw_runs
from minigpt2.memory import find_micro_batch, moment_bytes
from minigpt2.metrics import RunLog, flops_per_token, peak_flops, run_metadata, start_log
from minigpt2.optimizer import SCHEDULES, make_optimizer, set_lr
from minigpt2.progress import progress_bar
from minigpt2.resume import (
    CheckpointWriter,
    TrainState,
    check_settings,
    find_resume,
    restore,
    seed_rank,
)
from minigpt2.shards import read_manifest
from model import GPT, PRESETS, GPTConfig

ROOT = Path(__file__).resolve().parent
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class TrainerConfig:
    data_dir: str = flag(str(ROOT / "pretrain_data" / "fineweb"), "folder of token shards")
    out_dir: str = flag(str(ROOT / "out" / "pretrain"), "where checkpoints and logs go")
    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = flag("gpt2", "model size")
    n_layer: int | None = flag(None, "layers (default: the preset's)", minimum=1, below=2**16)
    n_head: int | None = flag(None, "attention heads (default: the preset's)", minimum=1,
                              below=2**16)
    n_embd: int | None = flag(None, "width (default: the preset's)", minimum=1, below=2**20)
    block_size: int | None = flag(None, "longest context (default: the preset's)", minimum=1,
                                  below=2**24)
    total_batch_size: int = flag(524_288, "tokens per update, over all ranks", minimum=1)  # 2**19
    micro_batch_size: int | Literal["auto"] = flag(
        32, "sequences per rank and micro-step; auto: as many as fit into memory", minimum=1)
    sequence_length: int = flag(1024, "tokens per training sequence", minimum=1)
    max_steps: int | None = flag(None, "updates (default: one epoch of the shards)", minimum=1)
    optimizer: Literal["adamw", "muon"] = flag("adamw", "muon: Muon for the blocks' matrices, "
                                                        "AdamW for all else")
    schedule: Literal["cosine", "linear"] = flag("cosine", "decay of the learning rate after the "
                                                           "warm-up")
    warmup_steps: int = flag(715, "steps of linear warm-up", minimum=0)
    max_lr: float = flag(6e-4, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(6e-5, "learning rate at the end", minimum=0)
    muon_lr: float = flag(6e-3, "Muon's learning rate after the warm-up; decays in proportion to "
                                "--max-lr", minimum=0)
    weight_decay: float = flag(0.1, "on matrices and embeddings only", minimum=0)
    beta1: float = flag(0.9, "AdamW's decay of the mean gradient", minimum=0, below=1)
    beta2: float = flag(0.95, "AdamW's decay of the mean squared gradient", minimum=0, below=1)
    eps: float = flag(1e-8, "AdamW's floor under the root", minimum=0)
    grad_clip: float = flag(1.0, "largest global gradient norm", minimum=0)
    zero_init: bool = flag(False, "start with c_proj weights of 0: every block begins as the "
                                  "identity")
    eval_interval: int = flag(500, "updates between validations and samples", minimum=1)
    eval_tokens: int = flag(10_485_760, "validate on the first so many tokens", minimum=1)
    save_interval: int = flag(1000, "updates between checkpoints", minimum=1)
    keep_last: int = flag(5, "checkpoints to keep, beside the best of those that were validated; 0 "
                             "keeps all", minimum=0)
    keep_every: int = flag(0, "keep those of every so many updates as well; 0: none", minimum=0)
    log_interval: int = flag(1, "updates between records of the run log", minimum=1)
    sample_prompt: str = flag("Hello, I'm a language model,", "continued at every validation",
                              may_be_empty=True)
    sample_steps: int = flag(32, "tokens of that sample; 0 for none", minimum=0)
    seed: int = flag(1337, "of the weights, the order of the data and the samples", minimum=0,
                     below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of autocast: bfloat16 or float16 on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile the training step (default: on CUDA)")
    activation_checkpointing: bool = flag(False, "less memory, a third more computation")
    shard_optimizer: bool = flag(False, "every rank keeps a part of AdamW's state: less memory")
    deterministic: bool = flag(False, "only algorithms that give the same bits twice (on CUDA; a "
                                      "CPU's do)")
    resume: bool = flag(False, "go on from the newest checkpoint in --out-dir, if there is one")
    tensorboard: bool = flag(False, "log to OUT_DIR/tensorboard, too")
    wandb: str | None = flag(None, "log to this project of Weights & Biases, too")
    loss_graph: str | None = flag(None, "the PNG to draw (default: OUT_DIR/pretrain_loss.png)")


# What a resumed run may not change: the model, the optimizer, which windows an update sees, what is
# validated.
FIXED_ON_RESUME = ("optimizer", "n_layer", "n_head", "n_embd", "block_size", "total_batch_size",
                   "sequence_length", "seed", "data_sha256", "eval_tokens")
OF_ONE_NODE = ("data_dir", "device")  # all other facts are the same on all ranks


def check_optimizer(config: TrainerConfig) -> None:
    """Raises UserError for learning rates that the optimizer cannot use."""
    if config.optimizer != "muon" and config.muon_lr != TrainerConfig.muon_lr:
        raise UserError("--muon-lr needs --optimizer muon: add that, or leave --muon-lr out")
    if config.optimizer == "muon" and config.max_lr == 0:
        raise UserError("--max-lr 0 with --optimizer muon: Muon's learning rate decays in "
                        "proportion to it; give a small number")


def model_config(config: TrainerConfig) -> GPTConfig:
    """The preset with the sizes given on the command line. Raises UserError if they do not fit."""
    names = ("n_layer", "n_head", "n_embd", "block_size")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    try:
        sizes = dataclasses.replace(PRESETS[config.preset], **given)
    except ValueError as error:
        raise UserError(f"{error}: change --n-embd or --n-head") from None
    if config.sequence_length > sizes.block_size:
        raise UserError(f"--sequence-length {config.sequence_length} is longer than --block-size "
                        f"{sizes.block_size}: lower the one or raise the other")
    return sizes


def micro_batch_sizes(config: TrainerConfig, launch: Launch) -> list[int]:
    """What to choose the micro-batch from, largest first: the one given, or whatever divides a
    rank's share of an update. Raises UserError for one that does not divide it."""
    def micro_steps(micro_batch_size: int) -> int:
        return count_micro_steps(
            config.total_batch_size, micro_batch_size=micro_batch_size,
            row=config.sequence_length, world_size=launch.world_size, flag="--total-batch-size")

    if config.micro_batch_size != "auto":
        micro_steps(config.micro_batch_size)
        return [config.micro_batch_size]
    share = micro_steps(1)  # windows
    return [size for size in range(share, 0, -1) if share % size == 0]


def make_loader(config: TrainerConfig, launch: Launch, split: str, micro_batch_size: int,
                vocab_size: int) -> TokenLoader:
    return TokenLoader(Path(config.data_dir), split, sequence_length=config.sequence_length,
                       micro_batch_size=micro_batch_size, vocab_size=vocab_size,
                       total_batch_size=config.total_batch_size, seed=config.seed,
                       rank=launch.rank, world_size=launch.world_size)


def one_epoch(config: TrainerConfig, loader: TokenLoader, launch: Launch) -> int:
    """The updates in one pass over the training shards; what does not fill an update is left."""
    steps, left = divmod(loader.windows_per_epoch, loader.windows_per_step)
    if steps == 0:
        tokens = loader.windows_per_epoch * config.sequence_length
        raise UserError(f"one epoch of {config.data_dir} has {tokens:,} tokens, less than one "
                        "update: lower --total-batch-size or give --max-steps")
    launch.print0(f"one epoch: {steps:,} updates of {config.total_batch_size:,} tokens "
                  f"({left} windows of {config.sequence_length} left over)")
    return steps


def can_sample(config: TrainerConfig, sizes: GPTConfig, launch: Launch) -> bool:
    if not config.sample_prompt or config.sample_steps == 0:
        return False
    num_tokens = tokenize_batch_input([config.sample_prompt])[0].size(1)
    if num_tokens >= sizes.block_size:
        launch.print0(f"no samples: --sample-prompt has {num_tokens} tokens, and the context is "
                      f"{sizes.block_size}")
    return num_tokens < sizes.block_size


def write_sample(model: GPT, config: TrainerConfig, step: int) -> str:
    """Continues the sample prompt and appends the text to OUT_DIR/samples.jsonl."""
    input_ids, masks = tokenize_batch_input([config.sample_prompt])
    output = generate(model, input_ids, masks, 1.0, config.sample_steps, seed=config.seed)
    text = decode_generation(*output)[0]
    log = RunLog(Path(config.out_dir) / SAMPLES)
    log.write(step, "sample", text=text)
    log.close()
    return text


def train(config: TrainerConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Pre-trains from the first or the resumed update to the last, or until a signal; returns the
    final model."""
    check_optimizer(config)
    out_dir, device, stop = Path(config.out_dir), launch.device, stop or StopRequest()
    image = Path(config.loss_graph or out_dir / "pretrain_loss.png")

    # 1. What an update is, how many there are, and whether some were made already
    sizes = model_config(config)
    candidates = micro_batch_sizes(config, launch)
    manifest = read_manifest(Path(config.data_dir))
    facts = run_metadata(config, world_size=launch.world_size, device=device, data=manifest
                      ) | dataclasses.asdict(sizes)  # the preset's, where none was given
    launch.check_same(facts, except_for=OF_ONE_NODE)
    train_loader = make_loader(config, launch, "train", candidates[0], sizes.vocab_size)
    val_loader = make_loader(config, launch, "val", candidates[0], sizes.vocab_size)
    max_steps = config.max_steps or one_epoch(config, train_loader, launch)
    folder, state = find_resume(out_dir, config.resume, launch)
    is_resumed = folder is not None
    if is_resumed:
        check_settings(folder, state, facts, FIXED_ON_RESUME, launch)
    wants_samples = can_sample(config, sizes, launch)
    check_image(image)
    if config.warmup_steps > max_steps:
        launch.print0(f"the warm-up of {config.warmup_steps} updates is longer than the run of "
                      f"{max_steps}: --max-lr will not be reached")

    # 2. Model and optimizer. Initialized on the CPU: the same weights on every device and rank
    if is_resumed:
        raw_model = load_model(folder, device).train()
    else:
        torch.manual_seed(config.seed)
        raw_model = GPT(sizes)
        if config.zero_init:
            raw_model.zero_projections()
        raw_model.to(device)
        seed_rank(config.seed, 0, launch)
    raw_model.checkpoint_activations = config.activation_checkpointing
    dtype = pick_dtype(config.dtype, device)
    shard = config.shard_optimizer and launch.world_size > 1
    if config.shard_optimizer and not shard:
        launch.print0("--shard-optimizer: one rank keeps all of it")
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(config.beta1, config.beta2),
                               eps=config.eps, weight_decay=config.weight_decay,
                               muon_lr=config.muon_lr if config.optimizer == "muon" else None,
                               shard=shard)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = TrainState()
    if is_resumed:
        progress = restore(folder, state, optimizer, scaler, launch, seed=config.seed,
                           max_steps=max_steps, flag="--max-steps")
        del state  # the moments are twice the size of the weights
    compiled = should_compile(config.compile, launch)
    if compiled:
        raw_model.compile()  # in place: names of parameters stay as they are
    micro_batch_size = candidates[0]
    if config.micro_batch_size == "auto":
        ranks = launch.world_size if shard else 1
        moments = 0 if is_resumed else moment_bytes(raw_model.config, ranks,
                                                      muon=config.optimizer == "muon")
        micro_batch_size = find_micro_batch(
            raw_model, candidates, launch=launch, dtype=dtype, compiled=compiled,
            sequence_length=config.sequence_length, optimizer_bytes=moments)
        train_loader.micro_batch_size = val_loader.micro_batch_size = micro_batch_size
        facts["micro_batch_size"] = micro_batch_size
    grad_accum_steps = train_loader.windows_per_step // (micro_batch_size * launch.world_size)
    model = data_parallel(raw_model, launch)
    launch.print0(
        f"{raw_model.num_parameters():,} parameters; {str(dtype).removeprefix('torch.')} on "
        f"{launch.world_size} x {device}{', compiled' if compiled else ''}; {max_steps:,} updates "
        f"of {config.total_batch_size:,} tokens = {grad_accum_steps} micro-steps x "
        f"{micro_batch_size} x {config.sequence_length} x {launch.world_size} ranks")

    # 3. The loop
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CheckpointWriter(
            out_dir, launch, facts, keep_last=config.keep_last, keep_every=config.keep_every,
            saved_step=progress.step if is_resumed else None))
        if launch.is_master:
            if not is_resumed:
                (out_dir / SAMPLES).unlink(missing_ok=True)
            log = stack.enter_context(contextlib.closing(start_log(
                out_dir, fresh=not is_resumed, start_step=progress.step, metadata=facts,
                tensorboard=config.tensorboard, wandb=config.wandb)))
        bar = stack.enter_context(progress_bar(max_steps, progress.step, "pre-training",
                                               enabled=launch.is_master))
        peak, flops = peak_flops(device), flops_per_token(raw_model, config.sequence_length)
        batches = train_loader.stream(progress.step, grad_accum_steps,
                                      lambda x: to_device(x, device))
        stopping, begun, beside_updates = False, device_time(device), 0.0  # seconds
        first_step = clock_step = progress.step
        clock = begun  # of the last record in the log, as clock_step
        while True:
            step = progress.step
            is_last = step >= max_steps
            eval_due = ((is_last or step % config.eval_interval == 0) and not stopping
                        and progress.val_loss is None)
            save_due = is_last or (step % config.save_interval == 0 and step > 0)
            if eval_due or save_due or stopping:
                paused = device_time(device)
            if eval_due:
                # the raw module, uncompiled: other shapes would only make it compile again
                with torch.compiler.set_stance("force_eager"):
                    held_out = val_loader.eval_batches(config.eval_tokens)
                    progress.val_loss = mean_loss(raw_model, held_out, launch, dtype,
                                                  stop.requested)
                    stopping = progress.val_loss is None
                    if launch.is_master and not stopping:
                        log.write(step, "val", loss=progress.val_loss)
                        bar.write(f"step {step}: validation loss {progress.val_loss:.4f}")
                        if wants_samples:
                            text = write_sample(raw_model, config, step)
                            bar.write("  " + text.replace("\n", "\n  "))
            if save_due or stopping:
                writer.save(progress, raw_model, optimizer, scaler)
            if is_last or stopping:
                writer.wait()
            if eval_due or save_due or stopping:  # neither counts as training time
                clock, clock_step = device_time(device), step
                beside_updates += clock - paused
            if is_last or stopping:
                break

            lr = SCHEDULES[config.schedule](
                step, warmup_steps=config.warmup_steps, max_steps=max_steps,
                max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                inputs, targets = next(batches)  # (B, T) each
                sync = micro_step == grad_accum_steps - 1 or model is raw_model
                with contextlib.nullcontext() if sync else model.no_sync():
                    with autocast(device, dtype):
                        _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                    # the mean over the global batch: DDP averages over ranks what is summed here
                    loss = loss * (launch.world_size / config.total_batch_size)
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(),
                                                       config.grad_clip or math.inf)
            loss, grad_norm, stopping = agree(loss_sum, grad_norm, stop, launch)
            if math.isfinite(loss) and math.isfinite(grad_norm):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.skipped = count_skipped(progress.skipped, step, loss, grad_norm, scaler,
                                             out_dir)
            progress.val_loss = None
            progress.step += 1

            if step % config.log_interval == 0 or progress.skipped:
                now = device_time(device)
                tokens = (progress.step - clock_step) * config.total_batch_size
                tokens_per_sec = tokens / (now - clock)
                clock, clock_step = now, progress.step
                mfu = tokens_per_sec * flops / (peak * launch.world_size) if peak else None
                if launch.is_master:
                    log.write(step, "train", loss=loss, lr=lr, grad_norm=grad_norm,
                              tokens_per_sec=tokens_per_sec, mfu=mfu,
                              **({"skipped": progress.skipped} if progress.skipped else {}))
                    bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_sec:,.0f} tok/s"
                                        + (f", MFU {mfu:.1%}" if mfu else ""), refresh=False)
            if progress.skipped and launch.is_master:
                bar.write(f"update {step} was skipped: loss {loss}, gradient norm {grad_norm}")
            writer.poll()
            bar.update()
        taken = device_time(device) - begun
        if launch.is_master and step > first_step:
            log.write(step, "end", seconds=taken, beside_updates_s=beside_updates)

    # 4. What is left behind
    if launch.is_master and stopping:
        print(stop.report(progress.step, max_steps, writer.folder))
    elif launch.is_master:
        draw_runs([("", out_dir / "metrics.jsonl")], image, "Pre-training loss")
        print(f"finished {max_steps:,} updates, validation loss {progress.val_loss:.4f}: "
              f"{writer.folder}, graph {image}; of {taken:,.0f} s, {beside_updates / taken:.1%} "
              "went into validation and checkpoints")
    return raw_model.eval()


def main() -> None:
    config = parse_config(TrainerConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
