"""Direct preference optimization (Rafailov et al. 2023) of a fine-tuned checkpoint: it learns from
pairs of responses, one chosen and one rejected, without a reward model.

    python dpo.py --checkpoint out/finetune --data pairs.jsonl
    torchrun --standalone --nproc-per-node=8 dpo.py --checkpoint out/finetune --data pairs.jsonl

The checkpoint is the policy at the start, and the reference throughout. The loss of a pair is
-log sigmoid(beta * [(chosen - reference's) - (rejected - reference's)]), of log-probabilities of
whole responses with <|endoftext|>. Those of the reference are computed once, before training, and
kept in OUT_DIR/reference.safetensors. Writes OUT_DIR/step_NNNNNN/ after every epoch and every
--save-interval steps, OUT_DIR/metrics.jsonl and, at the end, the loss graph. SIGTERM, SIGINT,
SIGUSR1 and SIGHUP save and stop the run; --resume continues it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dataloader import read_rows, split_rows, step_rows
from inference import check_vocabulary
from minigpt2.advantages import accuracy, dpo_loss, response_targets
from minigpt2.checkpoint import CONFIG_FILE, load_model, weights_sha256
from minigpt2.config import UserError, first_line, flag, parse_config, run_main
from minigpt2.distributed import Launch, autocast
from minigpt2.faults import StopRequest, launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.optimizer import cosine_lr, make_optimizer, set_lr
from minigpt2.preferences import Pair, make_pairs, rank_share
from minigpt2.progress import progress_bar
from minigpt2.rewards import pad_batch
from minigpt2.run import Run, TuningConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, decode
from model import GPT

ROOT = Path(__file__).resolve().parent
CACHE = "reference.safetensors"  # in OUT_DIR
FIGURES = ("loss", "accuracy", "margin", "logp_chosen_change", "logp_rejected_change")


@dataclass(frozen=True)
class DPOConfig(TuningConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "fine-tuned model to start from, and "
                           "reference: folder, OUT_DIR of a run, or hub name", is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "dpo"), "folder of checkpoints and logs", is_path=True)
    beta: float = flag(0.1, "weight of the divergence from the reference", minimum=0)
    label_smoothing: float = flag(0.0, "probability that a label is wrong", minimum=0, below=0.5)
    length_normalized: bool = flag(False, "means over the tokens of a response, not sums; this "
                                          "needs a larger beta, about 5")
    cut: bool = flag(False, "cut responses at the first artifact (##, <|, Instruction) and after "
                            "the last full sentence")
    epochs: int = flag(1, "passes over the training pairs", minimum=1)
    micro_batch_size: int = flag(8, "pairs per rank and micro-step", minimum=1)
    max_lr: float = flag(1e-6, "learning rate after the warm-up", minimum=0)


# A resumed run may change neither the loss nor which pairs a step sees
FIXED_ON_RESUME = ("beta", "label_smoothing", "length_normalized", "cut", "batch_size", "epochs",
                   "val_fraction", "seed", "data_sha256", "reference_sha256")


def read_pairs(config: DPOConfig, block_size: int) -> tuple[list[Pair], list[int], list[int], str]:
    """(usable pairs of --data, indices to train on, indices held out, summary), split as the rows of
    finetune.py are. Raises UserError."""
    try:
        pairs, summary = make_pairs(read_rows(Path(config.data)), block_size, cut=config.cut)
    except OSError as error:
        raise UserError(f"cannot read --data {config.data} ({error}): make it with rlhf_data/"
                        "hh_rlhf_downloader.py or pydocs_pairs.py") from None
    if len(pairs) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; expected at least 2: give other rows, "
                        "or a model with a longer context")
    keys = [(pair.instruction, pair.input, decode(pair.chosen[:-1])) for pair in pairs]
    trained, held_out, split = split_rows(keys, config.val_fraction)
    return pairs, trained, by_length(held_out, pairs), f"{summary}; {split}"


def by_length(indices: Sequence[int], pairs: Sequence[Pair]) -> list[int]:
    """Indices of pairs, sorted so that micro-batches need little padding."""
    return sorted(indices, key=lambda i: pairs[i].num_tokens)


def collate_pairs(pairs: Sequence[Pair], block_size: int,
                  device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs -> inputs and targets (2 R, T): chosen and rejected in turn. Without a pair, a row
    without targets, because every rank takes part in every step."""
    rows = [pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected)]
    ids, masks = pad_batch(rows or [[0]], block_size, device)  # (2 R, T)
    starts = torch.tensor([len(pair.prompt) for pair in pairs for _ in range(2)] or [1])
    return ids, response_targets(ids, starts.to(device), masks.sum(1))


