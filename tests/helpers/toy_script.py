"""A training script of its own on minigpt2/run.py: its made-up loss is the mean squared logit."""

from dataclasses import dataclass

import torch

from minigpt2.checkpoint import load_model
from minigpt2.config import flag
from minigpt2.distributed import Launch
from minigpt2.faults import StopRequest
from minigpt2.optimizer import make_optimizer
from minigpt2.run import Run, RunConfig, run_training
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=2, n_embd=16)


@dataclass(frozen=True)
class ToyConfig(RunConfig):
    steps: int = flag(40, "optimizer steps", minimum=1)
    micro_batch_size: int = flag(2, "rows per rank and micro-step", minimum=1)


def train(config: ToyConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    run = Run(config, launch, stop, label="toy", graph="toy.png", data={}, fixed=("seed",))
    torch.manual_seed(config.seed)
    raw_model = load_model(run.checkpoint) if run.is_resumed else GPT(SIZES)
    optimizer = make_optimizer(raw_model, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    model = run.prepare(raw_model, optimizer, config.steps, max_steps_flag="--steps",
                        micro_batch_sizes=[config.micro_batch_size], sequence_length=8)
    B, micro_steps = run.micro_batch_size, 8 // (run.micro_batch_size * launch.world_size)
    with run:
        while True:
            if run.eval_due():
                with torch.no_grad():
                    run.log_validation(raw_model(torch.arange(8)[None])[0].pow(2).mean().item())
            if run.save_or_finish():
                break
            torch.manual_seed(run.step)  # the batch of a step depends on the step alone
            batch = torch.randint(100, (micro_steps, launch.world_size, B, 8))
            loss_sum = torch.zeros(())
            for rows in run.micro_steps(batch[:, launch.rank]):
                loss = model(rows)[0].pow(2).mean() / micro_steps
                run.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            run.finish_step(loss_sum, lr=1e-2, tokens=batch.numel(), sequence_length=8, rows=8)
    return raw_model


if __name__ == "__main__":
    run_training(ToyConfig, train, __doc__)
