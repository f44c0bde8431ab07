"""The corpus format: token shards, `manifest.json`, and a writer that can be killed and resumed.

A corpus is a folder of shards and a manifest that lists them. A shard is a `.npy` file with one
vector of uint16 token ids, read through a memory map. A folder without a manifest is unfinished;
only the shards of nanoGPT, build-nanogpt and llm.c are also read without one, by their file names.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from minigpt2.config import UserError, first_line
from minigpt2.files import atomic_write, sha256_of, sync_folder
from minigpt2.tokenizer import EOT_TOKEN

MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # of an unfinished corpus, see pretrain_data/corpus.py
TOKEN_DTYPE = np.uint16  # 50257 ids fit in 16 bits
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
LLMC_HEADER_BYTES = 256 * 4  # 256 int32; the first three are magic, version and token count
FOREIGN_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:bin|npy)")  # of other projects' shards


def shard_header(num_tokens: int) -> bytes:
    """The .npy header of a shard. Its size does not depend on `num_tokens`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": TOKEN_DTYPE().dtype.str, "fortran_order": False, "shape": (num_tokens,)})
    return header.getvalue()


def shard_bytes(num_tokens: int) -> int:
    """The size of a shard's file."""
    return len(shard_header(num_tokens)) + num_tokens * TOKEN_DTYPE().itemsize


