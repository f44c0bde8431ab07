"""The shard format, read and written here and nowhere else.

A corpus is a folder of shards and a `manifest.json`. A shard is a NumPy `.npy` file holding one
vector of uint16 token ids, read through a memory map. The manifest is written last: a folder
without one is unfinished, and no file name is ever guessed from, but for the ready-made shards of
nanoGPT and llm.c, which come without.

Without torch, so that the data scripts and each of their worker processes start in half a second.
"""

import io
import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minigpt2.config import UserError
from minigpt2.files import atomic_write, sha256_of, sync_folder
from minigpt2.tokenizer import EOT_TOKEN

MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # stands in a folder that is still being written, see `corpus.py`
TOKEN_DTYPE = np.uint16  # 50257 ids fit in 16 bits
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
LLMC_HEADER = 256 * 4  # bytes: 256 int32, of which three are used: magic, version, tokens
FOREIGN_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.bin")  # nanoGPT's and llm.c's shards


def shard_header(num_tokens: int) -> bytes:
    """The first bytes of a shard; as many for any number of tokens."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.dtype(TOKEN_DTYPE).str, "fortran_order": False,
                 "shape": (num_tokens,)})
    return header.getvalue()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Writes tokens (n,) uint16 as one shard."""
    assert tokens.dtype == TOKEN_DTYPE and tokens.ndim == 1, (tokens.dtype, tokens.shape)
    with atomic_write(path) as file:
        file.write(shard_header(len(tokens)))
        file.write(np.ascontiguousarray(tokens).data)


def open_shard(path: Path, num_tokens: int | None = None) -> np.ndarray:
    """The tokens (n,) uint16 of a shard, memory-mapped: ours (.npy), llm.c's (a header of 256
    int32) or nanoGPT's (bare uint16), told apart by how they begin. Raises UserError, also when
    there are not `num_tokens` of them."""
    mend = "delete it and run the command that made it again"
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError as error:
        raise UserError(f"shard {path} cannot be read ({error.strerror}), though {MANIFEST} lists "
                        f"it: {mend}") from None
    if head.startswith(b"\x93NUMPY"):
        tokens = open_npy(path, mend)
    elif len(head) == 12 and np.frombuffer(head, "<i4")[0] == LLMC_MAGIC:
        _, version, announced = np.frombuffer(head, "<i4").tolist()
        if version != LLMC_VERSION:
            raise UserError(f"shard {path} has version {version} of llm.c's format, expected "
                            f"{LLMC_VERSION} (GPT-2's uint16 ids): {mend}")
        tokens = open_raw(path, LLMC_HEADER, mend)
        num_tokens = announced if num_tokens is None else num_tokens
    else:
        tokens = open_raw(path, 0, mend)
    if num_tokens is not None and len(tokens) != num_tokens:
        raise UserError(f"shard {path} has {len(tokens):,} tokens, expected {num_tokens:,} (is it "
                        f"truncated?): {mend}")
    return tokens


def open_npy(path: Path, mend: str) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError) as error:
        raise UserError(f"shard {path} is truncated or no shard at all ({error}): {mend}") from None
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise UserError(f"shard {path} holds {tokens.dtype} {tokens.shape}, expected one vector of "
                        f"uint16: {mend}")
    return tokens


def open_raw(path: Path, offset: int, mend: str) -> np.ndarray:
    size = path.stat().st_size - offset
    if size <= 0 or size % 2:
        raise UserError(f"shard {path} is truncated or no shard at all ({size + offset:,} bytes): "
                        f"{mend}")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset)


def write_manifest(data_dir: Path, manifest: dict) -> None:
    with atomic_write(data_dir / MANIFEST, text=True) as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")


def read_manifest(data_dir: Path) -> dict:
    """The manifest of a corpus: source, tokenizer, totals, and `shards`, a list of dicts with
    `file`, `split`, `tokens` and `sha256`; for a folder with nothing but nanoGPT's or llm.c's
    shards, what can be known of them. Raises UserError."""
    make = "make one with pretrain_data/pydocs_corpus.py or pretrain_data/fineweb_downloader.py"
    path = data_dir / MANIFEST
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist: {make}")
    if path.is_file():
        return read_record(path)
    if (data_dir / PROGRESS).exists():
        raise UserError(f"data folder {data_dir} is unfinished: run the command that began it "
                        "again, which goes on where it stopped")
    names = sorted(entry.name for entry in data_dir.iterdir())
    foreign = [match for match in map(FOREIGN_NAME.fullmatch, names) if match]
    if not foreign:
        state = f"has no {MANIFEST} and no shards of nanoGPT or llm.c" if names else "is empty"
        raise UserError(f"data folder {data_dir} {state}: {make}")
    shards = [{"file": match[0], "split": match[1], "tokens": len(open_shard(data_dir / match[0]))}
              for match in foreign]
    return {"source": {"name": "shards without a manifest"}, "shards": shards,
            "tokens": sum(shard["tokens"] for shard in shards)}


