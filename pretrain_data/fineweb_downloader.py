"""FineWeb as token shards: about ten billion tokens, 100M a shard, 20 GB on disk.

    python pretrain_data/fineweb_downloader.py                        # FineWeb sample-10BT
    python pretrain_data/fineweb_downloader.py --edu                  # FineWeb-Edu sample-10BT
    python pretrain_data/fineweb_downloader.py --pretokenized         # shards ready-made, llm.c's
    python pretrain_data/fineweb_downloader.py --files 'dir/*.parquet' --out-dir DIR
    python pretrain_data/fineweb_downloader.py --verify --out-dir DIR

The set's parquet files are fetched from the Hugging Face hub one at a time and deleted once they
are tokenized, so that the disk holds the shards and one such file. Local files work the same way:
parquet and JSON Lines (also gzipped) with a `text` column, and plain text, a file a document.

A run that was stopped, by whatever means, is gone on with by giving the command again; so is a
finished one, with a larger --max-tokens. `--verify` compares the shards with their checksums; bad
ones are deleted by hand, and the command makes them again.
"""

import functools
import itertools
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import sha256_of
from minigpt2.hub import RetryPolicy, fetch, find_commit, list_files
from minigpt2.progress import progress_bar
from minigpt2.shards import (
    MANIFEST,
    PROGRESS,
    open_shard,
    read_record,
    write_manifest,
    write_progress,
)
from pretrain_data.corpus import (
    check_disk,
    check_same,
    default_workers,
    folder_lock,
    verify_corpus,
    write_corpus,
)
from pretrain_data.documents import (
    Part,
    Source,
    describe_files,
    file_source,
    local_files,
    open_parts,
)

SAMPLE_FOLDER = "sample/10BT"
SCRATCH = ".download"  # in --out-dir: the file being read
FINEWEB = ("HuggingFaceFW/fineweb", "9bb295ddab0e05d785b879661af7260fed5140fc")  # v1.4.0
FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")
PRETOKENIZED = ("kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c")
PRETOKENIZED_NAME = re.compile(r"fineweb_(val|train)_\d{6}\.bin")
TEXT_PER_BYTE = 1.5  # text in a byte of FineWeb's parquet files: 10.3B tokens in 30 GB


@dataclass(frozen=True)
class FineWebConfig:
    out_dir: str | None = flag(None, "where the shards go (default: a folder beside this script, "
                                     "named after the set)")
    shard_tokens: int = flag(100_000_000, "tokens per shard; the first shard is for validation",
                             minimum=2)
    max_tokens: int | None = flag(None, "stop after so many tokens (default: all)", minimum=1)
    workers: int = flag(0, "processes that tokenize; 0: one for every core", minimum=0)
    encoder: Literal["tiktoken", "gigatoken"] = flag(
        "tiktoken", "gigatoken (pip install gigatoken) gives the same ids faster; one document in "
                    "a hundred is checked")
    files: str | None = flag(None, "read local files instead of the hub: a quoted glob or a folder")
    parquet: str | None = flag(None, "the same as --files")
    edu: bool = flag(False, "FineWeb-Edu instead of FineWeb")
    pretokenized: bool = flag(False, "fetch FineWeb already tokenized, in llm.c's format")
    revision: str | None = flag(None, "branch, tag or commit of the set on the hub (default: the "
                                      "one this script was written for)")
    retries: int = flag(8, "repetitions of a request that failed", minimum=0)
    retry_wait: float = flag(2.0, "seconds before the first repetition, doubled each time",
                             minimum=0)
    verify: bool = flag(False, "only compare the shards in --out-dir with their checksums")


def hub_source(repo: str, commit: str, scratch: pathlib.Path, patience: RetryPolicy) -> Source:
    """The sample of a set on the hub: a unit is a file, in `scratch` from when it is opened until
    it is released. Raises UserError."""
    files = [file for file in list_files(repo, commit, SAMPLE_FOLDER, patience)
             if file.path.endswith(".parquet")]
    if not files:
        raise UserError(f"{repo} has no parquet file in {SAMPLE_FOLDER} at {commit}")

    def open_unit(unit: int) -> Iterator[Part]:
        print(f"fetching {repo} {files[unit].path} ({unit + 1} of {len(files)})", flush=True)
        return open_parts(fetch(files[unit], scratch, patience))

    return Source(len(files), open_unit,
                  text_bytes=int(TEXT_PER_BYTE * sum(file.size for file in files)),
                  scratch_bytes=max(file.size for file in files),
                  release_unit=lambda unit: (scratch / files[unit].path).unlink())


