"""Instruction tuning of a checkpoint on rows of instruction, input and output (Alpaca's format), of
prompt and completion, or of chat messages.

    python finetune.py --checkpoint out/pretrain --data finetune_data/alpaca.json
    python finetune.py --checkpoint gpt2                       # OpenAI's weights, from the hub
    torchrun --standalone --nproc-per-node=8 finetune.py --checkpoint out/pretrain

The loss is over the tokens of the response and its final <|endoftext|>: the model learns to answer
and to stop, not to repeat questions. Writes OUT_DIR/step_NNNNNN/ (with the name of the prompt
template) after every epoch and every --save-interval steps, OUT_DIR/metrics.jsonl and, at the end,
the loss graph. SIGTERM, SIGINT, SIGUSR1 and SIGHUP save and stop the run; --resume continues it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import torch

from dataloader import (
    PAD_TOKEN,
    Example,
    TextTurn,
    make_examples,
    num_inputs,
    padded_length,
    read_rows,
    row_batches,
    split_rows,
    text_turns,
    token_ids,
)
from inference import check_vocabulary
from minigpt2.checkpoint import load_model
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch, autocast, mean_loss, to_device
from minigpt2.faults import StopRequest, launched
from minigpt2.files import sha256_of
from minigpt2.loss import IGNORE_INDEX
from minigpt2.optimizer import learning_rate, make_optimizer, set_lr
from minigpt2.run import Run, TuningConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, decode
from model import GPT

ROOT = Path(__file__).resolve().parent
SHOWN = 240  # characters of each part of the example that is printed


@dataclass(frozen=True)
class FinetuneConfig(TuningConfig):
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name to start from",
                           is_path=True)
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"),
                     "rows as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "finetune"), "folder of checkpoints and logs",
                        is_path=True)
    epochs: int = flag(2, "passes over the training rows", minimum=1)
    micro_batch_size: int | Literal["auto"] = flag(
        16, "rows per rank and micro-step; auto: the largest that fits", minimum=1)
    max_lr: float = flag(5e-5, "learning rate after the warm-up", minimum=0)
    train_on_prompt: bool = flag(False, "train on the prompts' tokens too, not only the responses'")


ROW_ORDER = "split by hash, steps by length"  # in checkpoints; other versions had other orders
# A resumed run may not change which rows a step sees
FIXED_ON_RESUME = ("batch_size", "epochs", "val_fraction", "train_on_prompt", "seed", "data_sha256")


def read_turns(path: Path) -> list[list[TextTurn]]:
    """The turns of every row of a file. Raises UserError naming the first bad row."""
    try:
        return [text_turns(row, place) for place, row in read_rows(path)]
    except OSError as error:
        raise UserError(f"cannot read --data {path} ({error}): make it with "
                        "finetune_data/alpaca_downloader.py or pydocs_questions.py") from None


def with_prompt_targets(example: Example) -> Example:
    """The example with all tokens as targets but the first, which follows nothing."""
    first, *others = token_ids(example)
    return [([first], others)]


def show_example(example: Example) -> str:
    """The text of an example with its trained parts in [[ ]]; long parts and the turns after the
    second are left out."""
    texts = [decode(ids) for turn in example[:2] for ids in turn]
    texts = [text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
             for text in texts]
    shown = "".join(f"{prompt}[[{response}]]" for prompt, response in
                    zip(texts[::2], texts[1::2], strict=True))
    return shown + f" ... ({len(example) - 2} more turns)" * (len(example) > 2)


def collate(rows: list[Example], B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> inputs, right-padded with PAD_TOKEN, and targets, both (B, T) int64. Fewer than B
    rows are completed with rows of padding. Only response tokens are targets, found by length
    because PAD_TOKEN is also a real id."""
    inputs, targets = torch.full((B, T), PAD_TOKEN), torch.full((B, T), IGNORE_INDEX)  # (B, T)
    for i, example in enumerate(rows):
        ids = torch.tensor(token_ids(example))
        labels = torch.tensor([label for prompt, response in example
                               for label in [IGNORE_INDEX] * len(prompt) + response])
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, : len(ids) - 1] = labels[1:]
    return inputs, targets


def split_examples(config: FinetuneConfig, turns: list[list[TextTurn]], block_size: int,
                   ) -> tuple[list[Example], list[Example], str]:
    """(training rows, held-out rows by length, what to print about them). Raises UserError."""
    keys, examples, summary = make_examples(turns, block_size)
    if len(examples) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; expected at least 2: give other rows, "
                        "or a model with a longer context")
    trained, held_out, split_summary = split_rows(keys, config.val_fraction)
    train_rows = [examples[i] for i in trained]
    if config.train_on_prompt:
        train_rows = list(map(with_prompt_targets, train_rows))
    return train_rows, sorted((examples[i] for i in held_out), key=num_inputs), (
        f"{summary}; {split_summary}\nThe first row, its trained part in [[ ]]:\n"
        f"{show_example(train_rows[0])}")


def padded_to(rows: list[Example], block_size: int) -> int:
    """The T to which rows of one micro-step are padded."""
    return min(padded_length(max(map(num_inputs, rows))), block_size)


def micro_steps(rows: list[Example], micro_batch_size: int, block_size: int, world_size: int,
                ) -> Iterator[tuple[list[Example], int]]:
    """The rows of each micro-step, of all ranks, and the T of its micro-batches."""
    for first in range(0, len(rows), micro_batch_size * world_size):
        part = rows[first : first + micro_batch_size * world_size]
        yield part, padded_to(part, block_size)


