"""Pre-trains a GPT-2 on token shards, in one process or under torchrun.

    python trainer.py --data-dir pretrain_data/pydocs --out-dir out/small --n-layer 4 --n-head 4 \\
        --n-embd 256 --block-size 256 --sequence-length 256 --micro-batch-size 8 \\
        --total-batch-size 4096 --max-lr 3e-3 --warmup-steps 20                    # a laptop's CPU
    python trainer.py                                                              # one GPU
    torchrun --standalone --nproc-per-node=8 trainer.py                            # eight GPUs
    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d \\
        --rdzv-endpoint=HOST:29500 trainer.py                                      # on each of two

Writes OUT_DIR/step_NNNNNN/ and OUT_DIR/latest (see checkpoint.py), OUT_DIR/metrics.jsonl,
OUT_DIR/samples.jsonl, OUT_DIR/run.json (settings and versions) and, at the end, the loss graph.
"""

import contextlib
import dataclasses
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import list_checkpoints, load_model, load_training_state, save_checkpoint
from config import UserError, flag, parse_config, run_main
from dataloader import TokenLoader
from distributed import (
    Dtype,
    Launch,
    autocast,
    micro_steps_per_update,
    missing_for_compile,
    pick_dtype,
    seconds_on,
    start,
    stop,
    to_device,
)
from files import atomic_write
from metrics import RunLog, check_image, draw_loss_graph, flops_per_token, peak_flops
from model import GPT, IGNORE_INDEX, PRESETS, GPTConfig
from optimizer import cosine_lr, load_optimizer_state, make_adamw, set_lr
from progress import progress_bar
from sampling import decode_generation, generate, tokenize_batch_input
from shards import read_manifest

