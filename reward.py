"""Trains a reward model on preference pairs, from a fine-tuned checkpoint (docs/alignment.md).

    python reward.py --checkpoint out/finetune --data rlhf_data/pydocs_pairs.json
    torchrun --standalone --nproc-per-node=8 reward.py \\
        --data rlhf_data/hh_helpful_base_train.jsonl --val-data rlhf_data/hh_helpful_base_test.jsonl

The model is GPT-2 with a linear head, read at the last token of prompt and response. At the end,
scores are rescaled to mean 0 and deviation 1 on responses that the checkpoint itself samples to
training prompts, and OUT_DIR/reward.json compares the accuracy on held-out pairs with simple rules.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dataloader import load_pairs, permutation, row_batches, split_pairs
from image.plot_report import draw_calibration
from inference import load_gpt2, sample_responses
from minigpt2.advantages import accuracy, preference_loss
from minigpt2.checkpoint import load_model, shared_template, weights_sha256
from minigpt2.config import ROOT, UserError, flag
from minigpt2.distributed import Launch, autocast
from minigpt2.faults import StopRequest
from minigpt2.files import sha256_of, write_json
from minigpt2.kernels import can_pack, prepare_to_sample
from minigpt2.optimizer import set_lr
from minigpt2.preferences import Pair, rank_share, sequences
from minigpt2.rewards import RewardModel, pad_batch, score_rows
from minigpt2.run import Run, TuningConfig, run_training
from rlhf_data.baselines import accuracy_interval, print_accuracies, rule_margins

REPORT, CALIBRATION = "reward.json", "calibration.png"  # in OUT_DIR
MIN_SAMPLES, MIN_DEVIATION = 16, 1e-3  # of scores that can be normalized; equal samples have 0


@dataclass(frozen=True)
class RewardConfig(TuningConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "fine-tuned model to start from, and to "
                           "normalize on: folder, OUT_DIR of a run, or hub name", is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    val_data: str | None = flag(None, "held-out pairs (default: a part of --data)", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "reward"), "checkpoints and logs", is_path=True)
    val_start: float = flag(0.0, "hold out the rows with a hash from here to here + "
                                 "--val-fraction: a fold of a cross-validation", minimum=0, below=1)
    epochs: int = flag(1, "passes over the training pairs; a second one overfits", minimum=1)
    dropout: float = flag(0.0, "probability of dropout in training", minimum=0, below=1)
    normalize_samples: int = flag(256, "responses sampled to normalize scores; 0: none", minimum=0)
    max_tokens: int = flag(128, "longest response, in tokens", minimum=1, old="max_response")


# A resumed run may change neither the pairs of a step nor what is held out
FIXED_ON_RESUME = ("columns", "batch_size", "epochs", "val_fraction", "val_start", "seed",
                   "data_sha256", "reference_sha256")


def read_splits(config: RewardConfig, block_size: int, template: str) -> tuple[list, list, str]:
    """(training pairs, held-out pairs, summary). Raises UserError."""
    pairs, summary = load_pairs(config.data, "--data", block_size, template, config.columns)
    if config.val_data is None:
        trained, held_out, split = split_pairs(pairs, config.val_fraction, config.val_start)
        return trained, held_out, f"{summary}; {split}"
    held_out, more = load_pairs(config.val_data, "--val-data", block_size, template, config.columns)
    prompts = {tuple(pair.prompt) for pair in pairs}
    seen = sum(tuple(pair.prompt) in prompts for pair in held_out)
    return pairs, held_out, (f"{summary} to train on; {more} held out, {seen:,} with a "
                             "training prompt; --val-fraction and --val-start are not used")


def pair_margins(model: RewardModel, pairs: list[Pair], run: Run) -> torch.Tensor | None:
    """The margins (R,) float64 of R pairs: score of the chosen minus score of the rejected. None
    after a signal. Raises UserError naming a pair whose score is not finite."""
    scores = score_rows(model, sequences(pairs), [pair.place for pair in pairs for _ in range(2)],
                        run.launch, run.dtype, 2 * run.micro_batch_size, run.stop.requested)
    return None if scores is None else scores[::2] - scores[1::2]


def train(config: RewardConfig, launch: Launch, stop: StopRequest | None = None) -> RewardModel:
    """Trains for the given epochs, or until a signal; returns the final, normalized model."""
    # 1. The model, the pairs, and the checkpoint to resume from
    base = load_gpt2(config.checkpoint, launch.device, config.dropout)
    block_size, template = base.config.block_size, shared_template(config.checkpoint)
    train_pairs, val_pairs, summary = read_splits(config, block_size, template)
    run = Run(config, launch, stop, label="reward model", graph="reward_loss.png",
              data={"sha256": [sha256_of(Path(file)) for file in (config.data, config.val_data)
                               if file]}, loss_name="-log sigmoid(margin), nats per pair",
              fixed=FIXED_ON_RESUME, prompt_template=template, model_class=RewardModel,
              reference_sha256=weights_sha256(base))
    is_normalized = run.is_resumed and "normalized" in run.saved["facts"]
    raw_model = (load_model(run.checkpoint, launch.device, RewardModel, config.dropout)
                 if run.is_resumed else RewardModel.from_language_model(base, config.seed))
    del base  # a new run trains its tensors

    # 2. The number of steps, the optimizer, and the micro-batch
    model = run.prepare_epochs(raw_model, len(train_pairs), block_size)
    launch.print0(f"{summary}\n{run.summary}")
    batches = row_batches(train_pairs, lambda pair: pair.num_tokens, run.batch_size, config.seed,
                          run.step)
    recent = deque(maxlen=2)  # batches: on a GPU, the host reads a loss one step late

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                margins = pair_margins(raw_model, val_pairs, run)
                loss, right = (None, None) if margins is None else (  # None: a signal came
                    figure(margins).mean().item() for figure in (preference_loss, accuracy))
                run.log_validation(loss, accuracy=right)
            if run.save_or_finish():
                break

            lr = config.lr_at(run.step, run.max_steps)
            set_lr(run.optimizer, lr)
            recent.append(batch := next(batches))  # of all ranks
            micro_batches = rank_share(batch, run.micro_batch_size, launch.rank, launch.world_size)
            sums = torch.zeros(3, device=launch.device)  # of loss, accuracy and margin
            for pairs in run.micro_steps(micro_batches):
                # A rank without pairs takes part in the step with two rows that count for nothing
                ids, masks = pad_batch(sequences(pairs) or [[0], [0]], block_size, launch.device)
                with autocast(launch.device, run.dtype):
                    scores = model(ids, masks)  # (2B,)
                margins = (scores[::2] - scores[1::2])[: len(pairs)]  # (B,)
                figures = torch.stack([preference_loss(margins), accuracy(margins), margins])
                # Means over the pairs of the global batch, not means of means
                figures = figures.sum(1) / len(batch)  # (3,)
                run.scaler.scale(figures[0] * launch.world_size).backward()
                sums += figures.detach()
            tokens = sum(map(len, sequences(batch)))
            run.finish_step(sums[0] * launch.world_size, lr=lr, tokens=tokens,
                            sequence_length=tokens // (2 * len(batch)),
                            sums={"accuracy": sums[1], "margin": sums[2]})
            if run.state.skipped:  # raises UserError if the score of a pair is not finite
                pair_margins(raw_model, [pair for batch in recent for pair in batch], run)
        if not (run.stopping or is_normalized):
            finish(config, run, raw_model, train_pairs, val_pairs)
    return raw_model.eval()


def finish(config: RewardConfig, run: Run, model: RewardModel, train_pairs: list[Pair],
           val_pairs: list[Pair]) -> None:
    """Writes the report, then normalizes the scores and saves again; after a kill, both again."""
    run.begin("sampling and scoring for the report")
    swapped = swap_prompts(val_pairs, model.config.block_size)
    scores = sampled_scores(config, model, train_pairs, run)
    margins = None if scores is None else pair_margins(model, [*val_pairs, *swapped], run)
    if margins is None:  # a signal came
        run.stopping = True
        return
    mean, deviation = (0.0, 0.0) if len(scores) < MIN_SAMPLES else (
        scores.mean().item(), scores.std(correction=0).item())
    if run.launch.is_master:
        margins, swapped_margins = margins.split([len(val_pairs), len(swapped)])  # (n,), (n',)
        rules, (error, bins) = rule_margins(val_pairs, train_pairs), calibration(margins)
        rows = {"reward model": margins, "chosen is the shorter": margins[rules["shorter"] > 0],
                "against another prompt's": swapped_margins, **rules}
        report = {"loss": run.state.val_loss, "samples": len(scores), "mean": mean,
                  "deviation": deviation, "calibration_error": error, "calibration": bins,
                  "accuracy": {name: accuracy_interval(row)
                               for name, row in rows.items() if len(row)}}
        draw_calibration(report["calibration"], run.out_dir / CALIBRATION)
        write_json(run.out_dir / REPORT, report)
        print_accuracies(report["accuracy"])
        print("loss {loss:.4f}, expected calibration error {calibration_error:.4f}; {samples} "
              "sampled responses: mean score {mean:.4f}, deviation {deviation:.4f}"
              .format(**report))
    if deviation < MIN_DEVIATION:
        if config.normalize_samples:
            run.launch.print0(f"scores are not normalized: {len(scores)} samples ended within "
                              f"--max-tokens {config.max_tokens} tokens, expected at least "
                              f"{MIN_SAMPLES} of {config.normalize_samples}, of different scores")
        return
    model.rescale(mean, deviation)
    run.metadata["normalized"] = True
    run.writer.saved_step = None  # saves this step again
    run.save_or_finish()


def sampled_scores(config: RewardConfig, model: RewardModel, pairs: list[Pair],
                   run: Run) -> torch.Tensor | None:
    """The scores (S,) of responses of the first checkpoint to training prompts that end by
    <|endoftext|>: without it, a score means nothing. None after a signal."""
    order = permutation(len(pairs), config.seed)[: config.normalize_samples]
    prompts = [pairs[i].prompt for i in order]
    seeds = np.random.SeedSequence(config.seed).generate_state(len(prompts), np.uint64).tolist()
    base = load_gpt2(config.checkpoint, run.launch.device)
    if weights_sha256(base) != run.metadata["reference_sha256"]:
        raise UserError(f"--checkpoint {config.checkpoint} has changed since the start of the run, "
                        "and scores are normalized on its samples: restore it, then --resume")
    in_float32 = run.launch.device.type == "cpu" and not can_pack(run.dtype)
    responses = sample_responses(
        prepare_to_sample(base, torch.float32 if in_float32 else run.dtype), prompts, seeds,
        config.max_tokens, run.launch, should_stop=run.stop.requested)
    if responses is None:
        return None
    rows = [one.prompt + one.tokens for one in responses if one.stopped]
    return score_rows(model, rows, ["a sampled response"] * len(rows), run.launch, run.dtype,
                      2 * run.micro_batch_size, run.stop.requested)


def swap_prompts(pairs: list[Pair], block_size: int) -> list[Pair]:
    """Pairs whose rejected response is the chosen one of another prompt: does a model read it?"""
    others = [pairs[i] for i in permutation(len(pairs), 0)]
    swapped = [replace(pair, rejected=other.chosen) for pair, other in
               zip(others, others[1:] + others[:1], strict=True) if pair.prompt != other.prompt]
    return [p for p in swapped if p.num_tokens <= block_size and p.chosen != p.rejected]


def calibration(margins: torch.Tensor, bins: int = 10) -> tuple[float, list[dict]]:
    """(expected calibration error, its bins) of margins (n,): the confidence sigmoid(|margin|), in
    bins of equal width, is compared with the accuracy (Guo et al. 2017)."""
    confidence = margins.abs().sigmoid()
    places = ((2 * confidence - 1) * bins).long().clamp(max=bins - 1)  # 0 to bins - 1
    rows = [accuracy_interval(margins[places == i])
            | {"confidence": confidence[places == i].mean().item()} for i in places.unique()]
    error = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return error / len(margins), rows


if __name__ == "__main__":
    run_training(RewardConfig, train, __doc__)
