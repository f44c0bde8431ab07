"""Downloads the benchmarks of evaluate.py: HellaSwag's validation split, LAMBADA's test split.

    python eval_data/benchmark_downloader.py

Writes eval_data/hellaswag_val.parquet (10,042 rows) and eval_data/lambada_test.jsonl (OpenAI's
variant, 5,153 rows), each verified. Does nothing for a file that is already there.
"""

import os
import pathlib
import sys
import tempfile
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import sha256_of
from minigpt2.hub import RetryPolicy, fetch, list_files


@dataclass(frozen=True)
class Benchmark:
    file: str  # written to --out-dir
    repo: str
    commit: str
    path: str  # in the repository
    sha256: str


BENCHMARKS = (
    Benchmark("hellaswag_val.parquet", "Rowan/hellaswag",
              "218ec52e09a7e7462a5400043bb9a69a41d06b76", "data/validation-00000-of-00001.parquet",
              "899813071e1e95efafec90f856e1987d2150fa4d020fc005df6962c259f660cd"),
    Benchmark("lambada_test.jsonl", "EleutherAI/lambada_openai",
              "900124bf3b8235c6daf21033af9948b3f07346c4", "data/lambada_test_en.jsonl",
              "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"))


@dataclass(frozen=True)
class BenchmarkConfig:
    out_dir: str = flag(str(pathlib.Path(__file__).resolve().parent), "folder for the files")
    retries: int = flag(5, "retries of a failed request, with exponential backoff", minimum=0)


def download_benchmark(benchmark: Benchmark, out_dir: pathlib.Path, retry: RetryPolicy) -> None:
    """Downloads and verifies a file, unless it is there already. Raises UserError."""
    target = out_dir / benchmark.file
    if target.exists():
        if sha256_of(target) != benchmark.sha256:
            raise UserError(f"{target} is not the file of {benchmark.repo}: delete it, or choose "
                            "another --out-dir")
        print(f"{target} is already complete")
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = str(pathlib.PurePosixPath(benchmark.path).parent)
    files = list_files(benchmark.repo, benchmark.commit, folder, retry)
    found = [file for file in files if file.path == benchmark.path]
    if not found:
        raise UserError(f"{benchmark.repo} has no file {benchmark.path}")
    with tempfile.TemporaryDirectory(dir=out_dir) as scratch:
        path = fetch(benchmark.repo, benchmark.commit, found[0], pathlib.Path(scratch), retry)
        if sha256_of(path) != benchmark.sha256:
            raise UserError(f"{benchmark.repo} {benchmark.path} has another SHA-256 than expected")
        os.replace(path, target)
    print(f"wrote {target}")


def main() -> None:
    config = parse_config(BenchmarkConfig, description=__doc__)
    for benchmark in BENCHMARKS:
        download_benchmark(benchmark, pathlib.Path(config.out_dir), RetryPolicy(config.retries))


if __name__ == "__main__":
    run_main(main)
