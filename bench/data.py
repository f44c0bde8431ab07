"""Data: the encoder, files to shards against bare tiktoken loops, and the loader.

    python bench/data.py --files 'dir/*.parquet' --log image/logs/bench_data.jsonl
"""

import itertools
import pathlib
import sys
import tempfile
from dataclasses import dataclass
from functools import partial

import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from bench import harness
from bench.harness import BenchConfig, alternate, record, run_script
from dataloader import TokenLoader
from minigpt2.config import flag
from minigpt2.tokenizer import encode_to_array, load_tokenizer, repair
from pretrain_data.corpus import write_corpus
from pretrain_data.documents import file_source, select_files
from pretrain_data.pydocs import read_documents


@dataclass(frozen=True)
class DataBenchConfig(BenchConfig):
    files: str | None = flag(None, "documents, as a quoted glob or a folder (default: the "
                                   "demo's corpus)", is_path=True)
    max_documents: int = flag(40_000, "maximum number (with --quick: 1000)", minimum=1)
    workers: int = flag(2, "maximum number of tokenizing processes", minimum=1)


def load_texts(config: DataBenchConfig) -> list[str]:
    if config.files is None:
        texts = (document.text for document in read_documents())
    else:
        parts = file_source(select_files([config.files])[0]).open_unit(0)
        texts = (repair(text) for part in parts for text in part.read() if text)
    return list(itertools.islice(texts, 1000 if config.quick else config.max_documents))


def measure_encoder(config: DataBenchConfig, texts: list[str]) -> None:
    """The encoder of shards, to arrays, against tiktoken to lists."""
    reference, name = load_tokenizer().encode_ordinary, "tiktoken_array"
    taken = alternate(config.rounds, reference=lambda: list(map(reference, texts)),
                      array=lambda: list(map(encode_to_array, texts)))
    different = sum(encode_to_array(text).tolist() != reference(text) for text in texts)
    record(config, "encoder equality", encoder=name, documents=len(texts), different=different)
    record(config, "encoder", encoder=name, speedup=taken["reference"] / taken["array"])


def make_bare_loop(texts: list[str]) -> harness.Step:
    encode = load_tokenizer().encode_ordinary
    return lambda: sum(len(encode(text)) + 1 for text in texts)


def measure_shards(config: DataBenchConfig, texts: list[str], path: pathlib.Path) -> None:
    """A file to shards, start-up included, against a bare loop in memory for each process."""
    tokens = make_bare_loop(texts)()
    for workers in sorted({1, config.workers}):
        loops = [harness.start_worker(make_bare_loop, texts[i::workers]) for i in range(workers)]

        def bare(loops: list = loops) -> None:
            for future in [loop.submit(harness.run_step) for loop in loops]:
                future.result()

        def shards(workers: int = workers) -> None:
            run_script("pretrain_data/text_to_shards.py", {
                "workers": workers, "out_dir": tempfile.mkdtemp(dir=path.parent),
                "": path})  # after "--": a positional value

        taken = alternate(config.rounds, bare=bare, shards=shards)
        [loop.shutdown() for loop in loops]
        record(config, "tokenize", workers=workers, documents=len(texts), tokens=tokens,
               bare_tokens_per_sec=tokens / taken["bare"], ratio=taken["bare"] / taken["shards"],
               shards_tokens_per_sec=tokens / taken["shards"])


def measure_loader(config: DataBenchConfig, data_dir: pathlib.Path) -> None:
    B, T, batches = 32, 1024, 200
    loader = TokenLoader(data_dir, "train", sequence_length=T, micro_batch_size=B,
                         total_batch_size=B * T, vocab_size=50257)
    taken = alternate(config.rounds, loader=lambda: [loader.batch(i, 0) for i in range(batches)])
    record(config, "loader", tokens_per_sec=batches * B * T / taken["loader"])


def bench_data(config: DataBenchConfig) -> None:
    texts = load_texts(config)
    measure_encoder(config, texts)
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name) / "documents.parquet"  # like FineWeb's: zstd, groups of 1000
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd",
                                    row_group_size=1000)
        measure_shards(config, texts, path)
        write_corpus({}, partial(file_source, [path]), path.parent / "data", name="bench",
                     shard_tokens=max(2, min(500_000, sum(map(len, texts)) // 40)))
        measure_loader(config, path.parent / "data")


if __name__ == "__main__":
    harness.run_bench(bench_data, DataBenchConfig, __doc__)
