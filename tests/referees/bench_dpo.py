"""Speed of dpo.py against TRL's DPOTrainer, on a CPU in float32.

    python tests/referees/bench_dpo.py --log bench_dpo.jsonl
    python tests/referees/bench_dpo.py --checkpoint out/finetune --data pairs.jsonl

Both train for one epoch on the same pairs, with the reference's log-probabilities computed
beforehand, which does not count. Each pads its micro-batches as it always does.
"""

import pathlib
import sys
import tempfile
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from against_trl import (
    MODEL,
    ROWS,
    AgainstTRLConfig,
    Trial,
    our_trial,
    run_in_turn,
    trl_trial,
    write_folder,
)

import dpo
from bench.harness import run_bench
from dataloader import load_pairs, split_pairs
from minigpt2.checkpoint import load_model
from minigpt2.config import flag
from minigpt2.distributed import start
from minigpt2.preferences import Pair, sequences
from minigpt2.tokenizer import ALPACA


@dataclass(frozen=True)
class BenchDPOConfig(AgainstTRLConfig):
    pairs: int = flag(33, "pairs to use, of which one is held out", minimum=3)
    batch_size: int = flag(16, "pairs per step", minimum=1)
    micro_batch_size: int = flag(8, "pairs per micro-step", minimum=1)


def make_trial(system: str, config: BenchDPOConfig, folder: pathlib.Path) -> Trial:
    """In a worker process: the call that trains for one epoch."""
    torch.set_num_threads(config.threads)
    pairs = trained_pairs(folder)
    counts = {"pairs": len(pairs), "tokens": sum(map(len, sequences(pairs)))}
    train = ours(config, folder) if system == "ours" else trls(config, folder, pairs)
    return lambda: train() | counts


def trained_pairs(folder: pathlib.Path) -> list[Pair]:
    block_size = load_model(folder / MODEL).config.block_size
    return split_pairs(load_pairs(str(folder / ROWS), "--data", block_size, ALPACA)[0], 0.0)[0]


def ours(config: BenchDPOConfig, folder: pathlib.Path) -> Trial:
    launch = start("cpu")
    return lambda: our_trial(lambda out: dpo.train(dpo.DPOConfig(
        checkpoint=str(folder / MODEL), data=str(folder / ROWS), out_dir=out, device="cpu",
        batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
        warmup_fraction=0.0, val_fraction=0.0), launch), folder)[0]


def trls(config: BenchDPOConfig, folder: pathlib.Path, pairs: list[Pair]) -> Trial:
    import trl

    class OnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset  # already ids: TRL encodes prompt and response together

    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            for pair in pairs]
    return lambda: trl_trial(
        OnIds, trl.DPOConfig, folder, rows, micro_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
        num_train_epochs=1, max_length=None, precompute_ref_log_probs=True,
        precompute_ref_batch_size=config.micro_batch_size)[0]


def bench_dpo(config: BenchDPOConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = write_folder(config, folder, 9 if config.quick else config.pairs)
        run_in_turn(config, "dpo", folder, model, make_trial, "pairs")


if __name__ == "__main__":
    run_bench(bench_dpo, BenchDPOConfig, __doc__)
