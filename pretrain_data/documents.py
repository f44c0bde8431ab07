"""Documents: files of several formats, split into parts that any process can read.

A part has about PART_BYTES of text, so that memory does not grow with files: some rows of a
parquet row group, or a block of a JSON Lines file (plain or gzipped) or of a text file. Parts are
the same in every run over the same files: a build can resume at (unit, part). Invalid UTF-8 is read
as lone surrogates, which `tokenizer.repair` replaces. Which files are read: docs/data.md.
"""

import functools
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from minigpt2.config import UserError, first_line
from minigpt2.files import INVALID_UTF8, check_text, sha256_of
from minigpt2.shards import MANIFEST, PROGRESS

MEASURED_BYTES = 40_000_000  # of text that is read in advance, for its exact size
PART_BYTES = 4_000_000  # about one second of tokenizing, far more than it costs to send a part
MAX_RANGES = 16  # parts per row group; in groups over 64 MB, parts exceed PART_BYTES
TEXT_COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
RAW = (".jsonl", ".json", ".txt")  # zstd and gzip, in the others, halve text, or better
# Up to a space or line end after another character: GPT-2's pattern always splits there (\S lacks
# all that it calls whitespace, and more). Without these, up to a tab or CR: Chinese with CRLF
BORDER = re.compile(r".*\S(?=[ \n])|.*\S(?=[\t\r])", re.DOTALL)
POINTERS = (b"version https://git-lfs.github.com/", b"/annex/objects/")


@dataclass(frozen=True)
class Part:
    """A picklable function that reads some documents; None and "" are documents without text. If
    `continues`, the first text continues the last document of the previous part."""

    read: Callable[[], Iterable[str | None]]
    continues: bool = False


@dataclass
class Source:
    """The documents of a corpus in units, opened in order: all local files, or each of the hub."""

    num_units: int
    open_unit: Callable[[int], Iterator[Part]]
    text_bytes: int = 0  # roughly, to estimate disk space, and the tokens for validation


def memory_source(texts: list[str]) -> Source:
    """A source of documents in memory."""
    def open_unit(unit: int) -> Iterator[Part]:
        start, size = 0, 0
        for stop, text in enumerate(texts, 1):
            size += len(text)
            if size >= PART_BYTES or stop == len(texts):
                yield Part(functools.partial(list, texts[start:stop]))
                start, size = stop, 0

    return Source(1, open_unit, sum(map(len, texts)))


def local_source(inputs: Sequence[str], **options) -> tuple[dict, Source]:
    """(a description of the files of paths and globs, with SHA-256; their source). The options are
    those of `open_parts`. Raises UserError for what is not text, if a first part shows it."""
    paths, skipped = select_files(inputs)
    print(f"reading {len(paths):,} files: {count_kinds(map(file_format, paths))}; "
          f"skipped: {count_kinds(skipped.values())}")
    source = file_source(paths, **options)  # it notices changes from now on
    for path in paths:
        size, parts = 0, open_parts(path, **options)  # size: of the text of this file
        for number, part in enumerate(parts):
            if number and source.text_bytes + size > MEASURED_BYTES:  # the others are as large
                raw_size = path.stat().st_size * (1 if file_format(path) in RAW else 2)
                left = (1 + sum(1 for _ in parts) if file_format(path) == ".parquet" else
                        max(0, raw_size // PART_BYTES - number))
                size += size * left // number
                break
            size += sum(len(text.encode("utf-8", "surrogatepass")) for text in part.read() if text)
        source.text_bytes += size
    root = os.path.commonpath([path.parent.absolute() for path in paths])
    with ThreadPoolExecutor() as pool:
        files = {os.path.relpath(path, root): digest
                 for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)}
    return {"name": "text", **options, "files": files}, source


def count_kinds(kinds: Iterable[str]) -> str:
    """["a", "b", "a"] -> "2 a, 1 b"."""
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(Counter(kinds).items())) or "none"


