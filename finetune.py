"""Instruction tuning of any checkpoint on rows of instruction, input and output (Alpaca's format).

    python finetune.py --checkpoint out/pretrain --data finetune_data/alpaca.json
    python finetune.py --checkpoint gpt2                       # OpenAI's weights, from the hub
    torchrun --standalone --nproc-per-node=8 finetune.py --checkpoint out/pretrain

The loss is over the tokens of the response and its final <|endoftext|>: the model learns to answer
and to stop, not to repeat questions. Writes OUT_DIR/step_NNNNNN/ after every epoch and every
--save-interval updates, marked with the prompt template, OUT_DIR/metrics.jsonl and, at the end, the
graph of the run. SIGTERM, SIGINT and SIGUSR1 make it save and stop; --resume goes on from there.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import torch

from dataloader import permutation
from inference import PAD_TOKEN, check_vocabulary
from minigpt2.checkpoint import CONFIG_FILE, load_model
from minigpt2.config import UserError, first_line, flag, parse_config, run_main
from minigpt2.distributed import (
    Dtype,
    Launch,
    autocast,
    data_parallel,
    device_time,
    mean_loss,
    pick_dtype,
    to_device,
)
from minigpt2.faults import StopRequest, agree, count_skipped, launched
from minigpt2.files import sha256_of
from minigpt2.graphs import check_image, draw_runs
from minigpt2.loss import IGNORE_INDEX
from minigpt2.memory import find_micro_batch, moment_bytes
from minigpt2.metrics import run_metadata, start_log
from minigpt2.optimizer import cosine_lr, make_optimizer, set_lr
from minigpt2.progress import progress_bar
from minigpt2.resume import (
    CheckpointWriter,
    TrainState,
    check_settings,
    find_resume,
    restore,
    seed_rank,
)
from minigpt2.tokenizer import PROMPT_TEMPLATE, encode_example
from model import GPT

ROOT = Path(__file__).resolve().parent
COLUMNS = ("instruction", "input", "output")
Example = tuple[list[int], list[int]]  # ids of the prompt, ids of the response with <|endoftext|>
FILLER: Example = ([PAD_TOKEN, PAD_TOKEN], [])  # for a rank that has no row left: carries no loss


@dataclass(frozen=True)
class FinetuneConfig:
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name to start from")
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"),
                     "rows as JSON, JSON Lines or parquet")
    out_dir: str = flag(str(ROOT / "out" / "finetune"), "where checkpoints and logs go")
    epochs: int = flag(2, "passes over the training rows", minimum=1)
    batch_size: int = flag(64, "rows per update, over all ranks", minimum=1)
    micro_batch_size: int | Literal["auto"] = flag(
        16, "rows per rank and micro-step; auto: as many as fit into memory", minimum=1)
    max_lr: float = flag(5e-5, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", minimum=0)
    warmup_fraction: float = flag(0.03, "of the updates, for linear warm-up", minimum=0, below=1)
    weight_decay: float = flag(0.0, "on matrices and embeddings only", minimum=0)
    grad_clip: float = flag(1.0, "largest global gradient norm", minimum=0)
    val_fraction: float = flag(0.05, "of the rows, held out for validation: at least one",
                               minimum=0, below=1)
    eval_interval: int = flag(100, "updates between validations", minimum=1)
    save_interval: int = flag(200, "updates between checkpoints, beside those of the epochs",
                              minimum=1)
    keep_last: int = flag(3, "checkpoints to keep, beside the best; 0 keeps all", minimum=0)
    keep_every: int = flag(0, "keep those of every so many updates as well; 0: none", minimum=0)
    seed: int = flag(1337, "of the split and the order of the rows", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of autocast: bfloat16 or float16 on CUDA, else float32")
    activation_checkpointing: bool = flag(False, "less memory, a third more computation")
    shard_optimizer: bool = flag(False, "every rank keeps a part of AdamW's state: less memory")
    deterministic: bool = flag(False, "only algorithms that give the same bits twice (on CUDA; a "
                                      "CPU's do)")
    resume: bool = flag(False, "go on from the newest checkpoint in --out-dir, if there is one")
    tensorboard: bool = flag(False, "log to OUT_DIR/tensorboard, too")
    wandb: str | None = flag(None, "log to this project of Weights & Biases, too")
    loss_graph: str | None = flag(None, "the PNG to draw (default: OUT_DIR/finetune_loss.png)")


# What a resumed run may not change: which rows an update sees
FIXED_ON_RESUME = ("batch_size", "epochs", "val_fraction", "seed", "data_sha256")
OF_ONE_NODE = ("checkpoint", "data", "device")  # all other facts are the same on all ranks


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON list, a JSON Lines file or a parquet file, each with text in instruction
    and output, and text or nothing in input. Raises UserError naming the first row that is
    otherwise."""
    try:
        content = path.read_bytes()
        if content.startswith(b"PAR1"):
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        else:
            text = content.decode("utf-8-sig")
            rows = (json.loads(text) if text.lstrip().startswith("[")
                    else [json.loads(line) for line in text.split("\n") if line.strip()])
    except OSError as error:
        raise UserError(f"cannot read --data {path} ({error}): make it with "
                        "finetune_data/alpaca_downloader.py or pydocs_questions.py") from None
    except (ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise UserError(f"--data {path} is no JSON list, JSON Lines or parquet file: "
                        f"{first_line(error)}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} is {row!r:.60}, expected an object with the keys "
                            + ", ".join(COLUMNS))
        for column in COLUMNS:
            value = row.get(column)
            if column == "input" and value is None:
                row[column] = value = ""
            if not isinstance(value, str):
                raise UserError(f"{path} row {number}: {column} is {value!r:.60}, expected text")
        if not row["instruction"].strip():
            raise UserError(f"{path} row {number} has an empty instruction")
    return rows


def make_examples(rows: list[dict], block_size: int) -> tuple[list[Example], str]:
    """Rows as token ids, and a line saying what was left out: rows without an answer (Alpaca has
    some), and rows longer than the context, which would lose their end and with it the stop."""
    examples, empty, long = [], 0, 0
    for row in rows:
        prompt, response = encode_example(row["instruction"], row["input"], row["output"])
        if not row["output"].strip():
            empty += 1
        elif len(prompt) + len(response) > block_size + 1:  # the last token is only a target
            long += 1
        else:
            examples.append((prompt, response))
    return examples, (f"{len(examples):,} of {len(rows):,} rows ({empty:,} without an answer and "
                      f"{long:,} over {block_size} tokens left out)")


def split_rows(examples: list[Example], val_fraction: float,
               seed: int) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows), at random but fixed by the seed."""
    num_val = max(1, round(len(examples) * val_fraction))
    if len(examples) - num_val < 1:
        raise UserError(f"{len(examples)} usable rows cannot be split into training and validation "
                        f"rows at --val-fraction {val_fraction}: give more rows or lower it")
    order = permutation(len(examples), seed)
    return [examples[i] for i in order[num_val:]], [examples[i] for i in order[:num_val]]


def global_batch(examples: list[Example], step: int, batch_size: int, epochs: int,
                 seed: int) -> list[Example]:
    """The rows of one update, by length: every row once an epoch, in another order each epoch. The
    last batch may be shorter. Neighbours in length share a micro-batch, so that few pads do."""
    rows = []
    for position in range(step * batch_size, min((step + 1) * batch_size, epochs * len(examples))):
        epoch, place = divmod(position, len(examples))
        rows.append(examples[permutation(len(examples), seed, epoch)[place]])
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))


def collate(rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> inputs, right-padded with PAD_TOKEN, and targets, each (B, T). By length, never by
    comparing ids: every response token is a target, and nothing else is."""
    T = max(len(prompt) + len(response) for prompt, response in rows) - 1
    inputs = torch.full((len(rows), T), PAD_TOKEN)  # (B, T)
    targets = torch.full((len(rows), T), IGNORE_INDEX)  # (B, T)
    for i, (prompt, response) in enumerate(rows):
        ids = torch.tensor(prompt + response)
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    return inputs, targets


