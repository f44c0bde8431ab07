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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dataloader import pad_rows, permutation, read_rows, split_rows, step_rows
from inference import check_vocabulary, finish_reasons, generate, generated_rows
from minigpt2 import rewards
from minigpt2.advantages import accuracy, preference_loss
from minigpt2.checkpoint import CONFIG_FILE, load_model
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch, autocast
from minigpt2.faults import StopRequest, launched
from minigpt2.files import atomic_write, sha256_of
from minigpt2.graphs import draw_calibration
from minigpt2.kernels import prepare_to_sample
from minigpt2.optimizer import cosine_lr, make_optimizer, set_lr
from minigpt2.preferences import Pair, make_pairs, rank_share
from minigpt2.rewards import RewardModel, pad_batch, score_rows
from minigpt2.run import Run, RunConfig
from minigpt2.tokenizer import PROMPT_TEMPLATE, decode

ROOT = Path(__file__).resolve().parent
REPORT, CALIBRATION = "reward.json", "calibration.png"  # in OUT_DIR
SAMPLE_BATCH = 32  # prompts per batch of samples
MIN_SAMPLES = 16  # of fewer, mean and deviation say little
NORMALIZED = 1e-3  # mean and deviation this near to 0 and 1 need no rescaling
# A resumed run may not change which pairs a step sees
FIXED_ON_RESUME = ("batch_size", "epochs", "val_fraction", "val_start", "cut", "seed",
                   "data_sha256")


@dataclass(frozen=True)
class RewardConfig(RunConfig):
    checkpoint: str = flag(str(ROOT / "out" / "finetune"),
                           "fine-tuned model to start from: folder, OUT_DIR of a run, or hub name",
                           is_path=True)
    data: str = flag(str(ROOT / "rlhf_data" / "pydocs_pairs.json"),
                     "pairs as JSON, JSON Lines or parquet", is_path=True)
    val_data: str | None = flag(None, "held-out pairs in a file of their own (default: of --data, "
                                      "see --val-fraction)", is_path=True)
    out_dir: str = flag(str(ROOT / "out" / "reward"), "folder of checkpoints and logs",
                        is_path=True)
    epochs: int = flag(1, "passes over the training pairs; more than one overfits", minimum=1)
    batch_size: int = flag(64, "pairs per step, over all ranks", minimum=1)
    micro_batch_size: int = flag(8, "pairs per rank and micro-step", minimum=1)
    max_lr: float = flag(1e-5, "learning rate after the warm-up", minimum=0)
    min_lr: float = flag(0.0, "learning rate at the end of the cosine", minimum=0)
    warmup_fraction: float = flag(0.03, "linear warm-up, as a fraction of all steps",
                                  minimum=0, below=1)
    weight_decay: float = flag(0.0, "weight decay of matrices and embeddings", minimum=0)
    val_fraction: float = flag(0.05, "fraction of pairs held out: those that finetune.py holds out",
                               minimum=0, below=1)
    val_start: float = flag(0.0, "hold out the pairs whose hash is at least this, and less than "
                                 "this + --val-fraction: the folds of a cross-validation",
                            minimum=0, below=1)
    cut: bool = flag(False, "cut responses at the first artifact (##, <|, Instruction) and after "
                            "the last full sentence")
    normalize_samples: int = flag(256, "responses sampled to normalize scores; 0: leave them",
                                  minimum=0)
    max_response: int = flag(128, "maximum number of tokens of such a response", minimum=1)
    eval_interval: int = flag(100, "steps between validations", minimum=1)
    save_interval: int = flag(200, "steps between checkpoints, in addition to one per epoch",
                              minimum=1)
    keep_last: int = flag(3, "newest checkpoints to keep, plus the one with the lowest "
                             "validation loss; 0: all", minimum=0)
    compile: bool | None = flag(False, "torch.compile the training step (off by default: it takes "
                                       "minutes, and pairs differ in length)")


def read_data(path: str | None, name: str) -> list[tuple[str, object]]:
    """The rows of a file that the flag `name` gives; none without a file. Raises UserError."""
    try:
        return read_rows(Path(path)) if path else []
    except OSError as error:
        raise UserError(f"cannot read {name} {path} ({error}): make it with rlhf_data/"
                        "hh_rlhf_downloader.py or pydocs_pairs.py") from None


