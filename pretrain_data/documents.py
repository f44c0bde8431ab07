"""Documents: files of several formats, split into parts that any process can read.

A part is some rows of a parquet row group, a block of lines of a JSON Lines file (plain or gzipped)
or a block of a text file. It has about PART_BYTES of text, so memory does not grow with the size of
files. Parts are the same in every run over the same files: a build can resume at (unit, part).
Invalid UTF-8 is read as lone surrogates, which `tokenizer.repair` replaces; a text file with too
many of them is refused.
"""

import codecs
import functools
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from minigpt2.config import UserError, first_line
from minigpt2.files import INVALID_UTF8, check_text, text_encoding
from minigpt2.tokenizer import EOT_TEXT

PART_BYTES = 4_000_000  # about one second of tokenizing, far more than it costs to send a part
MAX_RANGES = 16  # parts per row group; in groups over 64 MB, parts exceed PART_BYTES
TEXT_COLUMN = "text"
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
HEAD_BYTES = 1 << 16  # enough to tell what a file is
ERRORS = {"utf-8": INVALID_UTF8, "utf-8-sig": INVALID_UTF8}  # codec error handlers


@dataclass(frozen=True)
class Part:
    """A picklable function that reads some documents; None and "" are documents without text. If
    `continues`, the first text continues the last document of the previous part. `file` counts the
    local files up to the one that is read."""

    read: Callable[[], Iterable[str | None]]
    continues: bool = False
    file: int = 0


@dataclass
class Source:
    """The documents of a corpus, in units: all local files together, or each file of the hub. Units
    are opened in order."""

    num_units: int
    open_unit: Callable[[int], Iterator[Part]]
    text_bytes: int  # roughly, to estimate the disk space for the shards
    scratch_bytes: int = 0  # additional disk space needed during the build


def memory_source(texts: list[str]) -> Source:
    """A source of documents in memory."""
    def open_unit(unit: int) -> Iterator[Part]:
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= PART_BYTES:
                yield Part(functools.partial(list, batch))
                batch, size = [], 0
        yield Part(functools.partial(list, batch))

    return Source(1, open_unit, sum(map(len, texts)))


def file_format(path: str | Path) -> str:
    """The one of SUFFIXES that a file has, in any letter case, or ""."""
    name = os.path.basename(path).lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def check_head(path: Path) -> None:
    """Raises UserError if the first bytes of a file show that it cannot be read as text."""
    with open(path, "rb") as file:
        encoding = text_encoding(path, head := file.read(HEAD_BYTES))
    if (kind := file_format(path)) in (".txt", ".json", ".jsonl"):
        encoding = encoding if kind == ".txt" else "utf-8"
        decode = codecs.getincrementaldecoder(encoding)  # the last character may be incomplete
        check_text(path, decode(ERRORS.get(encoding, "replace")).decode(head))


def text_bytes(path: Path) -> int:
    """A rough estimate of the text in a file, in bytes."""
    if file_format(path) == ".parquet":
        with open_parquet(path) as file:
            return sum(text_size(file, group) for group in range(file.num_row_groups))
    return path.stat().st_size * (3 if file_format(path).endswith(".gz") else 1)


def open_parts(path: Path, split_eot: bool = False) -> Iterator[Part]:
    """The parts of one file, in order. With `split_eot`, a text file is split into documents at
    <|endoftext|>. Raises UserError for a damaged file."""
    kinds = {".parquet": parquet_parts, ".txt": functools.partial(text_parts, split_eot=split_eot)}
    try:
        yield from kinds.get(file_format(path), json_lines_parts)(path)
    except (OSError, EOFError, zlib.error, UnicodeError) as error:  # gzip raises two of them
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Raises UserError if this is not a parquet file with a text column."""
    try:
        # with a buffer, a column chunk is read page by page instead of all at once
        file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not a parquet file: {first_line(error)}") from None
    kind = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)).get(TEXT_COLUMN)
    values = kind.value_type if kind and pyarrow.types.is_dictionary(kind) else kind
    if values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        file.close()
        found = f"its type is {kind}" if kind else f"only {file.schema_arrow.names}"
        raise UserError(f"{path} has no string column `{TEXT_COLUMN}`, {found}")
    return file


def parquet_parts(path: Path) -> Iterator[Part]:
    """Splits large row groups into at most MAX_RANGES ranges of rows. To read a range, the rows
    before it are decoded and dropped, which costs a twentieth of tokenizing them."""
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            ranges = min(max(1, text_size(file, group) // PART_BYTES), MAX_RANGES)
            step = max(1, -(-num_rows // ranges))
            for start in range(0, num_rows, step):
                yield Part(functools.partial(read_texts, path, group, start,
                                             min(start + step, num_rows)))


def text_size(file: pyarrow.parquet.ParquetFile, group: int) -> int:
    """The uncompressed size of a row group's text, in bytes."""
    metadata = file.metadata.row_group(group)  # lists nested columns as several leaf columns
    columns = map(metadata.column, range(metadata.num_columns))
    return sum(column.total_uncompressed_size for column in columns
               if column.path_in_schema == TEXT_COLUMN)


