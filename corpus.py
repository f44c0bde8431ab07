"""Documents in, verified token shards out: the one way from text to what `dataloader.py` reads.

    documents -> batches -> worker processes (tokenise) -> one ordered writer -> shards + manifest

Every document becomes <|endoftext|> and its tokens; the stream is cut every `shard_tokens` tokens.
The first shard is the validation split, the others are for training. Batches come back in the
order they went out, so that the shards are the same bytes for any number of workers.
"""

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import UserError
from dataloader import MANIFEST, TOKEN_DTYPE, read_manifest, write_manifest, write_shard
from files import sha256_of
from metrics import progress_bar
from tokenizer import VOCABULARY, encode_document

BATCH_CHARACTERS = 1_000_000  # a quarter of a second's work: far above the cost of handing it over


def write_corpus(documents: Iterable[str | None], out_dir: Path, *, name: str, source: dict,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1) -> dict:
    """Tokenises documents into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `source` says where the documents come from and must hold whatever would change them. A folder
    that already holds the same corpus is left as it is; one that holds another is refused, and so
    is a corpus too small for a second shard (UserError). Empty documents are skipped and counted.
    """
    settings = {"source": source, "shard_tokens": shard_tokens, "max_tokens": max_tokens,
                "tokenizer": {"name": "gpt2", "sha256": {k: v[1] for k, v in VOCABULARY.items()}}}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the first shard, which is for "
                        f"validation: lower --shard-tokens ({shard_tokens}) below it")
    if (out_dir / MANIFEST).exists():
        return check_finished(out_dir, settings)
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in out_dir.glob(f"{name}_*.npy"):
        print(f"removing {path}, left by a run that did not finish")
        path.unlink()

    writer = ShardWriter(out_dir, name, shard_tokens, max_tokens)
    kept = skipped = 0
    with progress_bar(max_tokens, 0, "tokenising", unit="token") as bar:
        for arrays, empty in tokenise(documents, workers):
            skipped += empty
            for tokens in arrays:
                kept += 1
                bar.update(writer.add(tokens))
            if writer.full:
                break
    shards = writer.finish()
    manifest = settings | {"documents": kept, "skipped_documents": skipped,
                           "tokens": writer.total, "shards": shards}
    write_manifest(out_dir, manifest)
    print(f"wrote {out_dir}: {kept:,} documents ({skipped:,} empty ones skipped), "
          f"{writer.total:,} tokens, {len(shards)} shards, the first for validation")
    return manifest


def check_finished(out_dir: Path, settings: dict) -> dict:
    manifest = read_manifest(out_dir)
    for key, value in settings.items():
        if manifest.get(key) != value:
            raise UserError(f"{out_dir} holds another corpus: its {key} is {manifest.get(key)}, "
                            f"asked for is {value}; use another --out-dir, or delete that one")
    print(f"{out_dir} is already whole: {manifest['tokens']:,} tokens, "
          f"{len(manifest['shards'])} shards")
    return manifest


def tokenise(documents: Iterable[str | None], workers: int) -> Iterator[tuple[list, int]]:
    """Yields what `tokenise_batch` makes of every batch of documents, in order."""
    batches = batched_by_size(documents)
    if workers == 1:
        yield from map(tokenise_batch, batches)
        return
    # spawn: forking a process that holds threads (torch, Arrow) can deadlock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        pending = deque(pool.submit(tokenise_batch, batch)
                        for batch in itertools.islice(batches, 2 * workers))
        try:
            while pending:  # a few batches a worker in flight: memory does not grow with the set
                result = pending.popleft().result()
                pending.extend(pool.submit(tokenise_batch, b) for b in itertools.islice(batches, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()


def batched_by_size(documents: Iterable[str | None]) -> Iterator[list[str | None]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document or "")
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenise_batch(documents: list[str | None]) -> tuple[list[np.ndarray], int]:
    """The token arrays of the documents that have text, and how many have none."""
    arrays = [encode_document(document) for document in documents if document]
    return arrays, len(documents) - len(arrays)


@dataclass
class ShardWriter:
    """Cuts a stream of token arrays into shards of exactly shard_tokens, the last one shorter."""

    out_dir: Path
    name: str
    shard_tokens: int
    max_tokens: int | None
    total: int = 0  # tokens taken so far
    filled: int = 0  # of which in the buffer
    shards: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.buffer = np.empty(self.shard_tokens, dtype=TOKEN_DTYPE)

    @property
    def full(self) -> bool:
        return self.total == self.max_tokens

    def add(self, tokens: np.ndarray) -> int:
        """Takes the tokens of one document, up to max_tokens in all; returns how many."""
        if self.max_tokens is not None:
            tokens = tokens[: self.max_tokens - self.total]
        self.total += len(tokens)
        taken = len(tokens)
        while len(tokens):
            if self.filled == self.shard_tokens:
                self.flush()
            part = tokens[: self.shard_tokens - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            tokens = tokens[len(part) :]
        return taken

    def flush(self) -> None:
        split = "train" if self.shards else "val"
        path = self.out_dir / f"{self.name}_{split}_{len(self.shards):06d}.npy"
        write_shard(path, self.buffer[: self.filled])
        self.shards.append({"file": path.name, "split": split, "tokens": self.filled,
                            "sha256": sha256_of(path)})
        self.filled = 0

    def finish(self) -> list[dict]:
        """Writes what is left and returns the shards; a lone validation shard is refused."""
        if not self.shards:
            raise UserError(f"all {self.total:,} tokens fit into the first shard, which is for "
                            f"validation: lower --shard-tokens to {max(1, self.total // 10)}, say")
        if self.filled:
            self.flush()
        return self.shards


def default_workers() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
