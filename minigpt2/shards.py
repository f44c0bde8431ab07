"""The corpus format (docs/formats.md): shards, and a manifest or shards of other projects."""

import io
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minigpt2.config import UserError, first_line
from minigpt2.files import atomic_write, sha256_of

MANIFEST = "manifest.json"
PROGRESS = "progress.json"  # of an unfinished corpus, see pretrain_data/corpus.py
TOKEN_DTYPE = np.uint16  # 50257 ids fit in 16 bits
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 256 * 4  # 256 int32, see open_shard
TOKENIZE = "tokenize its text with pretrain_data/text_to_shards.py"
FOREIGN_NAME = re.compile(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:bin|npy)")  # of other projects' shards


def shard_header(num_tokens: int) -> bytes:
    """The .npy header of a shard. Its size does not depend on `num_tokens`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": TOKEN_DTYPE().dtype.str, "fortran_order": False, "shape": (num_tokens,)})
    return header.getvalue()


def open_shard(path: Path, num_tokens: int | None = None) -> np.ndarray:
    """Memory-maps the tokens (n,) uint16 of a shard: .npy, llm.c's (a header of 256 int32) or
    nanoGPT's (uint16). Raises UserError for damage, other files, and another `num_tokens`."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
        magic, version, length = np.frombuffer(head.ljust(12, b"\0"), "<i4").tolist()
        if head.startswith(b"\x93NUMPY"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        elif (magic, version) == (LLMC_MAGIC, LLMC_VERSION):
            tokens = np.memmap(path, "<u2", mode="r", offset=LLMC_HEADER_BYTES)
            num_tokens = length if num_tokens is None else num_tokens
        else:
            tokens = np.memmap(path, "<u2", mode="r")
            is_llmc = 20240000 <= magic < 20250000  # and no first two ids: the lower half is larger
            high = tokens[1:4096:2]  # of uint32, the upper halves of the first ids
            if is_llmc or (len(high) > 4 and high.max() < 16 <= tokens[:4096].max()):
                kind = f"llm.c's format {magic}, version {version}" if is_llmc else "uint32"
                raise UserError(f"{path} is {kind}, expected GPT-2's ids as uint16: move it out "
                                f"of the folder, or {TOKENIZE}")
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


def write_shard(path: Path, chunks: Iterable[np.ndarray]) -> dict:
    """Writes arrays (n,) uint16 as one shard, atomically. Returns its `tokens` and `sha256`."""
    written = 0
    with atomic_write(path) as file:
        file.write(shard_header(0))
        for chunk in chunks:
            file.write(chunk.data)
            written += len(chunk)
        file.seek(0)
        file.write(shard_header(written))
    return {"tokens": written, "sha256": sha256_of(path)}


def shard_error(path: Path, problem: str) -> UserError:
    return UserError(f"shard {path} {problem}: delete it and rerun the command that wrote it")


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
        raise UserError(f"{path} is damaged, or of another program ({error!r}): use another "
                        "folder, or delete this file") from None
    return record


def read_manifest(data_dir: Path) -> dict:
    """The manifest of a corpus (docs/formats.md), or one of foreign shards. Raises UserError."""
    make = ("make shards of its text with: python pretrain_data/text_to_shards.py "
            f"{shlex.quote(str(data_dir))} --out-dir DIR")
    if not data_dir.exists():
        raise UserError(f"data folder {data_dir} does not exist: make one with text_to_shards.py, "
                        "or others in pretrain_data/, or change --data-dir")
    if not data_dir.is_dir():
        raise UserError(f"{data_dir} is a file, expected a folder of token shards: {make}")
    if (data_dir / MANIFEST).is_file():
        return read_record(data_dir / MANIFEST)
    if (data_dir / PROGRESS).exists():
        raise UserError(f"data folder {data_dir} is unfinished: rerun what created it to resume")
    names = sorted(entry.name for entry in data_dir.iterdir())
    if "meta.pkl" in names:  # never opened: a pickle can run code
        raise UserError(f"data folder {data_dir} has a vocabulary of its own, meta.pkl (nanoGPT's "
                        f"character-level data), expected GPT-2's ids: {TOKENIZE}")
    shards = [{"file": match[0], "split": match[1], "tokens": len(open_shard(data_dir / match[0]))}
              for match in map(FOREIGN_NAME.fullmatch, names) if match]
    if not shards:
        raise UserError(f"data folder {data_dir} has no {MANIFEST} and no foreign shards: {make}")
    return {"source": {"name": "shards without a manifest"}, "shards": shards,
            "tokens": sum(shard["tokens"] for shard in shards)}
