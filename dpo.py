"""Direct preference optimization (Rafailov et al. 2023) of a fine-tuned checkpoint: it learns from
pairs of responses, one chosen and one rejected, without a reward model.

    python dpo.py --checkpoint out/finetune --data pairs.jsonl
    torchrun --standalone --nproc-per-node=8 dpo.py --checkpoint out/finetune --data pairs.jsonl

The checkpoint is the policy at the start, and the reference throughout. The loss of a pair is
-log sigmoid(beta * [(chosen - reference's) - (rejected - reference's)]), of log-probabilities of
whole responses (docs/alignment.md). Those of the reference are kept in OUT_DIR/reference.json.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from dataloader import load_pairs, row_batches, split_pairs
from inference import load_gpt2
from minigpt2.advantages import accuracy, dpo_loss
from minigpt2.checkpoint import shared_template, weights_sha256
from minigpt2.config import ROOT, UserError, flag
from minigpt2.distributed import Launch, autocast, share_rows, to_device
from minigpt2.faults import StopRequest
from minigpt2.files import sha256_of, write_json
from minigpt2.optimizer import set_lr
from minigpt2.preferences import Pair, rank_share, sequences
from minigpt2.rewards import response_batch
from minigpt2.run import Run, TuningConfig, run_training
from model import GPT

CACHE = "reference.json"  # in OUT_DIR
FIGURES = ("loss", "accuracy", "margin", "logp_chosen_change", "logp_rejected_change")


@dataclass(frozen=True)
class DPOConfig(TuningConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "fine-tuned model to start from, and "
                           "reference: folder, OUT_DIR of a run, or hub name", is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "dpo"), "checkpoints and logs", is_path=True)
    beta: float = flag(0.1, "weight of the divergence from the reference", minimum=0)
    label_smoothing: float = flag(0.0, "probability that a label is wrong", minimum=0, below=0.5)
    length_normalized: bool = flag(False, "means over tokens, for a larger beta, about 5")
    max_lr: float = flag(1e-6, "learning rate after the warm-up", minimum=0)


# A resumed run may change neither the loss nor which pairs a step sees
FIXED_ON_RESUME = ("beta", "label_smoothing", "length_normalized", "batch_size", "epochs",
                   "val_fraction", "columns", "seed", "data_sha256", "reference_sha256")


def collate_pairs(pairs: list[Pair], block_size: int,
                  device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs -> inputs and targets (2 R, T): chosen and rejected in turn."""
    return response_batch([(pair.prompt, response) for pair in pairs
                           for response in (pair.chosen, pair.rejected)], block_size, device)


def pair_logprobs(model: GPT, batches: list[list[Pair]], run: Run) -> dict[str, list[float]] | None:
    """The log-probabilities of both responses of every pair, by its place, on every rank, in the
    micro-batches of training; for None see `share_rows`. Raises UserError if one is not finite."""
    def work(parts: list[list[Pair]]) -> list[list[list[float]]]:
        inputs, targets = collate_pairs(parts[0], model.config.block_size, run.launch.device)
        with autocast(run.launch.device, run.dtype):
            _, losses = model(inputs, targets, reduction="none", return_logits=False)
        return [(-losses.sum(1).view(-1, 2)).tolist()]  # (R, 2)

    parts = [part for batch in batches for part in rank_share(batch, run.micro_batch_size, 0, 1)]
    rows = share_rows(parts, work, run.launch, batch_size=1, should_stop=run.stop.requested,
                      label="reference" if len(batches) > 1 else "")
    if rows is None:
        return None
    found = {pair.place: both for part, logprobs in zip(parts, rows, strict=True)
             for pair, both in zip(part, logprobs, strict=True)}
    for place, both in found.items():
        if not all(map(math.isfinite, both)):
            raise UserError(f"{place}: its responses have the log-probabilities {both}: leave that "
                            "row out, or use --dtype float32")
    return found


def reference_logprobs(reference: GPT, batches: list[list[Pair]], run: Run,
                       ) -> dict[str, list[float]] | None:
    """`pair_logprobs` of the reference, from OUT_DIR/reference.json if that file holds them for the
    same weights, batches and precision; else they are computed and stored there."""
    facts = ["logits in float32", run.metadata["reference_sha256"], run.dtype, batches]
    key, path = hashlib.sha256(repr(facts).encode()).hexdigest(), run.out_dir / CACHE
    saved = {}
    if run.launch.is_master and path.exists():
        try:
            saved = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            print(f"{path} is damaged ({error}): computing it again")
    found = run.launch.gather(saved["logprobs"] if saved.get("key") == key else None)[0]
    if found is None:
        found = pair_logprobs(reference, batches, run)
        if run.launch.is_master and found is not None:
            write_json(path, {"key": key, "logprobs": found})
    return found


