"""Rows of a training set: read from a file, and split into training and held-out rows."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from minigpt2.config import UserError, first_line


def read_rows(path: Path) -> list[tuple[str, object]]:
    """The rows of a JSON list, a JSON Lines file or a parquet file, each with its place ("x.jsonl
    line 3") for error messages. Raises UserError naming what cannot be parsed, OSError."""
    content = path.read_bytes()
    if content.startswith(b"PAR1"):
        try:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        except (ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is not a whole parquet file: {first_line(error)}") from None
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from None
        if not text.lstrip().startswith("["):
            return [(f"{path} line {number}", parse_json(path, line, number))
                    for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = parse_json(path, text, 1)
    return [(f"{path} row {number}", row) for number, row in enumerate(rows, 1)]


def parse_json(path: Path, text: str, line: int):
    """The value of JSON text that begins in the given line of a file. Raises UserError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place, problem = f"line {line + error.lineno - 1} column {error.colno}", error.msg
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deep
        place, problem = f"line {line}", first_line(error)
    raise UserError(f"{path} {place} is not JSON ({problem}); expected a JSON list, or JSON Lines "
                    "with one object per line, or parquet")


def normalize(text: str) -> str:
    """The text without differences in case and white space."""
    return " ".join(text.casefold().split())


def split_by_content(contents: Sequence[str], num_held_out: int, seed: int,
                     ) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows) as indices, at most num_held_out of the latter. Rows of equal
    content are on the same side: rows are held out in the order of a hash of the seed and their
    content. Content with more than num_held_out rows is for training only."""
    groups: dict[bytes, list[int]] = {}
    for i, content in enumerate(contents):
        text = json.dumps([seed, content])  # ASCII
        groups.setdefault(hashlib.sha256(text.encode()).digest(), []).append(i)
    held_out: set[int] = set()
    for digest in sorted(groups):
        if len(held_out) + len(groups[digest]) <= num_held_out:
            held_out.update(groups[digest])
    return [i for i in range(len(contents)) if i not in held_out], sorted(held_out)