ROOT = Path(__file__).resolve().parent


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
    micro_batch_size: int = flag(32, "sequences per rank and micro-step", minimum=1)
    sequence_length: int = flag(1024, "tokens per training sequence", minimum=1)
    max_steps: int | None = flag(None, "updates (default: one epoch of the shards)", minimum=1)
    warmup_steps: int = flag(715, "updates of linear warm-up", minimum=0)
    max_lr: float = flag(6e-4, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(6e-5, "learning rate at the end of the cosine", minimum=0)
    weight_decay: float = flag(0.1, "on matrices and embeddings only", minimum=0)
    beta1: float = flag(0.9, "AdamW's decay of the mean gradient", minimum=0, below=1)
    beta2: float = flag(0.95, "AdamW's decay of the mean squared gradient", minimum=0, below=1)
    eps: float = flag(1e-8, "AdamW's floor under the root", minimum=0)
    grad_clip: float = flag(1.0, "largest global gradient norm", minimum=0)
    eval_interval: int = flag(250, "updates between validations and samples", minimum=1)
    eval_tokens: int = flag(10_485_760, "validate on the first so many tokens", minimum=1)
    save_interval: int = flag(1000, "updates between checkpoints", minimum=1)
    keep_last: int = flag(5, "checkpoints to keep; 0 keeps all", minimum=0)
    log_interval: int = flag(1, "updates between records of the run log", minimum=1)
    sample_prompt: str = flag("Hello, I'm a language model,", "continued at every validation",
                              may_be_empty=True)
    sample_steps: int = flag(32, "tokens of that sample; 0 for none", minimum=0)
    seed: int = flag(1337, "of the weights, the order of the data and the samples", minimum=0,
                     below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of autocast: bfloat16 or float16 on CUDA, else float32")
    compile: bool | None = flag(None, "torch.compile the training step (default: on CUDA)")
    resume: bool = flag(False, "go on from the newest checkpoint in --out-dir, if there is one")
    loss_graph: str | None = flag(None, "the PNG to draw (default: OUT_DIR/pretrain_loss.png)")


# What a resumed run may not change: the model, or which windows an update sees.
FIXED_ON_RESUME = ("n_layer", "n_head", "n_embd", "block_size", "total_batch_size",
                   "sequence_length", "seed", "data")


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


def make_loader(config: TrainerConfig, launch: Launch, split: str, vocab_size: int) -> TokenLoader:
    return TokenLoader(Path(config.data_dir), split, sequence_length=config.sequence_length,
                       micro_batch_size=config.micro_batch_size,
                       total_batch_size=config.total_batch_size, vocab_size=vocab_size,
                       seed=config.seed, rank=launch.rank, world_size=launch.world_size)


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


def find_resume(config: TrainerConfig, manifest: dict, launch: Launch) -> tuple[Path, dict] | None:
    """The newest checkpoint of --out-dir with its training state; None for a new run.

    Raises UserError when the folder holds a run but --resume was not given, and when a setting
    that decides what an update sees is not what it was. Other changed settings are listed.
    """
    checkpoints = list_checkpoints(Path(config.out_dir))
    if not config.resume:
        if checkpoints or (Path(config.out_dir) / "metrics.jsonl").exists():
            raise UserError(f"--out-dir {config.out_dir} already holds a run: add --resume to go "
                            "on with it, or choose another --out-dir")
        return None
    if not checkpoints:
        launch.print0(f"--resume: no checkpoint in {config.out_dir} yet, starting from scratch, "
                      "also with its log")
        return None
    state = load_training_state(checkpoints[-1])
    try:
        saved = TrainerConfig(**state["config"])
    except TypeError as error:
        raise UserError(f"{checkpoints[-1]} was written by another version of trainer.py "
                        f"({error}): start in another --out-dir") from None
    before, now = (dataclasses.asdict(run) | dataclasses.asdict(model_config(run)) | {"data": data}
                   for run, data in ((saved, state["data"]), (config, manifest)))
    for name in sorted(key for key in now if now[key] != before[key] and key != "preset"):
        if name in FIXED_ON_RESUME:
            detail = "" if name == "data" else f" ({before[name]} before, {now[name]} now)"
            raise UserError(f"--resume: {name} is not what {checkpoints[-1]} was trained with"
                            f"{detail}: restore it, or start in another --out-dir")
        if name != "resume":
            launch.print0(f"--resume: {name} was {before[name]}, is now {now[name]}")
    return checkpoints[-1], state


def prepare_compile(config: TrainerConfig, launch: Launch) -> bool:
    """Whether to compile the training step; a missing compiler is one line, not the end."""
    wanted = launch.device_type == "cuda" if config.compile is None else config.compile
    missing = missing_for_compile(launch.device) if wanted else None
    if missing:
        launch.print0(f"torch.compile needs {missing}: training without it, more slowly")
    return wanted and missing is None


@torch.no_grad()
def evaluate(model: GPT, loader: TokenLoader, launch: Launch, dtype: torch.dtype,
             max_tokens: int) -> float:
    """Mean loss over the first max_tokens targets of a split: summed over all ranks in float64, so
    that it is one number for any world size and micro-batch."""
    summed, count = 0.0, 0  # loss, targets
    for inputs, targets in loader.eval_batches(max_tokens):
        inputs, targets = to_device(inputs, launch.device), to_device(targets, launch.device)
        with autocast(launch.device, dtype):
            _, loss = model(inputs, targets, reduction="sum", return_logits=False)
        summed += loss.item()
        count += (targets != IGNORE_INDEX).sum().item()
    summed, count = launch.sum(torch.tensor([summed, count], dtype=torch.float64)).tolist()
    return summed / count


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
    log = RunLog(Path(config.out_dir) / "samples.jsonl")
    log.write(step, "sample", text=text)
    log.close()
    return text


def write_run_file(config: TrainerConfig, launch: Launch, manifest: dict, max_steps: int) -> None:
    """OUT_DIR/run.json: what it takes to repeat the run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    run = {"config": dataclasses.asdict(config), "max_steps": max_steps, "versions": versions,
           "world_size": launch.world_size, "device": str(launch.device), "data": manifest}
    with atomic_write(Path(config.out_dir) / "run.json", text=True) as file:
        json.dump(run, file, indent=1)


def train(config: TrainerConfig, launch: Launch) -> GPT:
    """Pre-trains from the first or the resumed update to the last; returns the final model."""
    out_dir, device = Path(config.out_dir), launch.device
    image = Path(config.loss_graph or out_dir / "pretrain_loss.png")

    # 1. What an update is, how many there are, and whether some were made already
    sizes = model_config(config)
    grad_accum_steps = micro_steps_per_update(
        config.total_batch_size, micro_batch_size=config.micro_batch_size,
        row=config.sequence_length, world_size=launch.world_size, flag="--total-batch-size")
    manifest = read_manifest(Path(config.data_dir))
    train_loader = make_loader(config, launch, "train", sizes.vocab_size)
    val_loader = make_loader(config, launch, "val", sizes.vocab_size)
    max_steps = config.max_steps or one_epoch(config, train_loader, launch)
    resumed = find_resume(config, manifest, launch)
    launch.check_same("what --out-dir and --data-dir hold",
                      {"step": resumed[1]["step"] if resumed else None, "data": manifest})
    samples = can_sample(config, sizes, launch)
    check_image(image)
    if config.warmup_steps > max_steps:
        launch.print0(f"the warm-up of {config.warmup_steps} updates is longer than the run of "
                      f"{max_steps}: --max-lr will not be reached")
    launch.barrier()  # every rank has looked into --out-dir before rank 0 writes there

    # 2. Model and optimizer. Initialised on the CPU: the same weights on every device and rank
    is_resumed = resumed is not None
    if resumed:
        raw_model = load_model(resumed[0], device).train()
    else:
        torch.manual_seed(config.seed)
        raw_model = GPT(sizes).to(device)
    dtype = pick_dtype(config.dtype, device)
    optimizer = make_adamw(raw_model, lr=config.max_lr, betas=(config.beta1, config.beta2),
                           eps=config.eps, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step = start_step = 0  # updates made so far
    if resumed:
        checkpoint, state = resumed
        step = start_step = state["step"]
        if step > max_steps:
            raise UserError(f"--resume: {checkpoint} was made after {step} updates, more than the "
                            f"{max_steps} of this run: raise --max-steps")
        try:
            load_optimizer_state(optimizer, state["optimizer"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"--resume: the optimizer's state in {checkpoint} is not that of this "
                            f"model ({error}): rm -r {checkpoint} goes back to the one before, if "
                            "there is one") from None
        if scaler.is_enabled() and state["scaler"]:  # empty after a run in another dtype
            scaler.load_state_dict(state["scaler"])
        del state, resumed  # the moments are twice the size of the weights
    compiled = prepare_compile(config, launch)
    if compiled:
        raw_model.compile()  # in place: names of parameters stay as they are
    model = raw_model
    if launch.world_size > 1:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True,
                                        device_ids=[device] if device.type == "cuda" else None)
    launch.print0(
        f"{raw_model.num_parameters():,} parameters; {dtype} on {launch.world_size} x {device}"
        f"{', compiled' if compiled else ''}; {max_steps:,} updates of "
        f"{config.total_batch_size:,} tokens = {grad_accum_steps} micro-steps x "
        f"{config.micro_batch_size} x {config.sequence_length} x {launch.world_size} ranks")

    # 3. The loop
    if launch.is_master:
        out_dir.mkdir(parents=True, exist_ok=True)
        write_run_file(config, launch, manifest, max_steps)
        log = RunLog(out_dir / "metrics.jsonl", fresh=not is_resumed)
    bar = progress_bar(max_steps, step, "pre-training", enabled=launch.is_master)
    peak = peak_flops(device)
    flops = flops_per_token(raw_model, config.sequence_length)
    batches = train_loader.stream(step, grad_accum_steps, lambda x: to_device(x, device))
    clock, clock_step = seconds_on(device), step  # of the last record in the log
    while True:
        is_last = step >= max_steps
        eval_due = is_last or step % config.eval_interval == 0
        save_due = is_last or (step % config.save_interval == 0 and step > 0)
        if (eval_due or save_due) and (step > start_step or is_last or not is_resumed):
            pause = seconds_on(device)
            if eval_due:
                # the raw module, uncompiled: other shapes would only make it compile again
                with torch.compiler.set_stance("force_eager"):
                    val_loss = evaluate(raw_model, val_loader, launch, dtype, config.eval_tokens)
                    if launch.is_master:
                        log.write(step, "val", loss=val_loss)
                        bar.write(f"step {step}: validation loss {val_loss:.4f}")
                    if launch.is_master and samples:
                        bar.write("  " + write_sample(raw_model, config, step))
            if save_due and launch.is_master and (step > start_step or not is_resumed):
                state = {"step": step, "optimizer": optimizer.state_dict(),
                         "scaler": scaler.state_dict(), "config": dataclasses.asdict(config),
                         "data": manifest}
                save_checkpoint(out_dir, step, raw_model, training_state=state,
                                keep_last=config.keep_last)
            clock += seconds_on(device) - pause  # neither counts as training time
        if is_last:
            break

        lr = cosine_lr(step, warmup_steps=config.warmup_steps, max_steps=max_steps,
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
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        save_next = step == max_steps - 1 or (step + 1) % config.save_interval == 0
        if step % config.log_interval == 0 or save_next:
            loss = launch.sum(loss_sum).item() / launch.world_size
            seconds, clock = seconds_on(device) - clock, seconds_on(device)
            tokens_per_sec = (step + 1 - clock_step) * config.total_batch_size / seconds
            clock_step = step + 1
            mfu = tokens_per_sec * flops / (peak * launch.world_size) if peak else None
            if not math.isfinite(loss):  # on all ranks alike, and before it is saved
                raise UserError(f"the loss of update {step} is {loss}: the run has diverged; lower "
                                "--max-lr and go on from the last checkpoint with --resume")
            if launch.is_master:
                log.write(step, "train", loss=loss, lr=lr, grad_norm=grad_norm.item(),
                          tokens_per_sec=tokens_per_sec, mfu=mfu)
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_sec:,.0f} tok/s, MFU "
                                    + (f"{mfu:.1%}" if mfu else "n/a"), refresh=False)
        step += 1
        bar.update()

    # 4. What is left behind
    bar.close()
    if launch.is_master:
        log.close()
        draw_loss_graph([("", out_dir / "metrics.jsonl")], image, "Pre-training loss")
        print(f"finished {max_steps:,} updates: {list_checkpoints(out_dir)[-1]}, graph {image}")
    return raw_model


def main() -> None:
    config = parse_config(TrainerConfig, description=__doc__)
    train(config, start(config.device))
    stop()  # not after an error: it would wait for ranks that wait for this one


if __name__ == "__main__":
    run_main(main)