def read_texts(path: Path, group: int, start: int, stop: int) -> Iterator[str | None]:
    """The texts of rows [start, stop) of a row group. Raises UserError if it is damaged."""
    with open_parquet(path) as file:
        batches = file.iter_batches(min(512, stop - start), row_groups=[group],
                                    columns=[TEXT_COLUMN], use_threads=False)
        texts = itertools.chain.from_iterable(strings(batch.column(0)) for batch in batches)
        try:
            yield from itertools.islice(texts, start, stop)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged in row group {group}: {first_line(error)}; replace "
                            "it and run again") from None


def strings(column: pyarrow.Array) -> list[str | None]:
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # parquet does not check that strings are valid UTF-8
        raw = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", INVALID_UTF8) for text in raw]


def json_lines_parts(path: Path) -> Iterator[Part]:
    opener = gzip.open if file_format(path).endswith(".gz") else open
    number = 1  # of the first line of the block
    with opener(path, "rb") as file:
        while lines := file.readlines(PART_BYTES):
            yield Part(functools.partial(parse_json_lines, path, number, b"".join(lines)))
            number += len(lines)


def parse_json_lines(path: Path, first: int, block: bytes) -> Iterator[str | None]:
    """The texts of a block of JSON Lines. Raises UserError for an invalid line."""
    content = block.decode("utf-8", INVALID_UTF8)
    check_text(path, content)
    for number, line in enumerate(content.split("\n"), first):
        if not line.strip():
            continue
        try:
            text = json.loads(line.removeprefix("\ufeff"))[TEXT_COLUMN]  # a byte-order mark
        except (ValueError, KeyError, TypeError, RecursionError):
            text = 0  # not a string
        if not isinstance(text, str | None):
            raise UserError(f"{path} line {number} is {line[:60]!r}, expected a JSON object with a "
                            f'string under "{TEXT_COLUMN}"')
        yield text


def text_parts(path: Path, split_eot: bool = False) -> Iterator[Part]:
    """A text file is one document, or several with <|endoftext|> between them. It is cut only
    between a word and whitespace: GPT-2's pattern always splits there, so the cuts do not change
    the token ids."""
    with open(path, "rb") as file:
        encoding = text_encoding(path, file.read(HEAD_BYTES))
    with open(path, encoding=encoding, errors=ERRORS.get(encoding), newline="") as file:
        text, continues = "", False

        def part(text: str, ended: bool) -> Part:
            texts = split_documents(text, continues, ended) if split_eot else [text]
            return Part(functools.partial(list, texts), continues)

        while block := file.read(PART_BYTES):
            check_text(path, block)
            text, start = text + block, len(text)
            cut = last_border(text, start) if len(block) == PART_BYTES else 0  # 0: end of the file
            if cut:
                yield part(text[:cut], ended=False)
                continues = not (split_eot and text.endswith(EOT_TEXT, 0, cut))
                text = text[cut:]
        if text or not continues:
            yield part(text, ended=True)


def split_documents(text: str, continues: bool, ended: bool) -> list[str]:
    """The documents of a piece of a file, without the line ends next to <|endoftext|> and at the
    ends of the file. The first one may continue the previous piece."""
    first, *others = text.split(EOT_TEXT)
    texts = [first if continues else first.lstrip("\r\n"), *(t.lstrip("\r\n") for t in others)]
    texts = [t.rstrip("\r\n") for t in texts[:-1]] + [texts[-1].rstrip("\r\n" if ended else "")]
    return [text for i, text in enumerate(texts) if text or (continues and i == 0)]


def last_border(text: str, start: int) -> int:
    """The last position >= `start` of whitespace that follows another character; 0 if there is
    none. (str.isspace includes all that GPT-2's pattern calls whitespace, and more.)"""
    for position in range(len(text) - 1, max(start, 1) - 1, -1):
        if text[position] in " \n" and not text[position - 1].isspace():
            return position
    return 0
