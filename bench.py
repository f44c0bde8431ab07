"""Measurements, each of A against B in turn inside one run: medians, ratios, and what was equal.

    python bench.py data                                   # on the embedded corpus
    python bench.py data --files 'dir/*.parquet' --log image/logs/bench_data.jsonl
    python bench.py memory --log image/logs/bench_memory.jsonl
    python bench.py checkpoint --log image/logs/bench_checkpoint.jsonl

`memory` computes what every model size needs a rank and which micro-batches fit on which card, and
compares such sums with what this machine measures. `checkpoint` measures how long training waits
for a checkpoint of the 124M model, written here and now or in the background. `data` measures
tokenising (the whole way from files to shards, against a bare loop of tiktoken's `encode_ordinary`
over the same documents in as many processes) and the loader (batches of 32 x 1024, and what it adds
to training steps that it overlaps with). Every figure is printed and, with --log, appended to a
file as one JSON object a line.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from checkpoint import save_checkpoint
from config import UserError, flag, parse_config, run_main
from corpus import write_corpus
from dataloader import TokenLoader
from distributed import Launch, autocast
from documents import file_source, local_files
from memory import largest_micro_batch_for, memory_per_rank, saved_bytes
from model import GPT, PRESETS, GPTConfig
from optimizer import make_optimizer
from pydocs import read_documents
from resume import CheckpointWriter, Progress, training_state
from tokenizer import load_encoder, load_tokenizer

DOWNLOADER = Path(__file__).resolve().parent / "pretrain_data" / "fineweb_downloader.py"
SHARD_TOKENS = 5_000_000  # FineWeb's are 100M: a sample is to fill several
LOADER_BATCH, LOADER_LENGTH, LOADER_BATCHES = 32, 1024, 200
CARDS, SHARE = (24, 32, 80, 141), 512  # GB = 10**9 bytes; micro-batches are powers of two up to it
SAVED_SIZES, SAVED_SHAPE = GPTConfig(n_layer=4, n_head=4, n_embd=256), (4, 256)
STEP_SIZES, STEP_LENGTH = PRESETS["gpt2"], 1024
BASELINE = GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=32)


@dataclass(frozen=True)
class BenchConfig:
    what: tuple[str, ...] = flag((), "what to measure: data (or of that only encoders, tokenise "
                                     "or loader), memory or checkpoint", positional=True)
    files: str | None = flag(None, "documents: a quoted glob or a folder (default: the embedded "
                                   "corpus)")
    max_documents: int = flag(40_000, "of them, so many are used", minimum=1)
    workers: int = flag(2, "the most processes that tokenise", minimum=1)
    repeats: int = flag(7, "measurements of each kind, in turn", minimum=1)
    log: str | None = flag(None, "append the figures to this file, one JSON object a line")


def in_turn(repeats: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of every measure, taken A, B, C, A, B, C, ... after one unmeasured round."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(repeats + 1):
        for name, measure in measures.items():
            value = measure()
            if round_:
                values[name].append(value)
    return {name: statistics.median(taken) for name, taken in values.items()}


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def record(config: BenchConfig, name: str, **figures) -> None:
    print(f"{name}: " + ", ".join(f"{key} {value:,.4g}" if isinstance(value, float) else
                                  f"{key} {value}" for key, value in figures.items()), flush=True)
    if config.log:
        with open(config.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"bench": name, **figures}) + "\n")


# ---------------------------------------------------------------------------------- tokenising


def bare_loop(texts: list[str], start, done) -> None:
    """In a process of its own: tiktoken over documents in memory, nothing read, nothing written."""
    encoding = load_tokenizer()
    while start.get():
        for text in texts:
            encoding.encode_ordinary(text)
        done.put(True)


class BareLoops:
    """As many bare loops as there are workers, started once, each over its share."""

    def __init__(self, texts: list[str], workers: int):
        context = multiprocessing.get_context("spawn")
        self.starts, self.done = [context.Queue() for _ in range(workers)], context.Queue()
        self.processes = [context.Process(target=bare_loop, daemon=True,
                                          args=(texts[i::workers], self.starts[i], self.done))
                          for i in range(workers)]
        for process in self.processes:
            process.start()

    def run(self) -> None:
        for start in self.starts:
            start.put(True)
        for _ in self.starts:
            self.done.get()

    def stop(self) -> None:
        for start, process in zip(self.starts, self.processes, strict=True):
            start.put(False)
            process.join()


def downloader(path: Path, out_dir: Path, workers: int, shard_tokens: int) -> list[str]:
    """The command line that makes shards of a file."""
    return [sys.executable, str(DOWNLOADER), "--files", str(path), "--out-dir", str(out_dir),
            "--workers", str(workers), "--shard-tokens", str(shard_tokens)]


def write_once(path: Path, workers: int, shard_tokens: int) -> float:
    """Seconds from the file to the manifest; the start of all processes included."""
    with tempfile.TemporaryDirectory() as out:
        command = downloader(path, Path(out), workers, shard_tokens)
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def peak_memory(command: list[str]) -> float | None:
    """The most MiB that a command and its children held together, looked at every 20 ms; pages that
    they share are counted once. None where there is no /proc."""
    if not Path("/proc/self/smaps_rollup").exists():
        return None
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                     start_new_session=True), 0
    while process.poll() is None:
        held = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if os.getpgid(int(path.name)) == process.pid:
                    text = (path / "smaps_rollup").read_text(encoding="utf-8")
                    held += int(text.split("Pss:")[1].split()[0]) if "Pss:" in text else 0
        peak = max(peak, held)
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with {process.returncode}")
    return peak / 1024


def bench_tokenising(config: BenchConfig, texts: list[str], path: Path, folder: Path) -> None:
    encoding = load_tokenizer()
    tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    shard_tokens = min(SHARD_TOKENS, tokens // 3)
    for workers in sorted({1, config.workers}):
        loops = BareLoops(texts, workers)
        taken = in_turn(config.repeats, bare=lambda loops=loops: seconds(loops.run),
                        shards=lambda workers=workers: write_once(path, workers, shard_tokens))
        loops.stop()
        record(config, "tokenise", workers=workers, documents=len(texts), tokens=tokens,
               bare_tokens_per_sec=tokens / taken["bare"],
               shards_tokens_per_sec=tokens / taken["shards"],
               ratio=taken["bare"] / taken["shards"],
               peak_mib=peak_memory(downloader(path, folder / f"peak_{workers}", workers,
                                               shard_tokens)))


def bench_encoders(config: BenchConfig, texts: list[str]) -> None:
    """tiktoken's list and array, and gigatoken where it is installed: equal? how fast?"""
    encoders = {"tiktoken_array": load_encoder("tiktoken")}
    try:
        encoders["gigatoken"] = load_encoder("gigatoken")
    except UserError as error:
        print(f"gigatoken is not measured: {error}")
    reference = load_tokenizer().encode_ordinary
    for name, encode in encoders.items():
        different = sum(not np.array_equal(encode(text), reference(text)) for text in texts)
        record(config, "encoder equality", encoder=name, documents=len(texts), different=different)
    measures = {"tiktoken_list": reference, **encoders}
    taken = in_turn(config.repeats, **{
        name: lambda encode=encode: seconds(lambda: [encode(text) for text in texts])
        for name, encode in measures.items()})
    for name in encoders:
        record(config, "encoder", encoder=name, speedup=taken["tiktoken_list"] / taken[name])


