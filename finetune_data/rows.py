"""Rows of instructions or preferences: one file of a dataset on the hub, checked; written once."""

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from minigpt2.config import UserError
from minigpt2.files import atomic_write
from minigpt2.hub import RetryPolicy, fetch, find_commit, list_files


def download_rows(repo: str, commit: str, name: str, columns: Sequence[str], num_rows: int,
                  path: Path) -> None:
    """Downloads a file of a dataset (parquet, a JSON list, or .jsonl.gz) and writes its rows to
    `path`, unless that exists. Raises UserError, also for other columns or numbers of rows."""
    if path.exists():  # it was renamed into place when it was complete
        print(f"{path} exists already: delete it to download it again")
        return
    retry = RetryPolicy()
    commit = find_commit(repo, commit, retry)
    [file] = list_files(repo, commit, name, retry)
    with tempfile.TemporaryDirectory() as scratch:
        content = fetch(repo, commit, file, Path(scratch), retry).read_bytes()
    try:
        rows = [{column: row[column] for column in columns} for row in parse_rows(name, content)]
        if len(rows) != num_rows:
            raise ValueError(f"{len(rows):,} rows")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name} of {repo} at {commit} is not {num_rows:,} rows with "
                        f"{', '.join(columns)} ({error!r}): choose another --revision") from None
    write_rows(path, rows)
    print(f"wrote {path}: {num_rows:,} rows")


def parse_rows(name: str, content: bytes) -> list[dict]:
    if name.endswith(".parquet"):
        return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    if name.endswith(".jsonl.gz"):
        return [json.loads(line) for line in gzip.decompress(content).splitlines()]
    return json.loads(content)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSON list, or JSON Lines if `path` ends with .jsonl. Creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, text=True) as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            json.dump(rows, file, ensure_ascii=False, indent=0)