def figure_sums(logprobs: torch.Tensor, pairs: list[Pair], ref: dict[str, list[float]],
                config: DPOConfig) -> torch.Tensor:
    """The sums of FIGURES over R pairs (5,), from the policy's log-probabilities (R, 2) and the
    reference's by place. The first is the loss, with its gradient."""
    lengths = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    ref_logprobs = torch.tensor([ref[pair.place] for pair in pairs], dtype=logprobs.dtype)
    lengths, ref_logprobs = (to_device(x.view(-1, 2), logprobs.device)
                             for x in (lengths, ref_logprobs))  # (R, 2)
    losses, margins = dpo_loss(logprobs, ref_logprobs, config.beta, config.label_smoothing,
                               lengths if config.length_normalized else None)
    changes = logprobs - ref_logprobs  # (R, 2)
    return torch.stack([losses.sum(), *torch.stack(
        [accuracy(margins), margins, *changes.unbind(1)]).detach().sum(1)])


def held_out_means(policy: GPT, pairs: list[Pair], ref: dict[str, list[float]],
                   run: Run) -> dict[str, float | None]:
    """The means of FIGURES over held-out pairs; a loss of None after a signal."""
    found = pair_logprobs(policy, [pairs], run)
    if found is None:
        return {"loss": None}
    logprobs = torch.tensor([found[pair.place] for pair in pairs], dtype=torch.float64)  # (R, 2)
    sums = figure_sums(logprobs, pairs, ref, run.config)
    return dict(zip(FIGURES, (sums / len(pairs)).tolist(), strict=True))


def train(config: DPOConfig, launch: Launch, stop: StopRequest | None = None) -> GPT:
    """Trains for the given epochs, or until a signal; returns the final policy."""
    # 1. The reference, the pairs, and the checkpoint to resume from
    reference = load_gpt2(config.checkpoint, launch.device)
    block_size, template = reference.config.block_size, shared_template(config.checkpoint)
    pairs, summary = load_pairs(config.data, "--data", block_size, template, config.columns)
    train_pairs, val_pairs, split_summary = split_pairs(pairs, config.val_fraction)
    run = Run(config, launch, stop, label="DPO", graph="dpo_loss.png", fixed=FIXED_ON_RESUME,
              loss_name="DPO loss, nats per pair", data={"sha256": sha256_of(Path(config.data))},
              prompt_template=template, reference_sha256=weights_sha256(reference))
    raw_model = load_gpt2(run.checkpoint, launch.device) if run.is_resumed else reference

    # 2. The number of steps, the optimizer, and the micro-batch
    model = run.prepare_epochs(raw_model, len(train_pairs), block_size)
    launch.print0(f"{summary}; {split_summary}\n{run.summary}")
    epoch, batches = (row_batches(train_pairs, lambda pair: pair.num_tokens, run.batch_size,
                                  config.seed, step) for step in (0, run.step))

    with run:
        # 3. The reference, once. It sees the batches of the first epoch and of validation: a CPU
        # then gives the policy of step 0 the same log-probabilities, bit for bit
        run.begin("reference")
        ref = reference_logprobs(reference, [*islice(epoch, run.steps_per_epoch), val_pairs], run)
        run.stopping = ref is None  # a signal came
        del reference  # of a resumed run, it is not needed any more

        # 4. The loop
        while True:
            if run.eval_due():
                run.log_validation(**held_out_means(raw_model, val_pairs, ref, run))
            if run.save_or_finish():
                break

            lr = config.lr_at(run.step, run.max_steps)
            set_lr(run.optimizer, lr)
            batch = next(batches)  # of all ranks
            micro_batches = rank_share(batch, run.micro_batch_size, launch.rank, launch.world_size)
            sums = torch.zeros(len(FIGURES), device=launch.device)
            for mine in run.micro_steps(micro_batches):
                inputs, targets = collate_pairs(mine, block_size, launch.device)  # (2 R, T)
                with autocast(launch.device, run.dtype):
                    _, losses = model(inputs, targets, reduction="none", return_logits=False)
                logprobs = -losses.sum(1)[: 2 * len(mine)].view(-1, 2)  # (R, 2)
                # Means over the pairs of the global batch, not means of means
                figures = figure_sums(logprobs, mine, ref, config) / len(batch)
                run.scaler.scale(figures[0] * launch.world_size).backward()
                sums += figures.detach()
            tokens = sum(map(len, sequences(batch)))
            run.finish_step(sums[0] * launch.world_size, lr=lr, tokens=tokens,
                            sequence_length=tokens // (2 * len(batch)),
                            sums=dict(zip(FIGURES[1:], sums[1:], strict=True)))
    return raw_model.eval()


if __name__ == "__main__":
    run_training(DPOConfig, train, __doc__)
