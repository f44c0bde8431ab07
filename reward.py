"""Training of a reward model on preference pairs, from a fine-tuned checkpoint.

    python reward.py --checkpoint out/finetune --data rlhf_data/pydocs_pairs.json
    torchrun --standalone --nproc-per-node=8 reward.py \\
        --data rlhf_data/hh_helpful_base_train.jsonl --val-data rlhf_data/hh_helpful_base_test.jsonl

The model is GPT-2 with a linear head, read at the last token of prompt and response. The loss is
-log sigmoid(score of the chosen - score of the rejected response), averaged over pairs. At the end,
scores are rescaled to mean 0 and deviation 1 on responses that the checkpoint itself samples to
training prompts, and OUT_DIR/reward.json compares the accuracy on held-out pairs with simple rules.
Checkpoints, logs, signals and --resume are those of finetune.py.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from dataloader import load_pairs, pad_rows, permutation, row_batches, split_pairs
from inference import check_vocabulary, finish_reasons, generate, generated_rows
from minigpt2 import rewards
from minigpt2.advantages import accuracy, preference_loss
from minigpt2.checkpoint import CONFIG_FILE, load_model, weights_sha256
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch, autocast
from minigpt2.faults import StopRequest, launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.graphs import draw_calibration
from minigpt2.kernels import prepare_to_sample
from minigpt2.optimizer import learning_rate, make_optimizer, set_lr
from minigpt2.preferences import Pair, rank_share, sequences
from minigpt2.rewards import RewardModel, pad_batch, score_rows
from minigpt2.run import Run, TuningConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, decode

ROOT = Path(__file__).resolve().parent
REPORT, CALIBRATION = "reward.json", "calibration.png"  # in OUT_DIR
SAMPLE_BATCH, MIN_SAMPLES = 32, 16  # prompts sampled at a time; samples for a mean and deviation
NORMALIZED = 1e-3  # mean and deviation this near to 0 and 1 need no rescaling


@dataclass(frozen=True)
class RewardConfig(TuningConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"), "fine-tuned model to start from, and to "
                           "normalize on: folder, OUT_DIR of a run, or hub name", is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    val_data: str | None = flag(None, "held-out pairs in a file of their own (default: those of "
                                      "--data at --val-fraction)", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "reward"), "folder of checkpoints and logs",
                        is_path=True)
    val_start: float = flag(0.0, "hold out the rows with a hash from here to here + "
                                 "--val-fraction: a fold of a cross-validation", minimum=0, below=1)
    cut: bool = flag(False, "cut responses at the first artifact (##, <|, Instruction) and after "
                            "the last full sentence")
    epochs: int = flag(1, "passes over the training pairs; a second one overfits", minimum=1)
    micro_batch_size: int = flag(8, "pairs per rank and micro-step", minimum=1)
    max_lr: float = flag(1e-5, "learning rate after the warm-up", minimum=0)
    normalize_samples: int = flag(256, "responses sampled to normalize scores; 0: leave them",
                                  minimum=0)
    max_response: int = flag(128, "maximum number of tokens of such a response", minimum=1)


# A resumed run may change neither the pairs of a step nor what is held out
FIXED_ON_RESUME = ("batch_size", "epochs", "val_fraction", "val_start", "cut", "seed",
                   "data_sha256", "reference_sha256")


def read_splits(config: RewardConfig, block_size: int) -> tuple[list[Pair], list[Pair], str]:
    """(training pairs, held-out pairs, summary). Raises UserError."""
    pairs, summary = load_pairs(config.data, "--data", block_size, config.cut)
    if config.val_data is None:
        trained, held_out, split = split_pairs(pairs, config.val_fraction, config.val_start)
        return trained, held_out, f"{summary}; {split}"
    held_out, val_summary = load_pairs(config.val_data, "--val-data", block_size, config.cut)
    prompts = {tuple(pair.prompt) for pair in pairs}
    seen = sum(tuple(pair.prompt) in prompts for pair in held_out)
    return pairs, held_out, (f"{summary} to train on; {val_summary} held out, {seen:,} of them "
                             "with the prompt of a training pair")


def pair_margins(model: RewardModel, pairs: Sequence[Pair], run: Run) -> torch.Tensor | None:
    """The margins (R,) float64 of R pairs: score of the chosen minus score of the rejected. None
    after a signal. Raises UserError naming a pair whose score is not finite."""
    scores = score_rows(model, sequences(pairs), [pair.place for pair in pairs for _ in range(2)],
                        run.launch, run.dtype, 2 * run.micro_batch_size, run.stop.requested)
    return None if scores is None else scores[::2] - scores[1::2]


def train(config: RewardConfig, launch: Launch, stop: StopRequest | None = None) -> RewardModel:
    """Trains for the given epochs, or until a signal; returns the final, normalized model."""
    device = launch.device

    # 1. The model, the pairs, and the checkpoint to resume from
    if (Path(config.out_dir) / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {config.out_dir} is itself a checkpoint: choose another")
    base = load_model(config.checkpoint, device)
    check_vocabulary(base, config.checkpoint)
    block_size = base.config.block_size
    train_pairs, val_pairs, summary = read_splits(config, block_size)
    run = Run(config, launch, stop, label="reward model", graph="reward_loss.png",
              data={"sha256": [sha256_of(Path(file)) for file in (config.data, config.val_data)
                               if file]}, loss_name="-log sigmoid(margin), nats per pair",
              fixed=FIXED_ON_RESUME, prompt_template=PROMPT_TEMPLATE,
              reference_sha256=weights_sha256(base))
    raw_model = (load_model(run.checkpoint, device, RewardModel) if run.is_resumed else
                 RewardModel.from_language_model(base, config.seed))
    del base  # a new run trains its tensors

    # 2. The optimizer, and the number of steps
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    num_pairs = min(config.batch_size, len(train_pairs))  # of a step
    steps_per_epoch = -(-len(train_pairs) // num_pairs)  # ceiling division
    max_steps = config.epochs * steps_per_epoch
    B = min(config.micro_batch_size, -(-num_pairs // launch.world_size))
    model = run.prepare(raw_model, optimizer, max_steps, micro_batch_sizes=[B],
                        sequence_length=block_size, max_steps_flag="--epochs",
                        milestones=range(steps_per_epoch, max_steps, steps_per_epoch))
    launch.print0(f"{summary}\n{run.summary}; {max_steps:,} steps of {num_pairs} pairs, {B} per "
                  "micro-step")
    batches = row_batches(train_pairs, attrgetter("num_tokens"), num_pairs, config.seed, run.step)
    recent = deque(maxlen=1 + run.steps_late)  # the last batches; the host reads a loss late

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                margins = pair_margins(raw_model, val_pairs, run)
                if margins is None:  # a signal came
                    run.log_validation(None)
                else:
                    run.log_validation(preference_loss(margins).mean().item(),
                                       accuracy=accuracy(margins).mean().item())
            if run.save_or_finish():
                break

            lr = learning_rate(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                               max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            recent.append(batch := next(batches))  # of all ranks
            micro_batches = rank_share(batch, B, launch.rank, launch.world_size)
            sums = torch.zeros(3, device=device)  # of loss, accuracy and margin
            for micro_step, pairs in enumerate(micro_batches):
                # A rank without pairs takes part in the step with two rows that count for nothing
                ids, masks = pad_batch(sequences(pairs) or [[0], [0]], block_size, device)
                with run.gradient_sync(micro_step == len(micro_batches) - 1):
                    with autocast(device, run.dtype):
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
                pair_margins(raw_model, recent[0], run)
        if not run.stopping:
            finish(config, run, raw_model, train_pairs, val_pairs)
    return raw_model.eval()


# ------------------------------------------------------------------- after the last step


def finish(config: RewardConfig, run: Run, model: RewardModel, train_pairs: list[Pair],
           val_pairs: list[Pair]) -> None:
    """Writes the report on the held-out pairs, then normalizes the scores and saves again. A run
    killed in between does the rest when it is resumed; it keeps a report on the same weights,
    because normalization has changed the margins."""
    path, launch = run.out_dir / REPORT, run.launch
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if is_new := report.get("loss") != run.state.val_loss:
        report = make_report(model, train_pairs, val_pairs, run)
    samples = sample_responses(config, train_pairs, run)
    scores = None if samples is None else score_rows(
        model, samples, ["a sampled response"] * len(samples), launch, run.dtype,
        2 * run.micro_batch_size, run.stop.requested)
    if report is None or scores is None:
        run.stopping = True
        return
    deviation, mean = (0.0, 0.0) if len(scores) < MIN_SAMPLES else (
        figure.item() for figure in torch.std_mean(scores, correction=0))
    if is_new:
        report |= {"samples": len(scores), "mean": mean, "deviation": deviation}
    if is_new and launch.is_master:
        draw_calibration(report["calibration"], run.out_dir / CALIBRATION)
        with atomic_write(path, text=True) as file:
            json.dump(report, file, indent=1)
    launch.print0(report_table(report))
    if deviation < NORMALIZED:  # equal samples
        launch.print0(f"scores are not normalized: {len(scores)} of {config.normalize_samples} "
                      f"samples ended within --max-response {config.max_response} tokens, at least "
                      f"{MIN_SAMPLES} different ones are needed")
    elif abs(mean) > NORMALIZED or abs(deviation - 1) > NORMALIZED:
        model.rescale(mean, deviation)
        run.save_again()


def sample_responses(config: RewardConfig, pairs: list[Pair], run: Run) -> list[list[int]] | None:
    """Prompts of training pairs with responses that the first checkpoint samples at temperature 1.
    Only those that end by <|endoftext|>, as all training responses do: others have no valid score.
    None after a signal. The ranks share the work; the world size changes nothing."""
    launch = run.launch
    order = permutation(len(pairs), config.seed)[: config.normalize_samples]
    prompts = sorted((pairs[i].prompt for i in order), key=len)
    seeds = np.random.SeedSequence(config.seed).generate_state(len(prompts), np.uint64).tolist()
    model = prepare_to_sample(load_model(config.checkpoint, launch.device), run.dtype)
    found, stopped = [], run.stop.requested()
    for first in range(SAMPLE_BATCH * launch.rank, len(prompts), SAMPLE_BATCH * launch.world_size):
        if stopped := stopped or run.stop.requested():
            break
        part = slice(first, first + SAMPLE_BATCH)
        ids, masks = pad_rows(prompts[part])
        output = generate(model, ids, masks, 1.0, config.max_response, seed=seeds[part])
        reasons = finish_reasons(*output, masks, config.max_response)
        found += [row for row, reason in zip(generated_rows(*output), reasons, strict=True)
                  if reason == "stop"]
    parts = launch.gather((found, stopped))
    stopped = any(stopped for _, stopped in parts)
    return None if stopped else sorted(row for part, _ in parts for row in part)


def make_report(model: RewardModel, train_pairs: list[Pair], val_pairs: list[Pair],
                run: Run) -> dict | None:
    """The report on held-out pairs, with margins before normalization; None after a signal."""
    margins = pair_margins(model, val_pairs, run)
    swapped = pair_margins(model, swap_prompts(val_pairs, model.config.block_size), run)
    if margins is None or swapped is None:
        return None
    texts, training_texts = ([(decode(pair.chosen[:-1]), decode(pair.rejected[:-1]))
                              for pair in pairs] for pairs in (val_pairs, train_pairs))
    is_shorter = torch.tensor([len(chosen) < len(rejected) for chosen, rejected in texts])
    rows = {"reward model": margins, "chosen is the shorter": margins[is_shorter],
            "against another prompt's": swapped}
    if run.launch.is_master:
        rows |= rewards.baseline_margins(texts, training_texts)
    error, bins = rewards.calibration(margins)
    return {"loss": run.state.val_loss, "calibration_error": error, "calibration": bins,
            "accuracy": {name: rewards.accuracy_interval(row) for name, row in rows.items()}}


def swap_prompts(pairs: list[Pair], block_size: int) -> list[Pair]:
    """Pairs whose rejected response is the chosen one to another prompt: a model that does not read
    the prompt cannot tell which is which."""
    others = [pairs[i] for i in permutation(len(pairs), 0)]
    swapped = [replace(pair, rejected=other.chosen) for pair, other in
               zip(others, others[1:] + others[:1], strict=True) if pair.prompt != other.prompt]
    return [pair for pair in swapped
            if pair.num_tokens <= block_size and pair.chosen != pair.rejected]


def report_table(report: dict) -> str:
    lines = [f"{'held-out pairs':26} accuracy  95 % interval      n"]
    for name, row in report["accuracy"].items():
        if row["n"]:
            lines.append(f"{name:26} {row['accuracy']:8.4f}  {row['low']:.3f} to {row['high']:.3f}"
                         f" {row['n']:6,}" + (f" ({row['ties']:,} ties)" if row["ties"] else ""))
    return "\n".join([*lines, f"loss {report['loss']:.4f}, expected calibration error "
                      f"{report['calibration_error']:.4f}; {report['samples']} sampled responses: "
                      f"mean score {report['mean']:.4f}, deviation {report['deviation']:.4f}"])


def main() -> None:
    config = parse_config(RewardConfig, description=__doc__)
    with StopRequest() as stop, launched(config.device, config.deterministic) as launch:
        train(config, launch, stop)


if __name__ == "__main__":
    run_main(main)