def open_shard(path: Path, num_tokens: int | None = None) -> np.ndarray:
    """Memory-maps the tokens (n,) uint16 of a shard. The first bytes tell the format: .npy, llm.c
    (a header of 256 int32) or nanoGPT (uint16 without a header). Raises UserError if the file is
    damaged or no shard, or if `num_tokens` is given and differs."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
        magic, version, length = np.frombuffer(head.ljust(12, b"\0"), "<i4").tolist()
        if head.startswith(b"\x93NUMPY"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif magic != LLMC_MAGIC:
            tokens = np.memmap(path, "<u2", mode="r")
            is_llmc = 20240000 <= magic < 20250000  # and no first two ids: the lower half is larger
            high = tokens[1:4096:2]  # of uint32, the upper halves of the first ids
            if is_llmc or (len(high) > 4 and high.max() < 16 <= tokens[:4096].max()):
                kind = "another kind of llm.c file" if is_llmc else "uint32"
                raise UserError(f"{path} is {kind}, expected GPT-2's ids as uint16: move it out "
                                "of the folder, or tokenize its text with "
                                "pretrain_data/fineweb_downloader.py --files")
        elif version != LLMC_VERSION:
            raise ValueError(f"version {version} of llm.c's format, expected {LLMC_VERSION}")
        else:
            tokens = np.memmap(path, "<u2", mode="r", offset=LLMC_HEADER_BYTES)
            num_tokens = length if num_tokens is None else num_tokens
    except OSError as error:
        raise shard_error(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, EOFError, OverflowError) as error:
        raise shard_error(path, f"is truncated or not a shard ({first_line(error)})") from None
    if tokens.dtype != TOKEN_DTYPE or tokens.ndim != 1:
        raise shard_error(path, f"holds {tokens.dtype} {tokens.shape}, expected a vector of uint16")
    if not len(tokens) or num_tokens not in (None, len(tokens)):
        expected = f"{num_tokens:,}" if num_tokens else "some"
        raise shard_error(path, f"has {len(tokens):,} tokens, expected {expected} (truncated?)")
    return tokens


def shard_error(path: Path, problem: str) -> UserError:
    return UserError(f"shard {path} {problem}: delete it and rerun the command that wrote it")


def write_record(path: Path, record: dict) -> None:
    """Writes `manifest.json` or `progress.json`."""
    with atomic_write(path, text=True) as file:
        json.dump(record, file, indent=1)
        file.write("\n")


def read_record(path: Path) -> dict:
    """Reads and checks `manifest.json` or `progress.json`. Raises UserError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for shard in record["shards"]:
            name, split, tokens = shard["file"], shard["split"], shard["tokens"]
            if (not isinstance(tokens, int) or tokens < 1 or split not in ("train", "val")
                    or Path(name).name != name):
                raise ValueError(f"{tokens!r} tokens in {name!r}, split {split!r}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # also: not JSON, not UTF-8
        raise UserError(f"{path} is not the record of a corpus ({error!r}): delete the folder and "
                        "rerun the command that wrote it") from None
    return record


def read_manifest(data_dir: Path) -> dict:
    """The manifest of a corpus: `source`, `tokenizer`, `tokens` and `shards`, a list of dicts with
    `file`, `split`, `tokens` and `sha256`. For a folder of only foreign shards, `tokens` and
    `shards` (without `sha256`) come from the files. Raises UserError."""
    build = "build one with pretrain_data/pydocs_corpus.py or pretrain_data/fineweb_downloader.py"
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist: {build}")
    if (data_dir / MANIFEST).is_file():
        return read_record(data_dir / MANIFEST)
    if (data_dir / PROGRESS).exists():
        raise UserError(f"data folder {data_dir} is unfinished: rerun the command that created "
                        "it to resume")
    names = sorted(entry.name for entry in data_dir.iterdir())
    if "meta.pkl" in names:  # never opened: a pickle can run code
        raise UserError(f"data folder {data_dir} has a vocabulary of its own, meta.pkl (nanoGPT's "
                        "character-level data), expected GPT-2's ids: tokenize its text with "
                        "pretrain_data/fineweb_downloader.py --files")
    shards = [{"file": match[0], "split": match[1], "tokens": len(open_shard(data_dir / match[0]))}
              for match in map(FOREIGN_NAME.fullmatch, names) if match]
    if not shards:
        state = f"has no {MANIFEST} and no foreign shards" if names else "is empty"
        raise UserError(f"data folder {data_dir} {state}: {build}")
    return {"source": {"name": "shards without a manifest"}, "shards": shards,
            "tokens": sum(shard["tokens"] for shard in shards)}


def good_size(tokens: int) -> int:
    """A shard size for so many tokens: about a tenth, if possible of whole windows of 1,024."""
    windows = max(1, tokens // 10 // 1024)
    return windows * 1024 + 1 if tokens > 2 * 1025 else max(2, tokens // 10)


class Position(NamedTuple):
    """Where a token comes from: unit and part of the source, and offset in the part's tokens."""

    unit: int = 0
    part: int = 0
    tokens: int = 0


class ShardWriter:
    """Cuts a token stream into shards of exactly `shard_tokens`; the last one may be shorter.
    `record` is the content of `progress.json`: settings, `tokens` and `documents` written,
    `position` of the next token, complete `shards`, and `open_start`, the position of the first
    token of the incomplete shard. Tokens written after the last `commit` of a record are
    dropped."""

    def __init__(self, out_dir: Path, name: str, record: dict):
        self.out_dir, self.name, self.record = out_dir, name, record
        self.file: BinaryIO | None = None  # of the incomplete shard
        if not self.filled:
            return
        partial, path = self.paths()
        if not partial.exists() and path.exists():  # completed after the last commit
            os.replace(path, partial)
        size = shard_bytes(self.filled)
        if not partial.exists() or partial.stat().st_size < size:
            raise UserError(f"{partial} is missing or shorter than the {size:,} bytes recorded in "
                            f"{PROGRESS}: delete {out_dir} and start again")
        self.file = open(partial, "r+b")  # noqa: SIM115, closed by close_shard
        self.file.write(shard_header(record["shard_tokens"]))
        self.file.truncate(size)
        self.file.seek(size)

    @property
    def filled(self) -> int:
        """Tokens in the incomplete shard."""
        return self.record["tokens"] - sum(shard["tokens"] for shard in self.record["shards"])

    def paths(self) -> tuple[Path, Path]:
        """The temporary and the final path of the incomplete shard."""
        number = len(self.record["shards"])
        path = self.out_dir / f"{self.name}_{'train' if number else 'val'}_{number:06d}.npy"
        return path.with_name(f".{path.name}.partial"), path

    def add(self, tokens: np.ndarray, position: Position) -> None:
        """Appends tokens (n,) uint16, the first of which is at `position` in the source."""
        record = self.record
        record["documents"] += int(np.count_nonzero(tokens == EOT_TOKEN))
        while len(tokens):
            if self.file is None:
                self.file = open(self.paths()[0], "wb")  # noqa: SIM115, closed by close_shard
                self.file.write(shard_header(record["shard_tokens"]))
                record["open_start"] = position._asdict()
            chunk = tokens[: record["shard_tokens"] - self.filled]
            self.file.write(chunk.data)
            record["tokens"] += len(chunk)
            tokens = tokens[len(chunk) :]
            position = position._replace(tokens=position.tokens + len(chunk))
            if self.filled == record["shard_tokens"]:
                self.close_shard()
        record["position"] = position._asdict()

    def flush(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def commit(self) -> None:
        """Makes everything that was added so far survive a kill or a power failure."""
        self.flush()
        write_record(self.out_dir / PROGRESS, self.record)

    def roll_back(self, cursor: dict, num_shards: int) -> None:
        """Returns to an earlier state of the record and deletes the shards that began after it."""
        files = [self.out_dir / shard["file"] for shard in self.record["shards"]]
        files.append(self.paths()[0])
        self.flush()
        if self.file is not None:
            self.file.close()
            self.file = None
        self.record.update(cursor)
        del self.record["shards"][num_shards:]
        self.commit()
        for path in files[num_shards + (self.filled > 0) :]:
            path.unlink(missing_ok=True)

    def close_shard(self) -> None:
        """Writes the length of the shard into its header and gives it its final name."""
        (partial, path), tokens = self.paths(), self.filled
        self.file.seek(0)
        self.file.write(shard_header(tokens))
        self.flush()
        self.file.close()
        self.file = None
        os.replace(partial, path)
        sync_folder(self.out_dir)
        self.record["shards"].append({
            "file": path.name, "split": "train" if self.record["shards"] else "val",
            "tokens": tokens, "sha256": sha256_of(path), "start": self.record["open_start"]})

    def finish(self) -> dict:
        """Completes the last shard, writes the manifest and returns it. Raises UserError, and
        deletes what was written, if there is no training shard."""
        if self.file is not None:
            self.close_shard()
        tokens, shards = self.record["tokens"], self.record["shards"]
        if len(shards) < 2:
            for name in (PROGRESS, *(shard["file"] for shard in shards)):
                (self.out_dir / name).unlink()
            raise UserError("the source has no text: nothing to write" if tokens <= 1 else
                            f"all {tokens:,} tokens fit into the first shard, which is for "
                            f"validation: lower --shard-tokens, e.g. to {good_size(tokens)}")
        manifest = {key: value for key, value in self.record.items()
                    if key not in ("open_start", "file_start")}
        write_record(self.out_dir / MANIFEST, manifest)
        (self.out_dir / PROGRESS).unlink()
        return manifest