@torch.no_grad()
def score_pairs(model: GPT, pairs: Sequence[Pair], batches: Sequence[Sequence[int]], run: Run,
                ) -> torch.Tensor | None:
    """The log-probabilities (N, 2) of the chosen and the rejected response of each of N pairs,
    float32 on the CPU of every rank; 0 for those not in `batches` of indices. The ranks share the
    work, in the micro-batches of training. None, on all ranks, if one was asked to stop. Raises
    UserError naming a pair whose log-probability is not finite."""
    launch, logprobs = run.launch, torch.zeros(len(pairs), 2)
    stopped = run.stop.requested()
    bar = progress_bar(len(batches), 0, "reference", unit="batch", over=batches,
                       enabled=launch.is_master and len(batches) > 1)
    with torch.compiler.set_stance("force_eager"):
        for indices in (indices for batch in bar for indices in
                        rank_share(batch, run.micro_batch_size, launch.rank, launch.world_size)):
            if stopped := stopped or run.stop.requested():
                break
            inputs, targets = collate_pairs([pairs[i] for i in indices], model.config.block_size,
                                            launch.device)
            with autocast(launch.device, run.dtype):
                _, losses = model(inputs, targets, reduction="none", return_logits=False)
            if indices:
                logprobs[indices] = -losses.sum(1).view(-1, 2).cpu()
    if launch.sum(torch.tensor(float(stopped))).item():
        return None
    logprobs = launch.sum(logprobs).cpu()  # each pair was scored by one rank
    for pair, row in zip(pairs, logprobs.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            raise UserError(f"{pair.place}: its responses have log-probabilities {row}: leave that "
                            "row out, or use --dtype float32")
    return logprobs


def reference_logprobs(reference: GPT, pairs: Sequence[Pair], batches: Sequence[Sequence[int]],
                       run: Run) -> torch.Tensor | None:
    """`score_pairs` of the reference, from OUT_DIR/reference.safetensors if that file holds them
    for the same weights, pairs and precision; else they are computed and stored there."""
    reference.bf16_residual = run.model.bf16_residual
    facts = [run.metadata["reference_sha256"], run.dtype, reference.bf16_residual,
             *((pair.prompt, pair.chosen, pair.rejected) for pair in pairs)]
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    path, logprobs = run.out_dir / CACHE, None
    if run.launch.is_master and path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                if file.metadata() == {"key": key}:
                    logprobs = file.get_tensor("logprobs")
        except SafetensorError as error:
            print(f"{path} is damaged ({first_line(error)}): computing it again", flush=True)
    logprobs = run.launch.broadcast(logprobs)
    if logprobs is None:
        logprobs = score_pairs(reference, pairs, batches, run)
        if run.launch.is_master and logprobs is not None:
            with atomic_write(path) as file:
                file.write(save({"logprobs": logprobs}, {"key": key}))
    return logprobs


def figure_sums(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, pairs: Sequence[Pair],
                config: DPOConfig) -> torch.Tensor:
    """The sums of FIGURES over R pairs (5,), from log-probabilities (R, 2). The first is the loss,
    with its gradient."""
    lengths = None
    if config.length_normalized:
        lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
        lengths = lengths.view(-1, 2).to(logprobs.device)  # (R, 2)
    losses, margins = dpo_loss(logprobs, ref_logprobs, config.beta, config.label_smoothing, lengths)
    changes = logprobs - ref_logprobs  # (R, 2)
    return torch.stack([losses.sum(), *torch.stack(
        [accuracy(margins), margins, *changes.unbind(1)]).detach().sum(1)])


def held_out_means(policy: GPT, pairs: Sequence[Pair], held_out: Sequence[int],
                   ref_logprobs: torch.Tensor, run: Run) -> dict[str, float | None]:
    """The means of FIGURES over the held-out pairs; a loss of None after a signal."""
    logprobs = score_pairs(policy, pairs, [held_out], run)
    if logprobs is None:
        return {"loss": None}
    sums = figure_sums(logprobs[held_out].double(), ref_logprobs[held_out].double(),
                       [pairs[i] for i in held_out], run.config)
    return dict(zip(FIGURES, (sums / len(held_out)).tolist(), strict=True))


def train(config: DPOConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Trains for the given epochs, or until a signal; returns the final policy."""
    device = launch.device

    # 1. The reference, the pairs, and the checkpoint to resume from
    if (Path(config.out_dir) / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {config.out_dir} is itself a checkpoint: choose another")
    reference = load_model(config.checkpoint, device)
    check_vocabulary(reference, config.checkpoint)
    block_size = reference.config.block_size
    pairs, trained, held_out, summary = read_pairs(config, block_size)
    run = Run(config, launch, stop, label="DPO", graph="dpo_loss.png", fixed=FIXED_ON_RESUME,
              loss_name="DPO loss, nats per pair", data={"sha256": sha256_of(Path(config.data))},
              prompt_template=PROMPT_TEMPLATE, reference_sha256=weights_sha256(reference))
    raw_model = load_model(run.checkpoint, device) if run.is_resumed else reference

    # 2. The number of steps, and the optimizer
    num_pairs = min(config.batch_size, len(trained))  # of a step
    steps_per_epoch = -(-len(trained) // num_pairs)  # ceiling division
    max_steps = config.epochs * steps_per_epoch
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    B = min(config.micro_batch_size, -(-num_pairs // launch.world_size))
    model = run.prepare(raw_model, optimizer, max_steps, max_steps_flag="--epochs",
                        milestones=range(steps_per_epoch, max_steps, steps_per_epoch),
                        micro_batch_sizes=[B], sequence_length=block_size)
    launch.print0(f"{summary}\n{run.summary}; {max_steps:,} steps of {num_pairs} pairs, {B} per "
                  "micro-step")

    def step_pairs(step: int) -> list[int]:  # of all ranks
        return by_length([trained[i] for i in step_rows(len(trained), step, num_pairs,
                                                        config.seed)], pairs)

    with run:
        # 3. The reference, once. It sees the batches of the first epoch and of validation, so that
        # a CPU gives the policy of step 0 the same log-probabilities, bit for bit
        run.pause_clock()
        batches = [step_pairs(step) for step in range(steps_per_epoch)]
        ref_logprobs = reference_logprobs(reference, pairs, [*batches, held_out], run)  # (N, 2)
        run.stopping = ref_logprobs is None  # a signal came
        del reference  # of a resumed run, it is not needed any more

        # 4. The loop
        while True:
            if run.eval_due():
                run.log_validation(**held_out_means(raw_model, pairs, held_out, ref_logprobs, run))
            if run.save_or_finish():
                break

            lr = cosine_lr(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                           max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = step_pairs(run.step)
            micro_batches = rank_share(batch, B, launch.rank, launch.world_size)
            sums = torch.zeros(len(FIGURES), device=device)
            for micro_step, indices in enumerate(micro_batches):
                rows = [pairs[i] for i in indices]
                inputs, targets = collate_pairs(rows, block_size, device)  # (2 R, T)
                with run.gradient_sync(micro_step == len(micro_batches) - 1):
                    with autocast(device, run.dtype):
                        _, losses = model(inputs, targets, reduction="none", return_logits=False)
                    logprobs = -losses.sum(1)[: 2 * len(rows)].view(-1, 2)  # (R, 2)
                    # Means over the pairs of the global batch, not means of means
                    figures = figure_sums(logprobs, ref_logprobs[indices].to(device), rows,
                                          config) / len(batch)
                    run.scaler.scale(figures[0] * launch.world_size).backward()
                sums += figures.detach()
            tokens = sum(2 * len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected)
                         for i in batch)
            run.finish_step(sums[0] * launch.world_size, lr=lr, tokens=tokens,
                            sequence_length=tokens // (2 * len(batch)),
                            sums=dict(zip(FIGURES[1:], sums[1:], strict=True)))
    return raw_model.eval()


def main() -> None:
    config = parse_config(DPOConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
