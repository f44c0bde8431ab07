"""Speed of dpo.py against TRL's DPOTrainer, on a CPU in float32.

    python tests/referees/bench_dpo.py --log bench_dpo.jsonl
    python tests/referees/bench_dpo.py --checkpoint out/finetune --data pairs.jsonl

Both train for one epoch on the same pairs of token ids, from the same folder, with the same batches
of pairs and micro-batches, and with the reference's log-probabilities computed beforehand. They
alternate, each in a process of its own. The time is that of the training loop alone, without
loading, the reference, validation and checkpoints. Medians, without the first round.
"""

import json
import pathlib
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import dpo
from bench.harness import BenchConfig, Step, compare, record, run_bench
from dataloader import load_pairs, split_pairs
from minigpt2.checkpoint import load_model, save_checkpoint
from minigpt2.config import flag
from minigpt2.distributed import start
from minigpt2.files import atomic_write
from minigpt2.metrics import read_log
from minigpt2.preferences import sequences
from minigpt2.tokenizer import decode
from model import GPT, GPTConfig


@dataclass(frozen=True)
class BenchDPOConfig(BenchConfig):
    repeats: int = flag(5, "timed epochs of each", minimum=1)
    checkpoint: str | None = flag(None, "checkpoint to train (default: 31M parameters, random)")
    data: str | None = flag(None, "pairs (default: made up, as long as Alpaca's rows)")
    pairs: int = flag(129, "pairs to use, of which one is held out", minimum=3)
    batch_size: int = flag(64, "pairs per step", minimum=1)
    micro_batch_size: int = flag(8, "pairs per micro-step", minimum=1)
    threads: int = flag(2, "threads of each process", minimum=1)


def made_rows(count: int) -> list[dict[str, str]]:
    """Prompts and responses with lengths like those of Alpaca's rows."""
    rng, words = random.Random(0), "the a river king dog ran slept cafe 1984 quickly".split()

    def text(median: float) -> str:
        length = round(min(median * rng.lognormvariate(0, 0.8), 250))
        return " ".join(rng.choices(words, k=1 + length))

    return [{"instruction": f"{i} {text(12)}", "chosen": f"{text(45)} {i}", "rejected": text(35)}
            for i in range(count)]


def make_step(name: str, config: BenchDPOConfig, folder: str) -> Step:
    """In a worker process: the call that trains for one epoch and returns its seconds."""
    torch.set_num_threads(config.threads)
    return (ours if name == "ours" else trls)(config, pathlib.Path(folder))


def ours(config: BenchDPOConfig, folder: pathlib.Path) -> Step:
    launch = start("cpu")

    def epoch() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            dpo.train(dpo.DPOConfig(
                checkpoint=str(folder / "model"), data=str(folder / "pairs.jsonl"), out_dir=out,
                batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
                warmup_fraction=0.0, val_fraction=0.0, device="cpu"), launch)
            log = read_log(pathlib.Path(out) / "metrics.jsonl")
            (end,) = log["end"].values()
        return end["seconds"] - end["overhead_s"]
    return epoch


def trls(config: BenchDPOConfig, folder: pathlib.Path) -> Step:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class OnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset  # already ids: TRL encodes prompt and response together

    (checkpoint,) = (folder / "model").glob("step_*")
    rows = Dataset.from_list([{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen,
                               "rejected_ids": pair.rejected} for pair in trained_pairs(folder)])

    def epoch() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            settings = trl.DPOConfig(
                out, use_cpu=True, bf16=False, report_to="none", max_length=None,
                gradient_checkpointing=False, per_device_train_batch_size=config.micro_batch_size,
                gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
                num_train_epochs=1, learning_rate=1e-6, precompute_ref_log_probs=True,
                precompute_ref_batch_size=config.micro_batch_size, save_strategy="no",
                disable_tqdm=True)
            trainer = OnIds(model=AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"),
                            args=settings, train_dataset=rows,
                            processing_class=AutoTokenizer.from_pretrained(checkpoint))
            return trainer.train().metrics["train_runtime"]
    return epoch


def trained_pairs(folder: pathlib.Path) -> list:
    block_size = load_model(folder / "model").config.block_size
    pairs, _ = load_pairs(str(folder / "pairs.jsonl"), "--data", block_size)
    return split_pairs(pairs, 0.0)[0]


def bench_dpo(config: BenchDPOConfig) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        torch.manual_seed(0)
        sizes = GPTConfig(512, n_layer=1, n_head=1, n_embd=16) if config.quick else (
            GPTConfig(512, n_layer=6, n_head=6, n_embd=384))
        model = load_model(config.checkpoint) if config.checkpoint else GPT(sizes)
        save_checkpoint(folder / "model", 1, model)
        count = 9 if config.quick else config.pairs
        write_pairs(folder / "pairs.jsonl", config, count, model.config.block_size)
        pairs = trained_pairs(folder)
        timings = compare(("ours", "trl"), 1 + config.rounds, make_step, config, name)
    seconds = {name: statistics.median(timing.results[1:]) for name, timing in timings.items()}
    tokens = sum(map(len, sequences(pairs)))
    for name, timing in timings.items():
        record(config, "dpo epoch", system=name, seconds=seconds[name], pairs=len(pairs),
               tokens=tokens, tokens_per_s=tokens / seconds[name],
               all_seconds=[round(value, 3) for value in timing.results[1:]],
               peak_mb=timing.peak / 2**20, parameters=model.num_parameters())
    record(config, "dpo", speedup=seconds["trl"] / seconds["ours"], threads=config.threads)


def write_pairs(path: pathlib.Path, config: BenchDPOConfig, count: int, block_size: int) -> None:
    """Writes the first usable rows of --data, or made-up ones, as plain JSON Lines."""
    rows = made_rows(count)
    if config.data:
        rows = [{"instruction": pair.instruction, "input": pair.input,
                 "chosen": decode(pair.chosen[:-1]), "rejected": decode(pair.rejected[:-1])}
                for pair in load_pairs(config.data, "--data", block_size)[0][:count]]
    with atomic_write(path, text=True) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    run_bench(bench_dpo, BenchDPOConfig, __doc__)
