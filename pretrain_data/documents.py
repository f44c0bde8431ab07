"""Where the documents of a corpus come from: files, cut into parts that any process can read.

A part is the unit of work, and of restart: a row group of a parquet file, a block of lines of a
JSON Lines file (plain or gzipped), a block of a text file. Parts are small (about PART_BYTES of
text), so that memory depends neither on the size of a file nor on that of its row groups, and they
are the same for every run over the same files, so that (unit, part) is a position one can go back
to. Files are read as UTF-8; bytes that are not become lone surrogates, which `tokenizer.py` repairs
and counts like any others.
"""

import codecs
import functools
import glob
import gzip
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet

from minigpt2.config import UserError, first_line

PART_BYTES = 4_000_000  # a second's work: far above the cost of handing it over
MOST_RANGES = 16  # of a row group: parts are larger than PART_BYTES in one of over 64 MB
TEXT_COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
NOT_UTF8 = "surrogateescape"  # what to do with bytes that are no UTF-8


@dataclass(frozen=True)
class Part:
    """Documents, by a picklable function that reads them; None and "" are documents without text.

    `continues`: the first text goes on with the last document of the part before."""

    read: Callable[[], Iterable[str | None]]
    continues: bool = False


@dataclass
class Source:
    """What a corpus is made from: units (all local files are one; each file of the hub is one),
    opened one after the other, and released when their documents are on disk as tokens."""

    num_units: int
    open_unit: Callable[[int], Iterator[Part]]
    text_bytes: int  # roughly, in all units: for the estimate of disk space
    scratch_bytes: int = 0  # needed beside the shards while it runs
    release_unit: Callable[[int], None] = field(default=lambda unit: None)


def memory_source(texts: list[str]) -> Source:
    """Documents that are already in memory."""
    def parts(unit: int) -> Iterator[Part]:
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= PART_BYTES:
                yield Part(functools.partial(list, batch))
                batch, size = [], 0
        yield Part(functools.partial(list, batch))

    return Source(1, parts, sum(map(len, texts)))


def local_files(pattern: str) -> list[Path]:
    """The files of a glob or a folder, in the order of their names. Raises UserError."""
    if Path(pattern).is_dir():
        paths = [p for p in Path(pattern).rglob("*") if p.name.endswith(SUFFIXES)]
    else:
        paths = [Path(path) for path in glob.glob(pattern, recursive=True)]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise UserError(f"--files {pattern} matches no file (expected {', '.join(SUFFIXES)}; quote "
                        "the pattern)")
    return sorted(paths)


def describe_files(paths: list[Path]) -> dict:
    """What tells local files from others, for a manifest: names, sizes, and checksums of the first
    and last 64 KiB. Raises UserError for a format that is not known."""
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} is none of the files that can be read, "
                            f"which end in {', '.join(SUFFIXES)}")
    root = os.path.commonpath([path.parent for path in paths])
    return {"name": "files", "files": {os.path.relpath(p, root): fingerprint(p) for p in paths}}


def fingerprint(path: Path) -> list:
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        return [size, hashlib.sha256(head + file.read()).hexdigest()]


def file_source(paths: list[Path]) -> Source:
    """Local files, in the order given."""
    return Source(1, lambda unit: itertools.chain.from_iterable(map(open_parts, paths)),
                  sum(map(text_bytes, paths)))


def open_parts(path: Path) -> Iterator[Part]:
    """The parts of one file, in order. Raises UserError for a file that cannot be read."""
    try:
        if path.name.endswith(".parquet"):
            yield from parquet_parts(path)
        elif path.name.endswith(".txt"):
            yield from text_parts(path)
        else:
            yield from json_lines_parts(path)
    except (OSError, EOFError, zlib.error) as error:  # gzip's ways to say that a file is damaged
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def text_bytes(path: Path) -> int:
    """About how much text a file holds."""
    if path.name.endswith(".parquet"):
        with open_parquet(path) as file:
            return sum(text_size(file, group) for group in range(file.num_row_groups))
    return path.stat().st_size * (3 if path.name.endswith(".gz") else 1)


