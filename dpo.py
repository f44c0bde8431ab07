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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dataloader import PAD_TOKEN, read_rows, split_rows, step_rows
from inference import check_vocabulary
from minigpt2.advantages import dpo_loss, response_mask, response_targets, wins
from minigpt2.checkpoint import CONFIG_FILE, load_model
from minigpt2.config import UserError, first_line, flag, parse_config, run_main
from minigpt2.distributed import Launch, autocast, to_device
from minigpt2.faults import StopRequest, launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.optimizer import cosine_lr, make_optimizer, set_lr
from minigpt2.preferences import Pair, make_pairs, rank_share
from minigpt2.progress import progress_bar
from minigpt2.run import Run, RunConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, decode
from model import GPT

ROOT = Path(__file__).resolve().parent
CACHE_FILE = "reference.safetensors"
FIGURES = ("loss", "accuracy", "margin", "logp_chosen_change", "logp_rejected_change")


@dataclass(frozen=True)
class DPOConfig(RunConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "folder, OUT_DIR of a run, or hub name "
                           "to start from, and the reference", is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "hh_rlhf.jsonl"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "dpo"), "folder of checkpoints and logs", is_path=True)
    beta: float = flag(0.1, "weight of the divergence from the reference", minimum=0)
    label_smoothing: float = flag(0.0, "probability that a label is wrong", minimum=0, below=0.5)
    length_normalized: bool = flag(False, "means over the tokens of a response, not sums; "
                                          "--beta must be larger, about 5")
    epochs: int = flag(1, "passes over the training pairs", minimum=1)
    batch_size: int = flag(64, "pairs per step, over all ranks", minimum=1)
    micro_batch_size: int | Literal["auto"] = flag(
        8, "pairs per rank and micro-step; auto: as many as fit", minimum=1)
    max_lr: float = flag(1e-6, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", minimum=0)
    warmup_fraction: float = flag(0.1, "linear warm-up, as a fraction of all steps",
                                  minimum=0, below=1)
    weight_decay: float = flag(0.0, "weight decay of matrices and embeddings", minimum=0)
    val_fraction: float = flag(0.05, "fraction of rows held out for validation, at least one",
                               minimum=0, below=1)
    eval_interval: int = flag(100, "steps between validations", minimum=1)
    save_interval: int = flag(200, "steps between checkpoints, in addition to one per epoch",
                              minimum=1)
    keep_last: int = flag(3, "newest checkpoints to keep, plus the one with the lowest "
                             "validation loss; 0: all", minimum=0)
    compile: bool | None = flag(False, "torch.compile the training step")


# A resumed run may change neither the loss nor which pairs a step sees
FIXED_ON_RESUME = ("beta", "label_smoothing", "length_normalized", "batch_size", "epochs",
                   "val_fraction", "seed", "data_sha256", "reference_sha256")


@dataclass
class PairData:
    pairs: list[Pair]
    trained: list[int]  # indices of pairs
    held_out: list[int]  # by length
    summary: str


def read_pairs(config: DPOConfig, block_size: int) -> PairData:
    """The usable pairs of --data, split as finetune.py splits its rows. Raises UserError."""
    try:
        pairs, summary = make_pairs(read_rows(Path(config.data)), block_size)
    except OSError as error:
        raise UserError(f"cannot read --data {config.data} ({error}): see docs/alignment.md for "
                        "what it should hold") from None
    if len(pairs) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; expected at least 2: give other rows, "
                        "or a model with a longer context")
    trained, held_out, split_summary = split_rows(
        [(pair.instruction, pair.input, decode(pair.chosen[:-1])) for pair in pairs],
        config.val_fraction)
    return PairData(pairs, trained, by_length(held_out, pairs), f"{summary}; {split_summary}")


def by_length(indices: Sequence[int], pairs: Sequence[Pair]) -> list[int]:
    """So that micro-batches need little padding."""
    return sorted(indices, key=lambda i: pairs[i].num_tokens)


def step_batch(data: PairData, step: int, num_pairs: int, seed: int) -> list[int]:
    """The indices of the pairs of one step, over all ranks."""
    rows = step_rows(len(data.trained), step, num_pairs, seed)
    return by_length([data.trained[i] for i in rows], data.pairs)


def padded_pair_length(pairs: Sequence[Pair], block_size: int, device: torch.device) -> int:
    """The T of a micro-batch: its longest sequence, rounded up to few different values."""
    T = max((pair.num_tokens for pair in pairs), default=2) - 1  # the last token is only a target
    return min(T + -T % (16 if device.type == "cpu" else 64), block_size)