def split_pairs(config: RewardConfig, rows: list, val_rows: list, block_size: int,
                launch: Launch) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, held-out pairs) of the rows of --data and --val-data. Raises UserError."""
    pairs, summary = make_pairs(rows, block_size, cut=config.cut)
    if len(pairs) < 2:  # one to train on, one to validate on
        raise UserError(f"--data {config.data}: {summary}; expected at least 2: give other rows, "
                        "or a model with a longer context")
    if not val_rows:
        keys = [(pair.instruction, pair.input, decode(pair.chosen)) for pair in pairs]
        trained, held_out, split = split_rows(keys, config.val_fraction, config.val_start)
        launch.print0(f"{summary}; {split}")
        return [pairs[i] for i in trained], [pairs[i] for i in held_out]
    held_out, val_summary = make_pairs(val_rows, block_size, cut=config.cut)
    if not held_out:
        raise UserError(f"--val-data {config.val_data}: {val_summary}; expected at least 1")
    prompts = {(pair.instruction, pair.input) for pair in pairs}
    seen = sum((pair.instruction, pair.input) in prompts for pair in held_out)
    launch.print0(f"{summary} to train on, {val_summary} held out, {seen:,} of them with a prompt "
                  "of a training pair")
    return pairs, held_out


def sequences(pairs: list[Pair]) -> list[list[int]]:
    """The ids of both responses of each pair after their prompt: chosen, rejected, chosen, ..."""
    return [pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected)]


def held_out_margins(model: RewardModel, pairs: list[Pair], run: Run) -> list[float] | None:
    """Score of the chosen minus score of the rejected response; None after a signal. Raises
    UserError naming a pair whose score is not finite."""
    scores = score_rows(model, sequences(pairs), [pair.place for pair in pairs for _ in range(2)],
                        run.launch, run.dtype, 2 * run.micro_batch_size, run.stop.requested)
    return scores and (np.array(scores[::2]) - np.array(scores[1::2])).tolist()


def mean_preference_loss(margins: list[float]) -> float:
    return preference_loss(torch.tensor(margins, dtype=torch.float64)).mean().item()


def train(config: RewardConfig, launch: Launch, stop: StopRequest | None = None) -> RewardModel:
    """Trains for the given epochs, or until a signal; returns the final, normalized model."""
    device = launch.device

    # 1. The pairs, the model, and the checkpoint to resume from
    if (Path(config.out_dir) / CONFIG_FILE).exists():
        raise UserError(f"--out-dir {config.out_dir} is itself a checkpoint: choose another")
    rows, val_rows = read_data(config.data, "--data"), read_data(config.val_data, "--val-data")
    files = [config.data, *([config.val_data] if config.val_data else [])]
    run = Run(config, launch, stop, label="reward model", graph="reward_loss.png",
              data={"sha256": [sha256_of(Path(file)) for file in files]}, fixed=FIXED_ON_RESUME,
              prompt_template=PROMPT_TEMPLATE, loss_name="-log sigmoid(margin), nats per pair")
    base = run.saved["facts"]["checkpoint"] if run.is_resumed else config.checkpoint
    if run.is_resumed:
        raw_model = load_model(run.checkpoint, device, RewardModel)
    else:
        raw_model = RewardModel.from_language_model(load_model(base, device), config.seed)
    check_vocabulary(raw_model, base)
    block_size = raw_model.config.block_size
    train_pairs, val_pairs = split_pairs(config, rows, val_rows, block_size, launch)

    # 2. The number of steps, and the optimizer
    num_pairs = min(config.batch_size, len(train_pairs))  # of a step
    steps_per_epoch = -(-len(train_pairs) // num_pairs)  # ceiling division
    max_steps = config.epochs * steps_per_epoch
    optimizer = make_optimizer(raw_model, lr=config.max_lr, betas=(0.9, 0.95), eps=1e-8,
                               weight_decay=config.weight_decay, shard=run.shard_optimizer)
    B = min(config.micro_batch_size, -(-num_pairs // launch.world_size))
    model = run.prepare(raw_model, optimizer, max_steps, max_steps_flag="--epochs",
                        milestones=range(steps_per_epoch, max_steps, steps_per_epoch),
                        micro_batch_sizes=[B], sequence_length=block_size)
    launch.print0(f"{run.summary}; {max_steps:,} steps of {num_pairs} pairs, {B} per micro-step")

    # 3. The loop
    with run:
        while True:
            if run.eval_due():
                margins = held_out_margins(raw_model, val_pairs, run)
                loss = margins and mean_preference_loss(margins)
                run.log_validation(loss, **rewards.accuracy_interval(margins or []))
            if run.save_or_finish():
                break

            lr = cosine_lr(run.step, warmup_steps=round(max_steps * config.warmup_fraction),
                           max_steps=max_steps, max_lr=config.max_lr, min_lr=config.min_lr)
            set_lr(optimizer, lr)
            batch = pairs_of_step(train_pairs, run.step, num_pairs, config.seed)  # of all ranks
            micro_batches = rank_share(batch, B, launch.rank, launch.world_size)
            sums = torch.zeros(3, device=device)  # of loss, accuracy and margin
            for micro_step, pairs in enumerate(micro_batches):
                # A rank without pairs takes part in the step: [0, 0] counts for nothing
                ids, masks = pad_batch(sequences(pairs) or [[0], [0]], block_size, device)
                with run.gradient_sync(micro_step == len(micro_batches) - 1):
                    with autocast(device, run.dtype):
                        scores = model(ids, masks)  # (2B,)
                    margins = (scores[::2] - scores[1::2])[: len(pairs)]  # (B,)
                    # Mean over the pairs of the global batch, not a mean of means
                    loss = preference_loss(margins).sum() / len(batch)
                    run.scaler.scale(loss * launch.world_size).backward()
                figures = torch.stack([accuracy(margins), margins]).detach().sum(1) / len(batch)
                sums += torch.cat([loss.detach()[None], figures])
            tokens = sum(map(len, sequences(batch)))
            run.finish_step(sums[0] * launch.world_size, lr=lr, tokens=tokens,
                            sequence_length=tokens // (2 * len(batch)),
                            sums={"accuracy": sums[1], "margin": sums[2]})
            if run.state.skipped:  # raises UserError if a score is not finite
                step = run.step - 1 - run.steps_late
                held_out_margins(raw_model, pairs_of_step(train_pairs, step, num_pairs,
                                                          config.seed), run)
        if not run.stopping:
            finish(config, run, raw_model, base, train_pairs, val_pairs)
    return raw_model.eval()


def pairs_of_step(pairs: list[Pair], step: int, batch_size: int, seed: int) -> list[Pair]:
    """The pairs of one step, sorted by length so that micro-batches need little padding."""
    return sorted((pairs[i] for i in step_rows(len(pairs), step, batch_size, seed)),
                  key=lambda pair: pair.num_tokens)


# ------------------------------------------------------------------- after the last step


def finish(config: RewardConfig, run: Run, model: RewardModel, base: str, train_pairs: list[Pair],
           val_pairs: list[Pair]) -> None:
    """Writes the report on the held-out pairs, then normalizes the scores and saves again. A run
    killed in between does the rest when it is resumed; it keeps a report on the same weights,
    because normalization has changed the margins."""
    path, launch = run.out_dir / REPORT, run.launch
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    samples = sample_responses(config, base, train_pairs, run)
    scores = samples and score_rows(model, samples, ["a sampled response"] * len(samples), launch,
                                    run.dtype, 2 * run.micro_batch_size, run.stop.requested)
    if report.get("loss") != run.state.val_loss and scores is not None:
        report = evaluate(model, train_pairs, val_pairs, run)
    if scores is None or report is None:
        run.stopping = True
        return
    mean, deviation = (np.mean(scores), np.std(scores)) if len(scores) >= MIN_SAMPLES else (0, 0)
    if "samples" not in report:
        report |= {"samples": len(scores), "mean": float(mean), "deviation": float(deviation)}
        if launch.is_master:
            draw_calibration(report["calibration"], run.out_dir / CALIBRATION)
            with atomic_write(path, text=True) as file:
                json.dump(report, file, indent=1)
    launch.print0(table(report))
    if deviation == 0:
        launch.print0(f"scores are not normalized: {len(scores)} of {config.normalize_samples} "
                      f"sampled responses ended within --max-response {config.max_response} tokens")
    elif abs(mean) > NORMALIZED or abs(deviation - 1) > NORMALIZED:
        model.rescale(float(mean), float(deviation))
        run.save_again()


def sample_responses(config: RewardConfig, base: str, pairs: list[Pair],
                     run: Run) -> list[list[int]] | None:
    """Prompts of training pairs with responses sampled from the checkpoint `base` at temperature 1.
    Only those that end by <|endoftext|>, as all training responses do: others have no valid score.
    None after a signal. The ranks share the work; the world size changes nothing."""
    launch = run.launch
    order = permutation(len(pairs), config.seed)[: config.normalize_samples]
    prompts = sorted((pairs[i].prompt for i in order), key=len)
    seeds = np.random.SeedSequence(config.seed).generate_state(len(prompts), np.uint64).tolist()
    model = prepare_to_sample(load_model(base, launch.device), run.dtype)
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
    if any(stopped for _, stopped in parts):
        return None
    return sorted(row for part, _ in parts for row in part)


def evaluate(model: RewardModel, train_pairs: list[Pair], val_pairs: list[Pair],
             run: Run) -> dict | None:
    """The report on held-out pairs, with margins before normalization; None after a signal."""
    margins = held_out_margins(model, val_pairs, run)
    swapped = held_out_margins(model, swap_prompts(val_pairs, model.config.block_size), run)
    if margins is None or swapped is None:
        return None
    texts, training_texts = ([(decode(pair.chosen[:-1]), decode(pair.rejected[:-1]))
                              for pair in pairs] for pairs in (val_pairs, train_pairs))
    rows = {"reward model": margins,
            "chosen is the shorter": [margin for margin, (chosen, rejected) in
                                      zip(margins, texts, strict=True)
                                      if len(chosen) < len(rejected)],
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


def table(report: dict) -> str:
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
