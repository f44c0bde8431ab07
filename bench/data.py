"""Measures the way of the data: tokenizing, the encoders, the loader."""

import itertools
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from bench.harness import BenchConfig, in_turn, peak_memory, python_script, record, seconds
from dataloader import TokenLoader
from minigpt2.config import UserError
from minigpt2.tokenizer import load_encoder, load_tokenizer
from model import GPT, GPTConfig
from pretrain_data.corpus import write_corpus
from pretrain_data.documents import file_source, local_files
from pretrain_data.pydocs import read_documents

SHARD_TOKENS = 5_000_000  # FineWeb's are 100M: a sample is to fill several
LOADER_BATCH, LOADER_LENGTH, LOADER_BATCHES = 32, 1024, 200
QUICK_DOCUMENTS = 1000


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
    return python_script("pretrain_data/fineweb_downloader.py", "--files", path, "--out-dir",
                         out_dir, "--workers", workers, "--shard-tokens", shard_tokens)


def write_once(path: Path, workers: int, shard_tokens: int) -> float:
    """Seconds from the file to the manifest; the start of all processes included."""
    with tempfile.TemporaryDirectory() as out:
        command = downloader(path, Path(out), workers, shard_tokens)
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def bench_tokenizing(config: BenchConfig, texts: list[str], path: Path, folder: Path) -> None:
    encoding = load_tokenizer()
    tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    shard_tokens = min(SHARD_TOKENS, tokens // 3)
    for workers in sorted({1, config.workers}):
        loops = BareLoops(texts, workers)
        taken = in_turn(config.rounds, bare=lambda loops=loops: seconds(loops.run),
                        shards=lambda workers=workers: write_once(path, workers, shard_tokens))
        loops.stop()
        record(config, "tokenize", workers=workers, documents=len(texts), tokens=tokens,
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
    taken = in_turn(config.rounds, **{
        name: lambda encode=encode: seconds(lambda: [encode(text) for text in texts])
        for name, encode in measures.items()})
    for name in encoders:
        record(config, "encoder", encoder=name, speedup=taken["tiktoken_list"] / taken[name])


def bench_loader(config: BenchConfig, data_dir: Path) -> None:
    loader = TokenLoader(data_dir, "train", sequence_length=LOADER_LENGTH,
                         micro_batch_size=LOADER_BATCH, vocab_size=50257,
                         total_batch_size=LOADER_BATCH * LOADER_LENGTH)

    def batches(clock: Callable[[], float]) -> float:
        begun = clock()
        for step in range(LOADER_BATCHES):
            loader.batch(step, 0)
        return LOADER_BATCHES * LOADER_BATCH * LOADER_LENGTH / (clock() - begun)

    rates = in_turn(config.rounds, wall=lambda: batches(time.perf_counter),
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

    taken = in_turn(4 * config.rounds, fixed=lambda: step(lambda: fixed),
                    stream=lambda: step(next_batch))
    record(config, "loader beside training", step_ms=1000 * taken["stream"],
           wait_ms=1000 * statistics.median(waits),
           wait_share_of_step=statistics.median(waits) / taken["stream"],
           step_on_stream_over_fixed=taken["stream"] / taken["fixed"])


def load_texts(config: BenchConfig) -> list[str]:
    limit = QUICK_DOCUMENTS if config.quick else config.max_documents
    if config.files is None:
        return [document.text for document in read_documents()][:limit]
    parts = file_source(local_files(config.files)).open_unit(0)
    texts = (text for part in parts for text in part.read() if text)
    return list(itertools.islice(texts, limit))


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
        if {"data", "tokenize"} & set(config.what):
            bench_tokenizing(config, texts, path, Path(name))
        if {"data", "loader"} & set(config.what):
            write_corpus({}, partial(file_source, [path]), Path(name) / "data", name="bench",
                         shard_tokens=min(500_000, sum(map(len, texts)) // 40))
            bench_loader(config, Path(name) / "data")