def collate_pairs(pairs: Sequence[Pair], B: int, T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs -> inputs and targets, both (2 B, T) int64: chosen and rejected in turn, right-padded.
    Only response tokens are targets. Fewer than B pairs are completed with rows of padding."""
    ids = torch.full((2 * B, T + 1), PAD_TOKEN)
    starts, ends = torch.zeros(2, 2 * B, dtype=torch.int64)  # (2 B,) each
    rows = [(pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected)]
    for i, (prompt, response) in enumerate(rows):
        starts[i], ends[i] = len(prompt), len(prompt) + len(response)
        ids[i, : ends[i]] = torch.tensor(prompt + response)
    return ids[:, :-1], response_targets(ids, response_mask(starts, ends, T + 1))


def micro_batches_of(batch: Sequence[int], pairs: Sequence[Pair], B: int, block_size: int,
                     launch: Launch) -> list[tuple[Sequence[int], torch.Tensor, torch.Tensor]]:
    """This rank's micro-batches of a batch of indices: (indices, inputs, targets), equally many on
    every rank, the last one perhaps without a pair."""
    found = []
    for mine in rank_share(batch, B, launch.rank, launch.world_size):
        chunk = [pairs[i] for i in mine]
        T = padded_pair_length(chunk, block_size, launch.device)
        found.append((mine, *collate_pairs(chunk, B, T)))
    return found


def micro_batch_sizes(config: DPOConfig, num_pairs: int, launch: Launch) -> list[int]:
    """The micro-batches to choose from, in sequences, largest first. None exceeds a rank's share of
    the pairs of a step, which would leave other ranks without pairs."""
    share = -(-num_pairs // launch.world_size)
    if config.micro_batch_size == "auto":
        return [2 * (share >> n) for n in range(share.bit_length())]
    return [2 * min(config.micro_batch_size, share)]


@torch.no_grad()
def score_pairs(model: GPT, pairs: Sequence[Pair], batches: Sequence[Sequence[int]], B: int,
                launch: Launch, dtype: torch.dtype, should_stop: Callable[[], bool],
                ) -> torch.Tensor | None:
    """The log-probabilities (N, 2) of chosen and rejected response of every pair, float32 on the
    CPU of every rank; 0 for pairs that are not in `batches` of indices. The ranks share the work,
    in the micro-batches of training. None, on all ranks, once should_stop() is true on any rank.
    Raises UserError naming a pair whose log-probability is not finite."""
    logprobs, stopped = torch.zeros(len(pairs), 2), should_stop()
    bar = progress_bar(len(batches), 0, "reference", unit="batch", over=batches,
                       enabled=launch.is_master and len(batches) > 1)
    with torch.compiler.set_stance("force_eager"):
        for mine, inputs, targets in (micro_batch for batch in bar for micro_batch in
                                      micro_batches_of(batch, pairs, B, model.config.block_size,
                                                       launch)):
            if stopped := stopped or should_stop():
                break
            inputs, targets = to_device(inputs, launch.device), to_device(targets, launch.device)
            with autocast(launch.device, dtype):
                _, losses = model(inputs, targets, reduction="none", return_logits=False)
            logprobs[mine] = -losses.sum(1).view(-1, 2)[: len(mine)].cpu()
    if launch.sum(torch.tensor(float(stopped))).item():
        return None
    logprobs = launch.sum(logprobs).cpu()  # every pair was scored by one rank
    for pair, row in zip(pairs, logprobs.tolist(), strict=True):
        if not all(map(math.isfinite, row)):
            raise UserError(f"{pair.place}: its responses have the log-probabilities {row}: use "
                            "--dtype float32, or leave that row out")
    return logprobs


def cached(path: Path, key: str, launch: Launch,
           compute: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
    """The tensor that a file holds under this key. If the file has another key, is damaged or does
    not exist, the tensor is computed, and stored if it is not None."""
    tensor = None
    if launch.is_master and path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor("logprobs") if file.metadata() == {"key": key} else None
        except SafetensorError as error:
            print(f"{path} is damaged ({first_line(error)}): computed again", flush=True)
    tensor = launch.broadcast(tensor)
    if tensor is None:
        tensor = compute()
        if launch.is_master and tensor is not None:
            with atomic_write(path) as file:
                file.write(save({"logprobs": tensor}, {"key": key}))
    return tensor


def weights_sha256(model: GPT) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def reference_logprobs(run: Run, reference: GPT, data: PairData, num_pairs: int,
                       ) -> torch.Tensor | None:
    """`score_pairs` of the reference for all pairs, from OUT_DIR/reference.safetensors if it holds
    those of these weights and pairs in this precision."""
    config, steps = run.config, range(-(-len(data.trained) // num_pairs))
    # The batches of the first epoch and of validation: on a CPU, step 0 has margins of exactly 0
    batches = [step_batch(data, step, num_pairs, config.seed) for step in steps]
    reference.bf16_residual = run.model.bf16_residual
    key = hashlib.sha256(repr([run.metadata["reference_sha256"], run.dtype, run.model.bf16_residual,
                               *data.pairs]).encode()).hexdigest()
    return cached(run.out_dir / CACHE_FILE, key, run.launch, lambda: score_pairs(
        reference, data.pairs, [*batches, data.held_out], run.micro_batch_size // 2, run.launch,
        run.dtype, run.stop.requested))


def figure_sums(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, pairs: Sequence[Pair],
                config: DPOConfig) -> torch.Tensor:
    """The sums of FIGURES over R pairs, (5,), from log-probabilities (R, 2). The first, the loss,
    carries the gradient."""
    lengths = None
    if config.length_normalized:
        lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])  # (R, 2)
        lengths = to_device(lengths.view(-1, 2), logprobs.device)
    losses, margins = dpo_loss(logprobs, ref_logprobs, config.beta, config.label_smoothing, lengths)
    changes = (logprobs - ref_logprobs).sum(0)  # (2,)
    return torch.stack([losses.sum(), *torch.stack([wins(margins).sum(), margins.sum(), *changes]
                                                   ).detach()])


def held_out_means(run: Run, policy: GPT, data: PairData, ref_logprobs: torch.Tensor,
                   ) -> dict[str, float | None]:
    """The means of FIGURES over the held-out pairs; a loss of None after a signal."""
    logprobs = score_pairs(policy, data.pairs, [data.held_out], run.micro_batch_size // 2,
                           run.launch, run.dtype, run.stop.requested)
    if logprobs is None:
        return {"loss": None}
    sums = figure_sums(logprobs[data.held_out].double(), ref_logprobs[data.held_out].double(),
                       [data.pairs[i] for i in data.held_out], run.config)
    return dict(zip(FIGURES, (sums / len(data.held_out)).tolist(), strict=True))


def train(config: DPOConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Trains for the given epochs, or until a signal; returns the final policy."""
    device = launch.device

    # 1. The reference, the pairs, and the checkpoint to resume from
    if (Path(config.out_dir) / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {config.out_dir} is itself a checkpoint: choose another")
    reference = load_model(config.checkpoint, device)
    check_vocabulary(reference, config.checkpoint)
    data = read_pairs(config, reference.config.block_size)
    run = Run(config, launch, stop, label="DPO", graph="dpo_loss.png", fixed=FIXED_ON_RESUME,
              loss_name="DPO loss, nats per pair", data={"sha256": sha256_of(Path(config.data))},
              prompt_template=PROMPT_TEMPLATE, reference_sha256=weights_sha256(reference))
    raw_model = load_model(run.checkpoint, device) if run.is_resumed else reference
    block_size = raw_model.config.block_size
    launch.print0(data.summary)

    # 2. The number of steps, and the optimizer
    num_pairs = min(config.batch_size, len(data.trained))  # of a step
    steps_per_epoch = -(-len(data.trained) // num_pairs)  # ceiling division
    max_steps = config.epochs * steps_per_epoch
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    model = run.prepare(
        raw_model, optimizer, max_steps, max_steps_flag="--epochs",
        milestones=range(steps_per_epoch, max_steps, steps_per_epoch),
        micro_batch_sizes=micro_batch_sizes(config, num_pairs, launch),
        sequence_length=padded_pair_length(data.pairs, block_size, device))
    B = run.micro_batch_size // 2
    launch.print0(f"{run.summary}; {max_steps:,} steps of {num_pairs} pairs")

    with run:
        # 3. The reference's log-probabilities, once
        run.pause_clock()
        ref_logprobs = reference_logprobs(run, reference, data, num_pairs)  # (N, 2)
        run.stopping = ref_logprobs is None  # a signal came
        del reference  # after --resume, nothing else holds it

        # 4. The loop
        while True:
            if run.eval_due():
                run.log_validation(**held_out_means(run, raw_model, data, ref_logprobs))
            if run.save_or_finish():
                break

            lr = cosine_lr(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                           max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = step_batch(data, run.step, num_pairs, config.seed)  # of all ranks
            micro_batches = micro_batches_of(batch, data.pairs, B, block_size, launch)
            sums = torch.zeros(len(FIGURES), device=device)
            for micro_step, (mine, inputs, targets) in enumerate(micro_batches):
                inputs, targets = to_device(inputs, device), to_device(targets, device)  # (2 B, T)
                with run.gradient_sync(micro_step == len(micro_batches) - 1):
                    with autocast(device, run.dtype):
                        _, losses = model(inputs, targets, reduction="none", return_logits=False)
                    logprobs = -losses.sum(1).view(B, 2)[: len(mine)]  # (R, 2)
                    figures = figure_sums(logprobs, to_device(ref_logprobs[mine], device),
                                          [data.pairs[i] for i in mine], config) / len(batch)
                    # The mean over the pairs of the global batch, not a mean of means
                    run.scaler.scale(figures[0] * launch.world_size).backward()
                sums += figures.detach()
            tokens = sum(2 * len(data.pairs[i].prompt) + len(data.pairs[i].chosen)
                         + len(data.pairs[i].rejected) for i in batch)
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