def eval_batches(examples: list[Example], micro_batch_size: int, launch: Launch,
                 ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the held-out rows, neighbours in length together."""
    mine = sorted(examples, key=lambda row: len(row[0]) + len(row[1]))
    mine = mine[launch.rank :: launch.world_size]
    for first in range(0, len(mine), micro_batch_size):
        yield collate(mine[first : first + micro_batch_size])


def train(config: FinetuneConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Fine-tunes for the given epochs, or until a signal; returns the final model."""
    out_dir, device, stop = Path(config.out_dir), launch.device, stop or StopRequest()
    image = Path(config.loss_graph or out_dir / "finetune_loss.png")

    # 1. The rows, how many updates they make, and whether some were made already
    if (out_dir / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {out_dir} is itself a checkpoint: choose another")
    check_image(image)
    rows = read_rows(Path(config.data))
    facts = run_metadata(config, world_size=launch.world_size, device=device,
                      data={"sha256": sha256_of(Path(config.data))})
    launch.check_same(facts, except_for=OF_ONE_NODE)
    folder, state = find_resume(out_dir, config.resume, launch)
    is_resumed = folder is not None
    if is_resumed:
        check_settings(folder, state, facts, FIXED_ON_RESUME, launch)
    base = folder if is_resumed else config.checkpoint
    raw_model = load_model(base, device).train()
    check_vocabulary(raw_model, base)
    examples, summary = make_examples(rows, raw_model.config.block_size)
    if len(examples) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; at least 2 are needed: give other rows, "
                        "or a model with a longer context")
    train_rows, val_rows = split_rows(examples, config.val_fraction, config.seed)
    epoch_ends = {-(-epoch * len(train_rows) // config.batch_size)  # rounded up, in whole numbers
                  for epoch in range(1, config.epochs + 1)}
    max_steps = max(epoch_ends)
    launch.print0(f"{summary}; {len(train_rows):,} to train on, {len(val_rows):,} held out")

    # 2. The optimizer and what else goes on from update to update
    dtype = pick_dtype(config.dtype, device)
    shard = config.shard_optimizer and launch.world_size > 1
    if config.shard_optimizer and not shard:
        launch.print0("--shard-optimizer: one rank keeps all of it")
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                           weight_decay=config.weight_decay, shard=shard)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    raw_model.checkpoint_activations = config.activation_checkpointing
    seed_rank(config.seed, 0, launch)
    progress = TrainState()
    if is_resumed:
        progress = restore(folder, state, optimizer, scaler, launch, seed=config.seed,
                           max_steps=max_steps, flag="--epochs")
        del state  # the moments are twice the size of the weights
    # not so many rows in a micro-batch that some ranks would have none
    share = -(-config.batch_size // launch.world_size)
    if config.micro_batch_size == "auto":
        ranks = launch.world_size if shard else 1
        moments = 0 if is_resumed else moment_bytes(raw_model.config, ranks)  # still to be made
        micro_batch_size = find_micro_batch(
            raw_model, [share >> n for n in range(share.bit_length())], launch=launch, dtype=dtype,
            compiled=False, optimizer_bytes=moments,
            sequence_length=max(len(prompt) + len(response) - 1 for prompt, response in examples))
        facts["micro_batch_size"] = micro_batch_size
    else:
        micro_batch_size = min(config.micro_batch_size, share)
        if micro_batch_size < config.micro_batch_size:
            launch.print0(f"--micro-batch-size {config.micro_batch_size} is more than a rank's "
                          f"share of --batch-size {config.batch_size}: {micro_batch_size} is used")
    grad_accum_steps = -(-config.batch_size // (micro_batch_size * launch.world_size))
    model = data_parallel(raw_model, launch)
    launch.print0(
        f"{raw_model.num_parameters():,} parameters; {str(dtype).removeprefix('torch.')} on "
        f"{launch.world_size} x {device}; {max_steps:,} updates of {config.batch_size} rows")

    # 3. The loop
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(CheckpointWriter(
            out_dir, launch, facts, keep_last=config.keep_last, keep_every=config.keep_every,
            saved_step=progress.step if is_resumed else None, prompt_template=PROMPT_TEMPLATE))
        if launch.is_master:
            log = stack.enter_context(contextlib.closing(start_log(
                out_dir, fresh=not is_resumed, start_step=progress.step, metadata=facts,
                tensorboard=config.tensorboard, wandb=config.wandb)))
        bar = stack.enter_context(progress_bar(max_steps, progress.step, "fine-tuning",
                                               enabled=launch.is_master))
        stopping = False
        while True:
            step = progress.step
            is_last = step >= max_steps
            eval_due = ((step in epoch_ends or step % config.eval_interval == 0) and not stopping
                        and progress.val_loss is None)
            if eval_due:
                held_out = eval_batches(val_rows, micro_batch_size, launch)
                progress.val_loss = mean_loss(raw_model, held_out, launch, dtype, stop.requested)
                stopping = progress.val_loss is None
                if launch.is_master and not stopping:
                    log.write(step, "val", loss=progress.val_loss)
                    bar.write(f"step {step}: validation loss {progress.val_loss:.4f}")
            save_due = (step in epoch_ends or stopping
                        or (step % config.save_interval == 0 and step > 0))
            if save_due:
                writer.save(progress, raw_model, optimizer, scaler)
            if is_last or stopping:
                break

            clock = device_time(device)
            lr = cosine_lr(step, warmup_steps=round(max_steps * config.warmup_fraction),
                           max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = global_batch(train_rows, step, config.batch_size, config.epochs, config.seed)
            num_valid_tokens = sum(len(response) for _, response in batch)  # of all ranks
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                first = (micro_step * launch.world_size + launch.rank) * micro_batch_size
                inputs, targets = collate(batch[first : first + micro_batch_size] or [FILLER])
                inputs, targets = to_device(inputs, device), to_device(targets, device)  # (B, T)
                sync = micro_step == grad_accum_steps - 1 or model is raw_model
                with contextlib.nullcontext() if sync else model.no_sync():
                    with autocast(device, dtype):
                        _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                    # the mean over the global batch: DDP averages over ranks what is summed here
                    loss = loss * (launch.world_size / num_valid_tokens)
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

            tokens = sum(len(prompt) + len(response) for prompt, response in batch)
            tokens_per_sec = tokens / (device_time(device) - clock)
            if launch.is_master:
                log.write(step, "train", loss=loss, lr=lr, grad_norm=grad_norm,
                          tokens_per_sec=tokens_per_sec,
                          **({"skipped": progress.skipped} if progress.skipped else {}))
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_sec:,.0f} tok/s", refresh=False)
            if progress.skipped and launch.is_master:
                bar.write(f"update {step} was skipped: loss {loss}, gradient norm {grad_norm}")
            writer.poll()
            bar.update()

    # 4. What is left behind
    if launch.is_master and stopping:
        print(stop.report(progress.step, max_steps, writer.folder))
    elif launch.is_master:
        draw_runs([("", out_dir / "metrics.jsonl")], image, "Fine-tuning loss")
        print(f"finished {max_steps:,} updates, validation loss {progress.val_loss:.4f}: "
              f"{writer.folder}, graph {image}")
    return raw_model.eval()


def main() -> None:
    config = parse_config(FinetuneConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
