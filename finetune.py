"""Instruction tuning of a checkpoint on Alpaca's rows, on prompt and completion, or chat messages.

    python finetune.py --checkpoint out/pretrain --data finetune_data/alpaca.json
    python finetune.py --checkpoint gpt2                       # OpenAI's weights, from the hub
    torchrun --standalone --nproc-per-node=8 finetune.py --checkpoint out/pretrain

The loss is over the tokens of the response and its final <|endoftext|>: the model learns to answer
and to stop, not to repeat questions. OUT_DIR gets checkpoints, metrics.jsonl and the loss graph. A
signal saves and stops the run; --resume continues it.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dataloader import Example, num_inputs, read_turns, row_batches, split_examples, token_ids
from inference import check_sample_prompt, load_gpt2, write_sample
from minigpt2.checkpoint import shared_template
from minigpt2.config import ROOT, UserError, flag
from minigpt2.distributed import Launch, autocast, mean_loss, to_device
from minigpt2.faults import StopRequest
from minigpt2.files import sha256_of
from minigpt2.loss import IGNORE_INDEX
from minigpt2.optimizer import set_lr
from minigpt2.preferences import padded_length, rank_share
from minigpt2.run import Run, TuningConfig, run_training
from minigpt2.tokenizer import decode, encode_example, load_template
from model import GPT


@dataclass(frozen=True)
class FinetuneConfig(TuningConfig):
    checkpoint: str = flag("gpt2", "start: folder, OUT_DIR of a run, or hub name", is_path=True)
    data: str = flag(str(ROOT / "finetune_data" / "alpaca.json"),
                     "rows as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "finetune"), "checkpoints and logs", is_path=True)
    template: str | None = flag(None, "prompt template: alpaca, question, chatml or a text file "
                                "(default: the checkpoint's, else alpaca)", is_path=True)
    epochs: int | None = flag(None, "passes over rows (default: 2, at least 50 steps)", minimum=1)
    batch_size: int | None = flag(None, "rows per step (default: 4 % of all, 8 to 64)", minimum=1)
    micro_batch_size: int | Literal["auto"] = flag(
        16, "rows per rank and micro-step; auto: the largest that fits", minimum=1)
    max_lr: float | None = flag(None, "learning rate (default: 5e-5*(768/n_embd)**1.5)", minimum=0)
    dropout: float = flag(0.0, "probability of dropout in training", minimum=0, below=1)
    sample_prompt: str | None = flag(None, "prompt of samples (default: one held out)")
    sample_tokens: int = flag(48, "tokens per sample; 0: no samples", minimum=0)


# A resumed run may not change which rows a step sees
FIXED_ON_RESUME = ("template", "columns", "batch_size", "epochs", "val_fraction", "seed",
                   "data_sha256")


def collate(rows: list[Example], B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows -> right-padded inputs (B, T) int64, and their targets, the tokens of responses only."""
    inputs = torch.zeros((B, T), dtype=torch.int64)  # padded with any id, also by whole rows
    targets = torch.full((B, T), IGNORE_INDEX)
    for i, example in enumerate(rows):
        ids = torch.tensor(token_ids(example))
        labels = torch.tensor([label for prompt, response in example
                               for label in [IGNORE_INDEX] * len(prompt) + response])
        inputs[i, : len(ids) - 1] = ids[:-1]
        targets[i, : len(ids) - 1] = labels[1:]
    return inputs, targets


def micro_batches(rows: list[Example], B: int, block_size: int, launch: Launch,
                  ) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's micro-batches of the rows, as inputs and targets (B, T); see `rank_share`."""
    return [collate(part, B, min(padded_length(max(map(num_inputs, part), default=1)), block_size))
            for part in rank_share(rows, B, launch.rank, launch.world_size)]


def train(config: FinetuneConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Fine-tunes for the given epochs, or until a signal; returns the final model."""
    # 1. The rows, the model, and the checkpoint to resume from
    turns = read_turns(Path(config.data), config.columns)
    run = Run(config, launch, stop, label="fine-tuning", graph="finetune_loss.png",
              data={"sha256": sha256_of(Path(config.data))}, fixed=FIXED_ON_RESUME)
    base = run.checkpoint or config.checkpoint
    template = load_template(config.template) if config.template else shared_template(base)
    if run.is_resumed and template != shared_template(base):
        raise UserError(f"--resume: {base} was trained with another --template: restore that")
    run.prompt_template = template
    raw_model = load_gpt2(base, launch.device, config.dropout)
    block_size = raw_model.config.block_size
    train_rows, val_rows, summary = split_examples(turns, block_size, config.val_fraction, template)

    # 2. The number of steps, the optimizer, and the micro-batch
    longest = min(padded_length(max(map(num_inputs, train_rows + val_rows))), block_size)
    model = run.prepare_epochs(raw_model, len(train_rows), longest)
    B = run.micro_batch_size
    prompt, response = map(decode, train_rows[0][0])
    sample_prompt = (encode_example(config.sample_prompt, "", "", template)[0]
                     if config.sample_prompt else val_rows[0][0][0])
    check_sample_prompt(sample_prompt, config, block_size)
    launch.print0(f"{summary}\nThe first turn of a row, its trained part in [[ ]]:\n"
                  f"{prompt}[[{response}]]\n{run.summary}")
    global_batches = row_batches(train_rows, num_inputs, run.batch_size, config.seed, run.step)

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                batches = micro_batches(val_rows, B, block_size, launch)
                val_loss = mean_loss(raw_model, batches, launch, run.dtype, run.stop.requested)
                if run.log_validation(val_loss) and config.sample_tokens and launch.is_master:
                    run.bar.write(write_sample(raw_model, sample_prompt, run))
            if run.save_or_finish():
                break

            lr = config.lr_at(run.step, run.max_steps, raw_model.config.n_embd)
            set_lr(run.optimizer, lr)
            batch = next(global_batches)  # of all ranks
            num_valid_tokens = sum(len(response) for row in batch for _, response in row)
            loss_sum = torch.zeros((), device=launch.device)
            for micro_batch in run.micro_steps(micro_batches(batch, B, block_size, launch)):
                inputs, targets = (to_device(x, launch.device) for x in micro_batch)  # (B, T)
                with autocast(launch.device, run.dtype):
                    _, loss = model(inputs, targets, reduction="sum", return_logits=False)
                # Mean over the response tokens of the global batch, not a mean of means
                loss = loss * (launch.world_size / num_valid_tokens)
                run.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            tokens = sum(map(num_inputs, batch))
            run.finish_step(loss_sum, lr=lr, tokens=tokens, sequence_length=tokens // len(batch))
    return raw_model.eval()


if __name__ == "__main__":
    run_training(FinetuneConfig, train, __doc__)
