"""Rows of instructions or preferences: one file of a dataset on the hub; rows written as JSON."""

import gzip
import json
import tempfile
from pathlib import Path

from dataloader import read_rows
from minigpt2.config import UserError
from minigpt2.files import atomic_write
from minigpt2.hub import fetch, list_files


def download_rows(repo: str, commit: str, name: str, columns: tuple[str, ...], path: Path) -> None:
    """Downloads a file of a dataset (parquet, a JSON list, or .jsonl.gz), verifies it, and writes
    these columns of it to `path`, unless that exists. Raises UserError."""
    if path.is_dir():
        raise UserError(f"--out {path} is a folder, expected a file")
    if path.exists():  # it was renamed into place when it was complete
        print(f"{path} exists already: delete it to download it again")
        return
    [file] = list_files(repo, commit, name)
    with tempfile.TemporaryDirectory() as scratch:
        fetched = fetch(repo, commit, file, Path(scratch))
        if name.endswith(".gz"):
            fetched.write_bytes(gzip.decompress(fetched.read_bytes()))
        rows = [row for _, row in read_rows(fetched)]
    write_rows(path, [{column: row[column] for column in columns} for row in rows])


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes a JSON list, or JSON Lines if `path` ends with .jsonl. Creates its folder."""
    with atomic_write(path, text=True) as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            json.dump(rows, file, ensure_ascii=False, indent=0)
    print(f"wrote {path}: {len(rows):,} rows")
