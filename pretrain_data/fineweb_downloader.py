"""FineWeb as token shards: about ten billion tokens, 100M a shard, 20 GB on disk.

    python pretrain_data/fineweb_downloader.py                        # FineWeb sample-10BT
    python pretrain_data/fineweb_downloader.py --edu                  # FineWeb-Edu sample-10BT
    python pretrain_data/fineweb_downloader.py --parquet 'dir/*.parquet' --out-dir DIR

The set's parquet files are fetched from the Hugging Face hub one at a time and deleted once they
are tokenised, so that the disk holds the shards and one such file. Local parquet files with
FineWeb's `text` column work the same way.
"""

import glob
import pathlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from config import UserError, first_line, flag, parse_config, run_main
from corpus import default_workers, write_corpus

SAMPLE_FOLDER = "sample/10BT"
SCRATCH_FOLDER = ".download"  # in --out-dir: the parquet file being read
READ_ROWS = 1024


@dataclass(frozen=True)
class FineWebConfig:
    out_dir: str | None = flag(None, "where the shards go (default: a folder beside this script, "
                                     "named after the set)")
    shard_tokens: int = flag(100_000_000, "tokens per shard; the first shard is for validation",
                             minimum=2)
    max_tokens: int | None = flag(None, "stop after so many tokens (default: all)", minimum=1)
    workers: int = flag(0, "processes that tokenise; 0: one for every core", minimum=0)
    parquet: str | None = flag(None, "read these local files (a quoted glob) instead of the hub")
    edu: bool = flag(False, "FineWeb-Edu instead of FineWeb")
    revision: str = flag("main", "branch, tag or commit of the set on the hub")


def local_documents(pattern: str) -> tuple[dict, Iterator[str | None]]:
    """(source for the manifest, documents) of local parquet files, in the order of their names."""
    paths = [pathlib.Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise UserError(f"--parquet {pattern} matches no file (expected parquet files with a "
                        "`text` column; quote the pattern)")
    source = {"name": "parquet", "files": {path.name: path.stat().st_size for path in paths}}
    return source, (text for path in paths for text in read_texts(path))


def hub_documents(repo: str, revision: str,
                  scratch: pathlib.Path) -> tuple[dict, Iterator[str | None]]:
    """(source for the manifest, documents) of a sample on the hub, whose files pass through
    `scratch` one at a time. Raises UserError when the hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download  # slow to import, and not needed locally
    from huggingface_hub.errors import HTTPError  # HTTP status or no connection at all

    def unreachable(error: Exception) -> UserError:
        return UserError(f"cannot fetch {repo} from the Hugging Face hub ({first_line(error)}): "
                         "check the network and run again, or give local files with --parquet")

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
        entries = HfApi().list_repo_tree(repo, SAMPLE_FOLDER, repo_type="dataset", revision=commit)
        files = sorted(entry.path for entry in entries if entry.path.endswith(".parquet"))
    except (HTTPError, OSError) as error:
        raise unreachable(error) from None
    if not files:
        raise UserError(f"{repo} has no parquet file in {SAMPLE_FOLDER} at revision {commit}")

    def documents() -> Iterator[str | None]:
        for number, file in enumerate(files, 1):
            print(f"fetching {repo} {file} ({number} of {len(files)})", flush=True)
            try:
                path = pathlib.Path(hf_hub_download(repo, file, repo_type="dataset",
                                                    revision=commit, local_dir=scratch))
            except (HTTPError, OSError) as error:
                raise unreachable(error) from None
            yield from read_texts(path)
            path.unlink()

    return {"name": repo, "revision": commit, "folder": SAMPLE_FOLDER}, documents()


def read_texts(path: pathlib.Path) -> Iterator[str | None]:
    """The `text` column of a parquet file, a few rows in memory at a time. Raises UserError."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column `text`, only {file.schema_arrow.names}")
            for rows in file.iter_batches(READ_ROWS, columns=["text"]):
                yield from rows.column(0).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged or no parquet file: {first_line(error)}") from None


def main() -> None:
    config = parse_config(FineWebConfig, description=__doc__)
    folder = "parquet" if config.parquet else "fineweb-edu" if config.edu else "fineweb"
    out_dir = pathlib.Path(config.out_dir or pathlib.Path(__file__).resolve().parent / folder)
    if config.parquet:
        source, documents = local_documents(config.parquet)
    else:
        repo = "HuggingFaceFW/fineweb-edu" if config.edu else "HuggingFaceFW/fineweb"
        source, documents = hub_documents(repo, config.revision, out_dir / SCRATCH_FOLDER)
    write_corpus(documents, out_dir, name=folder, source=source, shard_tokens=config.shard_tokens,
                 max_tokens=config.max_tokens, workers=config.workers or default_workers())
    shutil.rmtree(out_dir / SCRATCH_FOLDER, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)