def read_record(path: Path) -> dict:
    """A manifest, or the progress of one that is being made. Raises UserError."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for shard in manifest["shards"]:
            if not isinstance(shard["tokens"], int) or shard["tokens"] < 1:
                raise ValueError(f"tokens is {shard['tokens']!r}")
            if shard["split"] not in ("train", "val") or Path(shard["file"]).name != shard["file"]:
                raise ValueError(f"{shard['file']!r} in {shard['split']!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # Value: no JSON, no UTF-8
        raise UserError(f"{path} is no manifest of a corpus ({error!r}): make the corpus again "
                        "with the script that made it") from None
    return manifest


def write_progress(data_dir: Path, progress: dict) -> None:
    with atomic_write(data_dir / PROGRESS, text=True) as file:
        json.dump(progress, file)


@dataclass(frozen=True)
class Position:
    """A place in the token stream of a source: so many tokens into a part of a unit."""

    unit: int = 0
    part: int = 0
    tokens: int = 0


@dataclass
class ShardWriter:
    """Cuts a stream of tokens into shards of exactly shard_tokens, the last one shorter. A shard
    has its name only once it is whole."""

    out_dir: Path
    name: str
    shard_tokens: int
    total: int = 0  # tokens in all shards
    documents: int = 0
    shards: list[dict] = field(default_factory=list)  # the whole ones, as in the manifest
    file: BinaryIO | None = None  # of the open one, if there is one
    open_start: dict | None = None  # where in the source it starts

    @property
    def filled(self) -> int:
        """Tokens in the open shard."""
        return self.total - sum(shard["tokens"] for shard in self.shards)

    def paths(self) -> tuple[Path, Path]:
        """(under what name the open shard is being written, its final name)."""
        split = "train" if self.shards else "val"
        path = self.out_dir / f"{self.name}_{split}_{len(self.shards):06d}.npy"
        return path.with_name(f".{path.name}.partial"), path

    def add(self, tokens: np.ndarray, start: Position) -> None:
        """Takes tokens (n,) uint16, the first of which stands at `start`."""
        self.documents += int(np.count_nonzero(tokens == EOT_TOKEN))
        while len(tokens):
            if self.file is None:
                self.file = open(self.paths()[0], "wb")  # noqa: SIM115, closed by close_shard
                self.file.write(shard_header(self.shard_tokens))
                self.open_start = asdict(start)
            part = tokens[: self.shard_tokens - self.filled]
            self.file.write(part.data)
            self.total += len(part)
            tokens, start = tokens[len(part) :], replace(start, tokens=start.tokens + len(part))
            if self.filled == self.shard_tokens:
                self.close_shard()

    def flush(self) -> None:
        """To the disk, and not only to the system."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close_shard(self) -> None:
        """Gives the open shard its length and its name."""
        partial, path = self.paths()
        tokens = self.filled
        self.file.seek(0)
        self.file.write(shard_header(tokens))
        self.flush()
        self.file.close()
        self.file = None
        os.replace(partial, path)
        sync_folder(self.out_dir)
        self.shards.append({"file": path.name, "split": "train" if self.shards else "val",
                            "tokens": tokens, "sha256": sha256_of(path), "start": self.open_start})

    def resume(self, record: dict) -> None:
        """Goes back to where a record was written: later tokens are cut off."""
        self.total, self.documents = record["tokens"], record["documents"]
        self.shards, self.open_start = list(record["shards"]), record["open_start"]
        if self.filled == 0:
            return
        partial, path = self.paths()
        if not partial.exists() and path.exists():  # it was closed after the record was written
            os.replace(path, partial)
        header = shard_header(self.shard_tokens)
        size = len(header) + self.filled * TOKEN_DTYPE().itemsize
        if not partial.exists() or partial.stat().st_size < size:
            raise UserError(f"{partial} is missing or shorter than the {size:,} bytes that "
                            f"{PROGRESS} promises: delete {self.out_dir} and start again")
        self.file = open(partial, "r+b")  # noqa: SIM115, closed by close_shard
        self.file.write(header)
        self.file.truncate(size)
        self.file.seek(size)

    def finish(self) -> None:
        """Closes the last shard; a lone validation shard is refused."""
        if not self.shards:
            if self.file is not None:
                self.file.close()
                self.paths()[0].unlink()
            (self.out_dir / PROGRESS).unlink()
            if self.total <= 1:
                raise UserError("there is no text in what was read: nothing to write")
            raise UserError(f"all {self.total:,} tokens fit into the first shard, which is for "
                            f"validation: lower --shard-tokens to {max(2, self.total // 10)}, say")
        if self.file is not None:
            self.close_shard()
