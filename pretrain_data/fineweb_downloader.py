"""Tokenizes FineWeb into shards: about 10 billion tokens, 100M per shard, 20 GB on disk.

    python pretrain_data/fineweb_downloader.py                        # FineWeb sample-10BT
    python pretrain_data/fineweb_downloader.py --edu                  # FineWeb-Edu sample-10BT
    python pretrain_data/fineweb_downloader.py --verify --out-dir DIR

Parquet files are downloaded from the Hugging Face hub one at a time and deleted once tokenized. The
same command resumes an interrupted build, or one whose damaged shards were deleted; a larger
--max-tokens extends a finished one. More in docs/data.md. Your own text: text_to_shards.py.
"""

import functools
import pathlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import flag, parse_config, run_main
from minigpt2.hub import fetch, list_files
from pretrain_data.corpus import SHARD_TOKENS, verify_corpus, write_corpus
from pretrain_data.documents import Part, Source, open_parts

SAMPLE_FOLDER = "sample/10BT"
FINEWEB = ("HuggingFaceFW/fineweb", "9bb295ddab0e05d785b879661af7260fed5140fc")  # v1.4.0
FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")
TEXT_RATIO = 1.5  # bytes of text per byte of FineWeb's parquet files: 10.3B tokens in 30 GB


@dataclass(frozen=True)
class FineWebConfig:
    out_dir: str | None = flag(None, "folder of shards (default: beside this script)", is_path=True)
    shard_tokens: int = flag(SHARD_TOKENS, "tokens per shard, the first for validation", minimum=2)
    max_tokens: int | None = flag(None, "stop after this many tokens (default: all)", minimum=1)
    edu: bool = flag(False, "FineWeb-Edu instead of FineWeb")
    workers: int = flag(0, "tokenizing processes; 0: one per core", minimum=0)
    verify: bool = flag(False, "only compare the shards in --out-dir with their checksums")


def hub_source(repo: str, commit: str, scratch: pathlib.Path) -> Source:
    """The 10BT sample of a dataset on the hub, one unit per file. `scratch` holds the file that is
    read, and the one before it, where the incomplete shard may begin. Raises UserError."""
    files = list_files(repo, commit, f"{SAMPLE_FOLDER}/*.parquet")

    def open_unit(unit: int) -> Iterator[Part]:
        for done in files[: max(0, unit - 1)]:
            (scratch / done.path).unlink(missing_ok=True)
        print(f"reading {repo} {files[unit].path} ({unit + 1} of {len(files)})")
        return open_parts(fetch(repo, commit, files[unit], scratch))

    return Source(len(files), open_unit, int(TEXT_RATIO * sum(file.size for file in files)))


def main() -> None:
    config = parse_config(FineWebConfig, description=__doc__)
    name = "fineweb-edu" if config.edu else "fineweb"
    out_dir = pathlib.Path(config.out_dir or pathlib.Path(__file__).resolve().parent / name)
    if config.verify:
        return verify_corpus(out_dir)
    repo, commit = FINEWEB_EDU if config.edu else FINEWEB
    description = {"name": repo, "revision": commit, "folder": SAMPLE_FOLDER}
    scratch = out_dir / ".download"
    write_corpus(description, functools.partial(hub_source, repo, commit, scratch), out_dir,
                 name=name, shard_tokens=config.shard_tokens, max_tokens=config.max_tokens,
                 workers=config.workers)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