def select_files(inputs: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The files of paths and globs; why others are skipped. Raises UserError if there are none."""
    skipped, roots = {}, []
    for pattern in inputs:  # an existing path is not a pattern, even if it has brackets
        found = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not found:
            raise UserError(f"{pattern} does not exist and matches no file")
        roots += found
    paths = sorted(set(walk(roots, skipped)), key=lambda path: Path(os.path.abspath(path)))
    if not paths:
        raise UserError(f"{' '.join(inputs)}: no file to read (skipped: "
                        f"{count_kinds(skipped.values())}), expected {', '.join(SUFFIXES)}")
    return paths, skipped


def walk(roots: list[str], skipped: dict[str, str]) -> Iterator[Path]:
    """The files to read, by the shortest of several paths to one. Adds others to `skipped`."""
    seen, level = {}, set(map(os.path.normpath, roots))
    while level:
        below = set()
        for path in sorted(level, key=lambda path: (path.count(os.sep), path)):
            if seen.setdefault(os.path.realpath(path), path) != path:
                skipped[path] = "a link to another"
            elif os.path.isdir(path):
                inside = {os.path.join(path, name) for name in os.listdir(path)}  # may fail
                hidden = {one for one in inside if os.path.basename(one).startswith(".")}
                skipped |= dict.fromkeys(hidden, "hidden")
                below |= inside - hidden
            elif (not file_format(path) or os.path.basename(path) in (MANIFEST, PROGRESS)
                  or (os.path.exists(path) and not os.path.isfile(path))):  # a pipe
                skipped[path] = "of another format"
            else:  # a broken link fails when it is read
                yield Path(path)
        level = below


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes with a file: its size, and the times of the last change of content and inode."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_source(paths: list[Path], **options) -> Source:
    """A source of local files, read in the given order with the options of `open_parts`. A file
    that changes from now on, until it is read, raises UserError."""
    stamps = list(map(stamp_of, paths))

    def open_unit(unit: int) -> Iterator[Part]:
        for path, stamp in zip(paths, stamps, strict=True):
            for part in open_parts(path, **options):
                yield Part(functools.partial(read_checked, path, stamp, part.read), part.continues)

    return Source(1, open_unit)


def read_checked(path: Path, stamp: tuple, read: Callable) -> Iterator[str | None]:
    """The documents of a part. Raises UserError if its file has changed by the time of reading."""
    yield from read()
    if stamp_of(path) != stamp:
        raise UserError(f"{path} changed while it was read: run again when it is final")


def file_format(path: str | Path) -> str:
    """The one of SUFFIXES that a file has, in any letter case, or ""."""
    name = os.path.basename(path).lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def open_parts(path: Path, separator: str | None = None, column: str = TEXT_COLUMN,
               ) -> Iterator[Part]:
    """The parts of one file, in order. `separator` splits a text file into documents, `column` is
    that of the text in others. Raises UserError for a damaged file."""
    try:
        with open(path, "rb") as file:
            if file.read(256).startswith(POINTERS):
                raise UserError(f"{path} is a pointer of Git LFS or git-annex, not the data: fetch "
                                "it with `git lfs pull` or `git annex get`")
        kind = file_format(path)
        yield from (text_parts(path, separator) if kind == ".txt" else parquet_parts(path, column)
                    if kind == ".parquet" else json_lines_parts(path, column))
    except (OSError, EOFError, zlib.error) as error:  # gzip raises two of them
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def open_parquet(path: Path, text_column: str) -> pyarrow.parquet.ParquetFile:
    """Raises UserError if this is not a parquet file with this text column."""
    try:
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)  # reads page by page
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not a parquet file: {first_line(error)}") from None
    kinds = dict(zip(file.schema_arrow.names, map(str, file.schema_arrow.types), strict=True))
    kind = kinds.get(text_column, "").removeprefix("dictionary<values=")  # of a categorical one
    if not kind.startswith(("string", "large_string")):
        file.close()
        raise UserError(f"{path} has no string column {text_column}, only {kinds!s:.200}: "
                        "--text-column names the one with the text")
    return file


def parquet_parts(path: Path, text_column: str) -> Iterator[Part]:
    """Splits large row groups into at most MAX_RANGES ranges of rows. To read one, those before it
    are decoded and dropped, which costs a twentieth of tokenizing them."""
    with open_parquet(path, text_column) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group)  # lists nested columns as several leaf columns
            size = sum(column.total_uncompressed_size  # of the text, in bytes
                       for column in map(rows.column, range(rows.num_columns))
                       if column.path_in_schema == text_column)
            step = -(-rows.num_rows // min(max(1, size // PART_BYTES), MAX_RANGES)) or 1
            for start in range(0, rows.num_rows, step):
                stop = min(start + step, rows.num_rows)
                yield Part(functools.partial(read_texts, path, text_column, group, start, stop))


def read_texts(path: Path, column: str, group: int, start: int, stop: int) -> Iterator[str | None]:
    """The texts of rows [start, stop) of a row group. Raises UserError if it is damaged."""
    with open_parquet(path, column) as file:
        batches = file.iter_batches(min(512, stop - start), row_groups=[group],
                                    columns=[column], use_threads=False)
        texts = itertools.chain.from_iterable(  # bytes: parquet does not check that they are UTF-8
            batch.column(0).cast(pyarrow.large_binary()).to_pylist() for batch in batches)
        try:
            for text in itertools.islice(texts, start, stop):
                yield None if text is None else text.decode("utf-8", INVALID_UTF8)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged in row group {group}: {first_line(error)}; replace "
                            "it and run again") from None


def json_lines_parts(path: Path, column: str) -> Iterator[Part]:
    opener = gzip.open if file_format(path).endswith(".gz") else open
    number = 1  # of the first line of the block
    with opener(path, "rb") as file:
        while lines := file.readlines(PART_BYTES):
            yield Part(functools.partial(parse_json_lines, path, column, number, b"".join(lines)))
            number += len(lines)


def parse_json_lines(path: Path, column: str, first: int, block: bytes) -> Iterator[str | None]:
    """The texts of a block of JSON Lines. Raises UserError for an invalid line."""
    content = block.decode("utf-8", INVALID_UTF8)
    check_text(path, content, PART_BYTES * (first > 1))
    for number, line in enumerate(content.split("\n"), first):
        if not line.strip():
            continue
        row = None
        try:
            row = json.loads(line.removeprefix("\ufeff"))  # a byte-order mark
            text = row[column]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = 0  # not a string
        if not isinstance(text, str | None):
            found = (f"has the keys {', '.join(row)!r:.200}" if isinstance(row, dict)
                     and column not in row else f"is {line[:60]!r}")
            raise UserError(f"{path} line {number} {found}, expected a JSON object with a string "
                            f'under "{column}" (--text-column names another key)')
        yield text


def text_parts(path: Path, separator: str | None) -> Iterator[Part]:
    """A text file is one document, or several with `separator` between them. It is cut after a
    separator or else between a word and whitespace: GPT-2's pattern always splits there, so the
    cuts do not change the token ids."""
    newline = None if "\n" in (separator or "") else ""  # None: \r\n and \r are line ends, too
    with open(path, encoding="utf-8-sig", errors=INVALID_UTF8, newline=newline) as file:
        text, continues = "", False
        while block := file.read(PART_BYTES):
            check_text(path, block, min(PART_BYTES, file.buffer.tell() - len(block)))
            text, start = text + block, len(text)
            if len(block) < PART_BYTES:  # the end of the file
                break
            end = len(text) - len(text.split(separator)[-1]) if separator else 0  # of a document
            # if no separator ends in the text, none begins before this border
            border = BORDER.match(text, max(start - 1, 0), len(text) - len(separator or ""))
            if cut := end or (border and border.end()):
                yield text_part(text[:cut], continues, separator)
                text, continues = text[cut:], not end
        if text or not continues:
            yield text_part(text, continues, separator)


def text_part(text: str, continues: bool, separator: str | None) -> Part:
    """The documents of a piece of a file, of which the first may continue the previous piece. Line
    ends next to a separator, and then at the ends of the file, are dropped."""
    texts = [text]
    if separator:
        first, *others = text.split(separator)
        texts = [first.rstrip("\r\n") if continues else first.strip("\r\n"),
                 *(other.strip("\r\n") for other in others)]
        texts = [text for i, text in enumerate(texts) if text or (continues and i == 0)]
    return Part(functools.partial(list, texts), continues)