# ---------------------------------------------------------------------------------- the loader


def bench_loader(config: BenchConfig, data_dir: Path) -> None:
    loader = TokenLoader(data_dir, "train", sequence_length=LOADER_LENGTH,
                         micro_batch_size=LOADER_BATCH, vocab_size=50257,
                         total_batch_size=LOADER_BATCH * LOADER_LENGTH)

    def batches(clock: Callable[[], float]) -> float:
        begun = clock()
        for step in range(LOADER_BATCHES):
            loader.batch(step, 0)
        return LOADER_BATCHES * LOADER_BATCH * LOADER_LENGTH / (clock() - begun)

    rates = in_turn(config.repeats, wall=lambda: batches(time.perf_counter),
                    cpu=lambda: batches(time.process_time))
    record(config, "loader", tokens_per_sec=rates["wall"], tokens_per_cpu_sec=rates["cpu"])

    # the same training steps on one batch that is there already, and on the loader's stream
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=128))
    small = TokenLoader(data_dir, "train", sequence_length=256, micro_batch_size=8,
                        total_batch_size=2048, vocab_size=50257)
    fixed = small.batch(0, 0)
    stream, waits = small.stream(0, 1, lambda tensor: tensor), []

    def next_batch() -> tuple[torch.Tensor, torch.Tensor]:
        begun = time.perf_counter()
        batch = next(stream)
        waits.append(time.perf_counter() - begun)
        return batch

    def step(batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> float:
        def train() -> None:
            model(*batch(), return_logits=False)[1].backward()
            model.zero_grad(set_to_none=True)
        return seconds(train)

    taken = in_turn(4 * config.repeats, fixed=lambda: step(lambda: fixed),
                    stream=lambda: step(next_batch))
    record(config, "loader beside training", step_ms=1000 * taken["stream"],
           wait_ms=1000 * statistics.median(waits),
           wait_share_of_step=statistics.median(waits) / taken["stream"],
           step_on_stream_over_fixed=taken["stream"] / taken["fixed"])


def load_texts(config: BenchConfig) -> list[str]:
    if config.files is None:
        return [document.text for document in read_documents()][: config.max_documents]
    parts = file_source(local_files(config.files)).open_unit(0)
    texts = (text for part in parts for text in part.read() if text)
    return list(itertools.islice(texts, config.max_documents))


def bench_data(config: BenchConfig) -> None:
    texts = load_texts(config)
    if sum(map(len, texts)) < 100_000:
        raise UserError(f"{len(texts)} documents with less than 100,000 characters are too few to "
                        "measure: give more --files")
    if {"data", "encoders"} & set(config.what):
        bench_encoders(config, texts)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "documents.parquet"  # as FineWeb's files are: zstd, 1000 rows a group
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd",
                                    row_group_size=1000)
        if {"data", "tokenise"} & set(config.what):
            bench_tokenising(config, texts, path, Path(name))
        if {"data", "loader"} & set(config.what):
            write_corpus({}, partial(file_source, [path]), Path(name) / "data", name="bench",
                         shard_tokens=min(500_000, sum(map(len, texts)) // 40))
            bench_loader(config, Path(name) / "data")


# ---------------------------------------------------------------------------------- memory


def memory_of_preset(config: BenchConfig, name: str) -> None:
    """Computed: bytes a rank of 8 in bfloat16, compiled, as the trainer's defaults are on a GPU."""
    sizes, ways = PRESETS[name], {"plain": {}, "sharded": {"shard_optimizer": True},
                                  "sharded_checkpointed": {"shard_optimizer": True,
                                                           "activation_checkpointing": True}}
    setting = {"sequence_length": 1024, "dtype": torch.bfloat16, "world_size": 8, "compiled": True}
    plans = {way: memory_per_rank(sizes, micro_batch_size=1, **setting, **options)
             for way, options in ways.items()}
    state = {way: plan.weights + plan.gradients + plan.optimizer for way, plan in plans.items()}
    largest = {f"{way}_{card}gb": largest_micro_batch_for(sizes, card * 10**9, share=SHARE,
                                                          **setting, **options)
               for way, options in ways.items() for card in CARDS}
    record(config, "memory", model=name, state_bytes=state["plain"],
           state_bytes_sharded=state["sharded"],
           activation_bytes_per_sequence=plans["plain"].activations,
           activation_bytes_per_sequence_checkpointed=plans["sharded_checkpointed"].activations,
           **largest)


def measure_saved(config: BenchConfig, dtype: torch.dtype) -> None:
    """What autograd keeps below the head, with the weights cast for it, against the formula."""
    model, (batch, length) = GPT(SAVED_SIZES), SAVED_SHAPE
    tokens = torch.zeros(SAVED_SHAPE, dtype=torch.long)
    with autocast(tokens.device, dtype):
        measured = saved_bytes(model, lambda: model.hidden_states(tokens))
    plan = memory_per_rank(SAVED_SIZES, micro_batch_size=batch, sequence_length=length, dtype=dtype,
                           device_type="cpu")
    computed = plan.activations - tokens.nbytes + plan.weights - plan.gradients  # no targets there
    record(config, "kept for backward", dtype=str(dtype).removeprefix("torch."),
           computed_bytes=computed, measured_bytes=measured, ratio=measured / computed)


def peak_of_step(sizes: GPTConfig, batch: int, length: int, dtype: torch.dtype, answers) -> None:
    """In a process of its own: the most bytes it held in two updates of two micro-steps."""
    model = GPT(sizes)
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    tokens = torch.zeros(2, batch, length, dtype=torch.long)
    for _ in range(2):
        for _ in range(2):
            with autocast(tokens.device, dtype):
                loss = model(*tokens, reduction="sum", return_logits=False)[1]
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    answers.put(1024 * int(status.split("VmHWM:")[1].split()[0]))


def measure_step(config: BenchConfig) -> None:
    """The peak of a process that trains, against that of one with hardly a model, and the sum."""
    context = multiprocessing.get_context("spawn")
    answers, peaks = context.Queue(), []
    for sizes, batch, length in ((BASELINE, 1, 16), (STEP_SIZES, 1, STEP_LENGTH),
                                 (STEP_SIZES, 2, STEP_LENGTH)):
        process = context.Process(target=peak_of_step,
                                  args=(sizes, batch, length, torch.bfloat16, answers))
        process.start()
        process.join()
        if process.exitcode:
            raise UserError(f"the process that measures its memory ended with {process.exitcode}: "
                            "it needs /proc, and 4 GB for the 124M model")
        peaks.append(answers.get())
    for batch, peak in enumerate(peaks[1:], 1):
        plan = memory_per_rank(STEP_SIZES, micro_batch_size=batch, sequence_length=STEP_LENGTH,
                               dtype=torch.bfloat16, device_type="cpu")
        record(config, "peak of a process", micro_batch_size=batch, baseline_bytes=peaks[0],
               computed_bytes=plan.total, measured_bytes=peak,
               ratio=(peak - peaks[0]) / plan.total)


def bench_memory(config: BenchConfig) -> None:
    for name in PRESETS:
        memory_of_preset(config, name)
    for dtype in (torch.float32, torch.bfloat16):
        measure_saved(config, dtype)
    measure_step(config)


# ------------------------------------------------------------------------------ checkpoints


def bench_checkpoint(config: BenchConfig) -> None:
    """Until training may go on: written here and now, and copied for the thread that writes it."""
    model = GPT(PRESETS["gpt2"])
    optimizer = make_optimizer(model, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the moments
    optimizer.zero_grad(set_to_none=True)
    launch, scaler = Launch(0, 1, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
    with tempfile.TemporaryDirectory() as name:
        out_dir, steps = Path(name), itertools.count()
        with CheckpointWriter(out_dir, launch, {}, keep_last=1, keep_every=0,
                              saved_step=None) as writer:
            def here() -> None:
                progress = Progress(step=next(steps))
                state = training_state(progress, optimizer, scaler, launch)
                save_checkpoint(out_dir, progress.step, model, training_state=state, keep_last=1)

            def copied() -> float:
                waited = seconds(lambda: writer.save(Progress(step=next(steps)), model, optimizer,
                                                     scaler))
                writer.wait()
                return waited

            taken = in_turn(config.repeats, here=lambda: seconds(here), copied=copied)
    record(config, "checkpoint", model="gpt2", written_here_s=taken["here"],
           copied_s=taken["copied"], ratio=taken["here"] / taken["copied"])


def processor() -> str:
    """The name that the processor gives itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    config = parse_config(BenchConfig, description=__doc__)
    data = {"data", "encoders", "tokenise", "loader"}
    if not config.what or set(config.what) - data - {"memory", "checkpoint"}:
        raise UserError(f"asked to measure {' '.join(config.what) or 'nothing'}, expected data (or "
                        "of that only encoders, tokenise or loader), memory or checkpoint")
    record(config, "machine", cores=os.cpu_count(), processor=processor(),
           python=platform.python_version(), torch=torch.__version__)
    if data & set(config.what):
        bench_data(config)
    if "memory" in config.what:
        bench_memory(config)
    if "checkpoint" in config.what:
        bench_checkpoint(config)


if __name__ == "__main__":
    run_main(main)
