"""Instruction tuning of a checkpoint on rows of instruction, input and output (Alpaca's format).

    python finetune.py --checkpoint out/pretrain --data finetune_data/alpaca.json
    python finetune.py --checkpoint gpt2                       # OpenAI's weights, from the hub
    torchrun --standalone --nproc-per-node=8 finetune.py --checkpoint out/pretrain

The loss is over the tokens of the response and its final <|endoftext|>: the model learns to answer
and to stop, not to repeat questions. Writes OUT_DIR/step_NNNNNN/ (with the name of the prompt
template) after every epoch and every --save-interval steps, OUT_DIR/metrics.jsonl and, at the end,
the loss graph. SIGTERM, SIGINT, SIGUSR1 and SIGHUP save and stop the run; --resume continues it.
"""

import json
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
from minigpt2.distributed import Launch, autocast, mean_loss, to_device
from minigpt2.faults import StopRequest, launched
from minigpt2.files import sha256_of
from minigpt2.loss import IGNORE_INDEX
from minigpt2.optimizer import cosine_lr, make_optimizer, set_lr
from minigpt2.run import Run, RunConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, encode_example
from model import GPT

ROOT = Path(__file__).resolve().parent
COLUMNS = ("instruction", "input", "output")
Example = tuple[list[int], list[int]]  # ids of the prompt, ids of the response with <|endoftext|>
FILLER: Example = ([PAD_TOKEN, PAD_TOKEN], [])  # for a rank that has no row left: no targets


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name to start from",
                           is_path=True)
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"),
                     "rows as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "finetune"), "folder of checkpoints and logs",
                        is_path=True)
    epochs: int = flag(2, "passes over the training rows", minimum=1)
    batch_size: int = flag(64, "rows per step, over all ranks", minimum=1)
    micro_batch_size: int | Literal["auto"] = flag(
        16, "rows per rank and micro-step; auto: the largest that fits", minimum=1)
    max_lr: float = flag(5e-5, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", minimum=0)
    warmup_fraction: float = flag(0.03, "linear warm-up, as a fraction of all steps",
                                  minimum=0, below=1)
    weight_decay: float = flag(0.0, "weight decay of matrices and embeddings", minimum=0)
    val_fraction: float = flag(0.05, "fraction of rows held out for validation, at least one",
                               minimum=0, below=1)
    eval_interval: int = flag(100, "steps between validations", minimum=1)
    save_interval: int = flag(200, "steps between checkpoints, in addition to one per epoch",
                              minimum=1)
    keep_last: int = flag(3, "newest checkpoints to keep, plus the one with the lowest "
                             "validation loss; 0: all", minimum=0)
    compile: bool | None = flag(False, "torch.compile the training step (off by default: rows "
                                       "differ in length, and new shapes recompile)")


# A resumed run may not change which rows a step sees
FIXED_ON_RESUME = ("batch_size", "epochs", "val_fraction", "seed", "data_sha256")


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON list, a JSON Lines file or a parquet file: dicts with text under
    instruction, input ("" if absent) and output. Raises UserError naming the first bad row."""
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
        raise UserError(f"--data {path} is not a JSON list, JSON Lines or parquet file: "
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
    """Rows as token ids, and a summary that counts what was left out: rows without an answer
    (Alpaca has some), and rows longer than the context, whose <|endoftext|> would be cut off."""
    examples, empty, long = [], 0, 0
    for row in rows:
        prompt, response = encode_example(row["instruction"], row["input"], row["output"])
        if not row["output"].strip():
            empty += 1
        elif len(prompt) + len(response) > block_size + 1:  # the last token is only a target
            long += 1
        else:
            examples.append((prompt, response))
    return examples, (f"{len(examples):,} of {len(rows):,} rows (left out: {empty:,} without an "
                      f"answer and {long:,} over {block_size} tokens)")


def split_rows(examples: list[Example], val_fraction: float,
               seed: int) -> tuple[list[Example], list[Example]]:
    """(training rows, held-out rows), split at random; the seed decides the split."""
    num_val = max(1, round(len(examples) * val_fraction))
    if len(examples) - num_val < 1:
        raise UserError(f"{len(examples)} usable rows cannot be split into training and validation "
                        f"rows at --val-fraction {val_fraction}: give more rows or lower it")
    order = permutation(len(examples), seed)
    return [examples[i] for i in order[num_val:]], [examples[i] for i in order[:num_val]]


def global_batch(examples: list[Example], step: int, batch_size: int, epochs: int,
                 seed: int) -> list[Example]:
    """The rows of one step, sorted by length so that micro-batches need little padding. Every epoch
    visits each row once, in a new order; the last batch may be shorter."""
    rows = []
    for position in range(step * batch_size, min((step + 1) * batch_size, epochs * len(examples))):
        epoch, place = divmod(position, len(examples))
        rows.append(examples[permutation(len(examples), seed, epoch)[place]])
    return sorted(rows, key=lambda row: len(row[0]) + len(row[1]))


def collate(rows: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> inputs, right-padded with PAD_TOKEN, and targets, each (B, T) int64. Only response
    tokens are targets, found by length because PAD_TOKEN is also a real id."""
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
    """This rank's share of the held-out rows, sorted by length, as inputs and targets (B, T)."""
    mine = sorted(examples, key=lambda row: len(row[0]) + len(row[1]))
    mine = mine[launch.rank :: launch.world_size]
    for first in range(0, len(mine), micro_batch_size):
        yield collate(mine[first : first + micro_batch_size])


def micro_batch_sizes(config: FinetuneConfig, launch: Launch) -> list[int]:
    """The micro-batches to choose from, largest first. None exceeds a rank's share of a step, which
    would leave other ranks without rows."""
    share = -(-config.batch_size // launch.world_size)
    if config.micro_batch_size == "auto":
        return [share >> n for n in range(share.bit_length())]
    if config.micro_batch_size > share:
        launch.print0(f"--micro-batch-size {config.micro_batch_size} is more than a rank's share "
                      f"of --batch-size {config.batch_size}: using {share}")
    return [min(config.micro_batch_size, share)]


def train(config: FinetuneConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Fine-tunes for the given epochs, or until a signal; returns the final model."""
    device, data = launch.device, Path(config.data)

    # 1. The rows, the model, and the checkpoint to resume from
    if (Path(config.out_dir) / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {config.out_dir} is itself a checkpoint: choose another")
    rows = read_rows(data)
    run = Run(config, launch, stop, label="fine-tuning", graph="finetune_loss.png",
              data={"sha256": sha256_of(data)}, fixed=FIXED_ON_RESUME,
              prompt_template=PROMPT_TEMPLATE)
    base = run.checkpoint or config.checkpoint
    raw_model = load_model(base, device)
    check_vocabulary(raw_model, base)
    examples, summary = make_examples(rows, raw_model.config.block_size)
    if len(examples) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {data}: {summary}; expected at least 2: give other rows, or a "
                        "model with a longer context")
    train_rows, val_rows = split_rows(examples, config.val_fraction, config.seed)
    launch.print0(f"{summary}; {len(train_rows):,} to train on, {len(val_rows):,} held out")

    # 2. The number of steps, and the optimizer
    epoch_ends = [-(-epoch * len(train_rows) // config.batch_size)  # ceiling division
                  for epoch in range(1, config.epochs + 1)]
    max_steps = epoch_ends[-1]
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    model = run.prepare(
        raw_model, optimizer, max_steps, max_steps_flag="--epochs", milestones=epoch_ends,
        micro_batch_sizes=micro_batch_sizes(config, launch),
        sequence_length=max(len(prompt) + len(response) - 1 for prompt, response in examples))
    B = run.micro_batch_size
    grad_accum_steps = -(-config.batch_size // (B * launch.world_size))
    launch.print0(f"{run.summary}; {max_steps:,} steps of {config.batch_size} rows")

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                run.log_validation(mean_loss(raw_model, eval_batches(val_rows, B, launch), launch,
                                             run.dtype, run.stop.requested))
            if run.save_or_finish():
                break

            lr = cosine_lr(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                           max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = global_batch(train_rows, run.step, config.batch_size, config.epochs,
                                 config.seed)
            num_valid_tokens = sum(len(response) for _, response in batch)  # of all ranks
            loss_sum = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                first = (micro_step * launch.world_size + launch.rank) * B
                inputs, targets = collate(batch[first : first + B] or [FILLER])
                inputs, targets = to_device(inputs, device), to_device(targets, device)  # (B, T)
                with run.gradient_sync(micro_step == grad_accum_steps - 1):
                    with autocast(device, run.dtype):
                        _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                    # Mean over the response tokens of the global batch, not a mean of means
                    loss = loss * (launch.world_size / num_valid_tokens)
                    run.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            tokens = sum(len(prompt) + len(response) for prompt, response in batch)
            run.finish_step(loss_sum, lr=lr, tokens=tokens, sequence_length=tokens // len(batch))
    return raw_model.eval()


def main() -> None:
    config = parse_config(FinetuneConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