def micro_batches(rows: list[Example], micro_batch_size: int, block_size: int, launch: Launch,
                  ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's micro-batches of `rows`, as inputs and targets (B, T): equally many and of equal
    shapes on every rank. The rows of a micro-step are dealt out in turn, so that ranks have equally
    many of them, up to one, of nearly equal lengths."""
    for part, T in micro_steps(rows, micro_batch_size, block_size, launch.world_size):
        yield collate(part[launch.rank :: launch.world_size], micro_batch_size, T)


def measure_padding(epoch: Iterable[list[Example]], micro_batch_size: int, block_size: int,
                    launch: Launch) -> str:
    """How many of the tokens that an epoch computes are padding, and in how many shapes."""
    tokens, computed, shapes = 0, 0, set()
    for rows in epoch:
        for part, T in micro_steps(rows, micro_batch_size, block_size, launch.world_size):
            tokens += sum(map(num_inputs, part))
            computed += T * micro_batch_size * launch.world_size
            shapes.add(T)
    return f"padding {1 - tokens / computed:.1%} of the tokens, {len(shapes)} shapes"


def micro_batch_sizes(config: FinetuneConfig, num_rows: int, launch: Launch) -> list[int]:
    """The micro-batches to choose from, largest first: even parts of a rank's share of the num_rows
    of a step, so that no micro-step has many rows of padding."""
    share = -(-num_rows // launch.world_size)
    wanted = config.micro_batch_size
    if wanted == "auto":
        sizes = [share >> n for n in range(share.bit_length())]
    else:
        sizes = [min(wanted, share)]
    sizes = [-(-share // -(-share // size)) for size in sizes]  # in equally many micro-steps
    if wanted not in ("auto", sizes[0]):
        launch.print0(f"--micro-batch-size {wanted}: using {sizes[0]}, an even part of a rank's "
                      f"share of the {num_rows} rows of a step")
    return sizes


def start_run(config: FinetuneConfig, launch: Launch, stop: StopRequest | None) -> Run:
    """The run in --out-dir, resumed or new. Raises UserError if the folder cannot be used."""
    run = Run(config, launch, stop, label="fine-tuning", graph="finetune_loss.png",
              data={"sha256": sha256_of(Path(config.data))}, fixed=FIXED_ON_RESUME,
              prompt_template=PROMPT_TEMPLATE, row_order=ROW_ORDER)
    if run.is_resumed and run.saved["facts"].get("row_order") != ROW_ORDER:
        raise UserError(f"--resume: {run.checkpoint} was written by a version that trained on the "
                        "rows in another order: start in another --out-dir")
    return run


def train(config: FinetuneConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Fine-tunes for the given epochs, or until a signal; returns the final model."""
    device = launch.device

    # 1. The rows, the model, and the checkpoint to resume from
    turns = read_turns(Path(config.data))
    run = start_run(config, launch, stop)
    base = run.checkpoint or config.checkpoint
    raw_model = load_model(base, device)
    check_vocabulary(raw_model, base)
    block_size = raw_model.config.block_size
    train_rows, val_rows, summary = split_examples(config, turns, block_size)
    launch.print0(summary)

    # 2. The number of steps, and the optimizer
    num_rows = min(config.batch_size, len(train_rows))  # of a step
    steps_per_epoch = -(-len(train_rows) // num_rows)  # ceiling division
    max_steps = config.epochs * steps_per_epoch
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    model = run.prepare(
        raw_model, optimizer, max_steps, max_steps_flag="--epochs",
        milestones=range(steps_per_epoch, max_steps, steps_per_epoch),
        micro_batch_sizes=micro_batch_sizes(config, num_rows, launch),
        sequence_length=padded_to(train_rows + val_rows, block_size))
    B, left = run.micro_batch_size, len(train_rows) % num_rows
    batches_from = partial(row_batches, train_rows, num_inputs, num_rows, config.seed)
    padding = measure_padding(islice(batches_from(0), steps_per_epoch), B, block_size, launch)
    launch.print0(f"{run.summary}; {max_steps:,} steps of {num_rows} rows"
                  + (f", the last of an epoch of {left}" if left else "") + f"; {padding}")
    global_batches = batches_from(run.step)

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                batches = micro_batches(val_rows, B, block_size, launch)
                run.log_validation(mean_loss(raw_model, batches, launch, run.dtype,
                                             run.stop.requested))
            if run.save_or_finish():
                break

            lr = learning_rate(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                               max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = next(global_batches)  # of all ranks
            num_valid_tokens = sum(len(response) for row in batch for _, response in row)
            batches = list(micro_batches(batch, B, block_size, launch))
            loss_sum = torch.zeros((), device=device)
            for micro_step, (inputs, targets) in enumerate(batches):
                inputs, targets = to_device(inputs, device), to_device(targets, device)  # (B, T)
                with run.gradient_sync(micro_step == len(batches) - 1):
                    with autocast(device, run.dtype):
                        _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                    # Mean over the response tokens of the global batch, not a mean of means
                    loss = loss * (launch.world_size / num_valid_tokens)
                    run.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            tokens = sum(map(num_inputs, batch))
            run.finish_step(loss_sum, lr=lr, tokens=tokens, sequence_length=tokens // len(batch))
    return raw_model.eval()


def main() -> None:
    config = parse_config(FinetuneConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