def fetch_pretokenized(out_dir: pathlib.Path, commit: str, max_tokens: int | None,
                       patience: RetryPolicy) -> None:
    """Ready-made shards in llm.c's format, each checked, and their manifest; with max_tokens, as
    many whole shards as that takes. Raises UserError."""
    repo = PRETOKENIZED[0]
    shards = [(file, match[1]) for file in list_files(repo, commit, "", patience)
              if (match := PRETOKENIZED_NAME.fullmatch(file.path))]
    shards.sort(key=lambda shard: (shard[1] != "val", shard[0].path))  # validation first
    if max_tokens is not None:
        ends = itertools.accumulate(file.size // 2 for file, _ in shards)
        shards = shards[: max(2, 1 + sum(end < max_tokens for end in ends))]
    if {split for _, split in shards} != {"val", "train"}:
        raise UserError(f"{repo} at {commit} lacks validation or training shards, files called "
                        f"{PRETOKENIZED_NAME.pattern}")
    source = {"name": repo, "revision": commit}
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        for name in (PROGRESS, MANIFEST):
            if (out_dir / name).exists():
                check_same(out_dir, read_record(out_dir / name), {"source": source}, None)
        write_progress(out_dir, {"source": source, "shards": []})  # unfinished from here on
        (out_dir / MANIFEST).unlink(missing_ok=True)
        entries = []
        check_disk(out_dir, sum(file.size for file, _ in shards
                                if not (out_dir / file.path).exists()))
        for file, split in progress_bar(len(shards), 0, "fetching", unit="shard", over=shards):
            path = fetch(file, out_dir, patience)
            entries.append({"file": file.path, "split": split, "tokens": len(open_shard(path)),
                            "sha256": file.sha256 or sha256_of(path)})
        manifest = {"source": source, "tokens": sum(entry["tokens"] for entry in entries),
                    "shards": entries}
        write_manifest(out_dir, manifest)
        (out_dir / PROGRESS).unlink()
    shutil.rmtree(out_dir / ".cache", ignore_errors=True)  # the client's notes on its downloads
    print(f"wrote {out_dir}: {manifest['tokens']:,} tokens, {len(entries)} shards, the first for "
          "validation")


def main() -> None:
    config = parse_config(FineWebConfig, description=__doc__)
    pattern = config.files or config.parquet
    if sum(map(bool, (pattern, config.edu, config.pretokenized))) > 1:
        raise UserError("--files (or --parquet), --edu and --pretokenized exclude one another")
    folder = ("files" if pattern else "fineweb-edu" if config.edu
              else "fineweb-pretokenized" if config.pretokenized else "fineweb")
    out_dir = pathlib.Path(config.out_dir or pathlib.Path(__file__).resolve().parent / folder)
    patience = RetryPolicy(config.retries, config.retry_wait)
    if config.verify:
        verify_corpus(out_dir)
        return
    repo, revision = PRETOKENIZED if config.pretokenized else FINEWEB_EDU if config.edu else FINEWEB
    if config.pretokenized:
        commit = find_commit(repo, config.revision or revision, patience)
        fetch_pretokenized(out_dir, commit, config.max_tokens, patience)
        return
    if pattern:
        paths = local_files(pattern)
        description, open_source = describe_files(paths), functools.partial(file_source, paths)
    else:
        scratch = out_dir / SCRATCH
        commit = find_commit(repo, config.revision or revision, patience)
        description = {"name": repo, "revision": commit, "folder": SAMPLE_FOLDER}
        open_source = functools.partial(hub_source, repo, commit, scratch, patience)
    write_corpus(description, open_source, out_dir, name=folder, shard_tokens=config.shard_tokens,
                 max_tokens=config.max_tokens, workers=config.workers or default_workers(),
                 encoder=config.encoder)
    shutil.rmtree(out_dir / SCRATCH, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