# ---------------------------------------------------------------------------------- parquet


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Raises UserError for a file that is no parquet file or has no text column."""
    try:
        # a buffer: a column chunk is read page by page, and not whole, however large it is
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or no parquet file: {first_line(error)}") from None
    kind = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)).get(TEXT_COLUMN)
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        file.close()
        found = f"one of {kind}" if kind else f"only {file.schema_arrow.names}"
        raise UserError(f"{path} has no column `{TEXT_COLUMN}` of strings, {found}")
    return file


def parquet_parts(path: Path) -> Iterator[Part]:
    """Row groups, the large ones in at most MOST_RANGES ranges of rows: to read a range, what is
    before it in its group is decoded and dropped, at a twentieth of the cost of tokenizing it."""
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            ranges = min(max(1, text_size(file, group) // PART_BYTES), MOST_RANGES)
            rows = max(1, -(-num_rows // ranges))
            for start in range(0, num_rows, rows):
                yield Part(functools.partial(read_texts, path, group, start,
                                             min(start + rows, num_rows)))


def text_size(file: pyarrow.parquet.ParquetFile, group: int) -> int:
    """The bytes of text in a row group."""
    metadata = file.metadata.row_group(group)  # its columns are the leaves of nested ones, too
    columns = map(metadata.column, range(metadata.num_columns))
    return sum(column.total_uncompressed_size for column in columns
               if column.path_in_schema == TEXT_COLUMN)


def read_texts(path: Path, group: int, start: int, stop: int) -> Iterator[str | None]:
    """Texts start .. stop of a row group. Raises UserError when it is damaged."""
    with open_parquet(path) as file:
        position = 0
        try:
            for batch in file.iter_batches(min(512, stop - start), row_groups=[group],
                                           columns=[TEXT_COLUMN], use_threads=False):
                low, high = max(0, start - position), min(len(batch), stop - position)
                position += len(batch)
                if low < high:
                    yield from strings(batch.column(0).slice(low, high - low))
                if position >= stop:
                    return
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged in row group {group}: {first_line(error)}; replace "
                            "it and run again") from None


def strings(column: pyarrow.Array) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # parquet does not promise that strings are UTF-8
        raw = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", NOT_UTF8) for text in raw]


# ---------------------------------------------------------------------- lines and plain text


def json_lines_parts(path: Path) -> Iterator[Part]:
    opener = gzip.open if path.name.endswith(".gz") else open
    first = 1  # number of the block's first line
    with opener(path, "rb") as file:
        while lines := file.readlines(PART_BYTES):
            yield Part(functools.partial(parse_json_lines, path, first, b"".join(lines)))
            first += len(lines)


def parse_json_lines(path: Path, first: int, block: bytes) -> Iterator[str | None]:
    """The texts of a block of JSON Lines. Raises UserError for a line that is something else."""
    if first == 1:
        block = block.removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", NOT_UTF8))[TEXT_COLUMN]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = 0
        if not isinstance(text, str | None):
            raise UserError(f"{path} line {number} is {line[:60]!r}, expected a JSON object with "
                            f'text under "{TEXT_COLUMN}"')
        yield text


def text_parts(path: Path) -> Iterator[Part]:
    """A text file is one document. It is cut only where a word ends and white space begins: there
    GPT-2's pattern always cuts too, so that the ids are those of the whole."""
    with open(path, encoding="utf-8", errors=NOT_UTF8, newline="") as file:
        text, continues = "", False
        while block := file.read(PART_BYTES):
            whole = len(block) < PART_BYTES  # the end of the file
            cut = 0 if whole else last_border(text + block, len(text))
            text += block
            if cut:
                yield Part(functools.partial(list, [text[:cut]]), continues)
                text, continues = text[cut:], True
        if text or not continues:
            yield Part(functools.partial(list, [text]), continues)


def last_border(text: str, start: int) -> int:
    """The last position >= start with white space at it and none in front of it; 0 for none. (What
    Python takes for white space is all that the pattern does, and a little more.)"""
    for position in range(len(text) - 1, max(start, 1) - 1, -1):
        if text[position] in " \n" and not text[position - 1].isspace():
            return position
    return 0
