"""Instruction tuning of any checkpoint on rows of instruction, input and output (Alpaca's format).

    python finetune.py --checkpoint out/pretrain --data finetune_data/alpaca.json
    python finetune.py --checkpoint gpt2                       # OpenAI's weights, from the hub
    torchrun --standalone --nproc-per-node=8 finetune.py --checkpoint out/pretrain

The loss is over the tokens of the response and its final <|endoftext|>: the model learns to answer
and to stop, not to repeat questions. Writes OUT_DIR/step_NNNNNN/ after every epoch, marked with the
prompt template, OUT_DIR/metrics.jsonl and, at the end, the loss graph.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from torch.nn.parallel import DistributedDataParallel

from checkpoint import CONFIG_FILE, list_checkpoints, load_model, save_checkpoint
from config import UserError, first_line, flag, parse_config, run_main
from dataloader import permutation
from distributed import Dtype, Launch, autocast, pick_dtype, seconds_on, start, stop, to_device
from metrics import RunLog, check_image, draw_loss_graph
from model import GPT, IGNORE_INDEX
from optimizer import cosine_lr, make_adamw, set_lr
from progress import progress_bar
from sampling import PAD_TOKEN, check_vocabulary
from tokenizer import PROMPT_TEMPLATE, encode_example

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
    micro_batch_size: int = flag(16, "rows per rank and micro-step", minimum=1)
    max_lr: float = flag(5e-5, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", minimum=0)
    warmup_fraction: float = flag(0.03, "of the updates, for linear warm-up", minimum=0, below=1)
    weight_decay: float = flag(0.0, "on matrices and embeddings only", minimum=0)
    grad_clip: float = flag(1.0, "largest global gradient norm", minimum=0)
    val_fraction: float = flag(0.05, "of the rows, held out for validation: at least one",
                               minimum=0, below=1)
    eval_interval: int = flag(100, "updates between validations", minimum=1)
    seed: int = flag(1337, "of the split and the order of the rows", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of autocast: bfloat16 or float16 on CUDA, else float32")
    loss_graph: str | None = flag(None, "the PNG to draw (default: OUT_DIR/finetune_loss.png)")


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


@torch.no_grad()
def evaluate(model: GPT, examples: list[Example], micro_batch_size: int, launch: Launch,
             dtype: torch.dtype) -> float:
    """Mean loss per response token over all held-out rows and ranks."""
    summed, count = 0.0, 0  # loss, targets
    mine = sorted(examples, key=lambda row: len(row[0]) + len(row[1]))
    mine = mine[launch.rank :: launch.world_size]
    for first in range(0, len(mine), micro_batch_size):
        inputs, targets = collate(mine[first : first + micro_batch_size])
        inputs, targets = to_device(inputs, launch.device), to_device(targets, launch.device)
        with autocast(launch.device, dtype):
            _, loss = model(inputs, targets, reduction="sum", return_logits=False)
        summed += loss.item()
        count += (targets != IGNORE_INDEX).sum().item()
    summed, count = launch.sum(torch.tensor([summed, count], dtype=torch.float64)).tolist()
    return summed / count


def train(config: FinetuneConfig, launch: Launch) -> GPT:
    """Fine-tunes for the given epochs; returns the final model."""
    out_dir, device = Path(config.out_dir), launch.device
    image = Path(config.loss_graph or out_dir / "finetune_loss.png")

    # 1. The rows, and how many updates they make
    if list_checkpoints(out_dir) or (out_dir / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {out_dir} already holds a checkpoint: choose another")
    check_image(image)
    rows = read_rows(Path(config.data))
    raw_model = load_model(config.checkpoint, device).train()
    check_vocabulary(raw_model, config.checkpoint)
    examples, summary = make_examples(rows, raw_model.config.block_size)
    if len(examples) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; at least 2 are needed: give other rows, "
                        "or a model with a longer context")
    train_rows, val_rows = split_rows(examples, config.val_fraction, config.seed)
    epoch_ends = {-(-epoch * len(train_rows) // config.batch_size)  # rounded up, in whole numbers
                  for epoch in range(1, config.epochs + 1)}
    max_steps = max(epoch_ends)
    # not so many rows in a micro-batch that some ranks would have none
    micro_batch_size = min(config.micro_batch_size, -(-config.batch_size // launch.world_size))
    if micro_batch_size < config.micro_batch_size:
        launch.print0(f"--micro-batch-size {config.micro_batch_size} is more than a rank's share "
                      f"of --batch-size {config.batch_size}: {micro_batch_size} is used")
    grad_accum_steps = -(-config.batch_size // (micro_batch_size * launch.world_size))
    launch.print0(f"{summary}; {len(train_rows):,} to train on, {len(val_rows):,} held out")
    launch.barrier()  # every rank has looked into --out-dir before rank 0 writes there

    # 2. Model and optimizer
    dtype = pick_dtype(config.dtype, device)
    optimizer = make_adamw(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                           weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model = raw_model
    if launch.world_size > 1:
        model = DistributedDataParallel(raw_model, gradient_as_bucket_view=True,
                                        device_ids=[device] if device.type == "cuda" else None)
    launch.print0(f"{raw_model.num_parameters():,} parameters; {dtype} on {launch.world_size} x "
                  f"{device}; {max_steps:,} updates of {config.batch_size} rows")

    # 3. The loop
    if launch.is_master:
        out_dir.mkdir(parents=True, exist_ok=True)
        log = RunLog(out_dir / "metrics.jsonl", fresh=True)
    bar = progress_bar(max_steps, 0, "fine-tuning", enabled=launch.is_master)
    step = 0  # updates made so far
    while True:
        is_last = step >= max_steps
        if is_last or step % config.eval_interval == 0:
            val_loss = evaluate(raw_model, val_rows, micro_batch_size, launch, dtype)
            if launch.is_master:
                log.write(step, "val", loss=val_loss)
                bar.write(f"step {step}: validation loss {val_loss:.4f}")
        if step in epoch_ends and launch.is_master:
            save_checkpoint(out_dir, step, raw_model, prompt_template=PROMPT_TEMPLATE)
        if is_last:
            break

        clock = seconds_on(device)
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
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        loss = launch.sum(loss_sum).item() / launch.world_size
        tokens = sum(len(prompt) + len(response) for prompt, response in batch)
        tokens_per_sec = tokens / (seconds_on(device) - clock)
        if not math.isfinite(loss):  # on all ranks alike, and before it is saved
            raise UserError(f"the loss of update {step} is {loss}: the run has diverged; lower "
                            "--max-lr and start again")
        if launch.is_master:
            log.write(step, "train", loss=loss, lr=lr, grad_norm=grad_norm.item(),
                      tokens_per_sec=tokens_per_sec)
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_sec:,.0f} tok/s", refresh=False)
        step += 1
        bar.update()

    # 4. What is left behind
    bar.close()
    if launch.is_master:
        log.close()
        draw_loss_graph([("", out_dir / "metrics.jsonl")], image, "Fine-tuning loss")
        print(f"finished {max_steps:,} updates: {list_checkpoints(out_dir)[-1]}, graph {image}")
    return raw_model.eval()


def main() -> None:
    config = parse_config(FinetuneConfig, description=__doc__)
    train(config, start(config.device))
    stop()  # not after an error: it would wait for ranks that wait for this one


if __name__ == "__main__":
    run_main(main)
