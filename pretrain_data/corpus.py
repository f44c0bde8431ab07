"""Builds a corpus: tokenizes documents and writes token shards.

    source -> parts -> worker processes (read, tokenize) -> one writer, in order -> shards, manifest

Each document becomes <|endoftext|> and its tokens, cut into shards, the first for validation, with
the same bytes for any number of workers. A folder is unfinished until `progress.json`, written
after each shard, is renamed `manifest.json`: a build resumes at the first shard that it lacks.
"""

import contextlib
import copy
import itertools
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from pathlib import Path

import numpy as np

from minigpt2 import shards
from minigpt2.config import UserError
from minigpt2.files import folder_lock, sha256_of, write_json
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TEXT, EOT_TOKEN, VOCABULARY, cut_runs, encode_to_array, repair
from pretrain_data.documents import Part, Source

BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
SHARD_TOKENS = 100_000_000
OUTCOMES = {"empty": "documents had no text and were skipped",
            "failed": "documents could not be encoded and were skipped",
            "repaired": "documents had invalid characters, now U+FFFD",
            "cut": "documents had very long runs of one kind of character, encoded in pieces",
            "marked": f"times {EOT_TEXT} in the text, tokenized as plain text (text_to_shards.py "
                      f"--separator '{EOT_TEXT}' splits .txt files there)"}
# The state of a build before the first token
FIRST = {"tokens": 0, "documents": 0, "outcomes": {name: 0 for name in OUTCOMES},
         "position": {"unit": 0, "part": 0, "tokens": 0}}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, val_tokens: int | None = None, max_tokens: int | None = None,
                 workers: int = 1) -> dict:
    """Tokenizes a source into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `description` identifies the documents, `val_tokens` is the size of the first shard. Resumes a
    build that is unfinished, lacks a shard, or has a smaller max_tokens. Raises UserError if the
    folder holds another corpus or more tokens, or is in use, for a full disk, and for one shard."""
    tokenizer = {"name": "gpt2", "sha256": {name: file[1] for name, file in VOCABULARY.items()}}
    settings = {"source": description, "shard_tokens": shard_tokens, "tokenizer": tokenizer}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the validation shard: lower "
                        f"--shard-tokens {shard_tokens}, e.g. to {max(2, max_tokens // 10)}")
    encode_to_array("")  # if the tokenizer does not load, nothing is changed
    with folder_lock(out_dir):
        finished = (out_dir / shards.MANIFEST).exists()
        record = load_record(out_dir, finished, settings, max_tokens)
        record.setdefault("val_tokens", val_tokens or shard_tokens)
        if (finished and max_tokens in (record["max_tokens"], record["tokens"])
                and all((out_dir / one["file"]).exists() for one in record["shards"])):
            print(f"{out_dir} is already complete: {record['tokens']:,} tokens")
            return record
        rewind(record, out_dir, max_tokens)
        return write_shards(open_source(), out_dir, name, record, workers)


def load_record(out_dir: Path, finished: bool, settings: dict, max_tokens: int | None) -> dict:
    """The record of a build, or a new one. Raises UserError if it has more than `max_tokens`, or if
    the settings or the source have changed."""
    path = out_dir / (shards.MANIFEST if finished else shards.PROGRESS)
    if not path.exists():
        return settings | {"max_tokens": max_tokens, **copy.deepcopy(FIRST), "shards": []}
    record = shards.read_record(path)
    if record.keys() & {"open_start", "counted"}:
        raise UserError(f"{out_dir} was begun by an older version: use another --out-dir")
    check_same_corpus(out_dir, record, settings)
    if max_tokens is not None and record["tokens"] > max_tokens:
        raise UserError(f"{out_dir} already holds {record['tokens']:,} tokens, more than "
                        f"--max-tokens {max_tokens:,}: use another --out-dir")
    return record


def check_same_corpus(out_dir: Path, record: dict, settings: dict) -> None:
    """Raises UserError if a manifest or progress record has other settings."""
    for key, new in settings.items():
        if (old := record.get(key)) != new:
            found = f"its {key} is {old!s:.150}, expected {new!s:.150}"
            if key == "source" and old and (files := old.get("files", {}).items()):
                changed = sorted({name for name, _ in files ^ new.get("files", {}).items()})
                found = f"changed files: {', '.join(changed[:5])}" if changed else found
            raise UserError(f"{out_dir} holds another corpus: {found}; use another --out-dir")


def rewind(record: dict, out_dir: Path, max_tokens: int | None) -> None:
    """Sets max_tokens, and returns to the state before the first shard that is missing, or short
    because of another limit; before all, if that state was not recorded, as in old manifests."""
    for index, one in enumerate(record["shards"]):
        is_short = one["tokens"] < record["shard_tokens"] and max_tokens != record["max_tokens"]
        if is_short or not (out_dir / one["file"]).exists():
            known = "outcomes" in one["start"]
            record |= copy.deepcopy(one["start"] if known else FIRST)
            del record["shards"][index if known else 0 :]
            break
    record["max_tokens"] = max_tokens


def write_shards(source: Source, out_dir: Path, name: str, record: dict, workers: int) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it. Raises UserError, and
    deletes what was written, if there is no training shard."""
    limit, tokens_before = record["max_tokens"] or sys.maxsize, record["tokens"]
    if tokens_before:
        print(f"{out_dir}: resuming after {tokens_before:,} tokens")
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    on_disk = sum(path.stat().st_size for path in out_dir.glob("*.npy"))
    check_disk(out_dir, max(0, expected * shards.TOKEN_DTYPE().itemsize - on_disk))
    written, progress = record["shards"], out_dir / shards.PROGRESS
    if (out_dir / shards.MANIFEST).exists():  # a finished corpus is continued
        os.replace(out_dir / shards.MANIFEST, progress)
    write_json(progress, record)
    reader = TokenReader(source, record, workers)
    with (contextlib.closing(reader.stream),
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        while record["tokens"] < limit and reader.has_next():
            split, size = ("train", "shard_tokens") if written else ("val", "val_tokens")
            start = copy.deepcopy({key: record[key] for key in FIRST})
            path = out_dir / f"{name}_{split}_{len(written):06d}.npy"
            size_and_sha256 = shards.write_shard(
                path, reader.take(min(record[size], limit - record["tokens"]), bar.update))
            written.append({"file": path.name, "split": split, **size_and_sha256, "start": start})
            write_json(progress, record)
    if len(written) < 2:
        for file in (progress.name, *(shard["file"] for shard in written)):
            (out_dir / file).unlink()
        is_given = record["val_tokens"] == record["shard_tokens"]
        raise UserError(f"all {record['tokens']:,} tokens fit into the first shard, for validation:"
                        f" give more text{', or lower --shard-tokens' * is_given}")
    write_json(progress, record)
    os.replace(progress, out_dir / shards.MANIFEST)
    print("".join(f"{count:,} {OUTCOMES[name]}\n" for name, count in record["outcomes"].items()
                  if count), end="")
    print(f"wrote {out_dir}: {record['documents']:,} documents, {record['tokens']:,} tokens in "
          f"{len(written)} shards, the first {written[0]['tokens']:,} for validation")
    return record


class TokenReader:
    """Reads the tokens of a source, and keeps account of them in `record`: the `position` of the
    next token, the numbers of `tokens` and `documents`, the `outcomes` of parts read to the end."""

    def __init__(self, source: Source, record: dict, workers: int):
        self.record, self.stream = record, token_stream(source, record, workers)
        self.rest = np.empty(0, shards.TOKEN_DTYPE)  # of the current part

    def has_next(self) -> bool:
        """Whether there is another token. If so, `position` is in its part."""
        while not len(self.rest) and (tokens := next(self.stream, None)) is not None:
            self.rest = tokens
        return len(self.rest) > 0

    def take(self, count: int, show: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Yields arrays (n,) uint16, `count` tokens or all that are left. `show` gets each size."""
        while count and self.has_next():
            chunk, self.rest = self.rest[:count], self.rest[count:]
            count -= len(chunk)
            self.record["position"]["tokens"] += len(chunk)
            self.record["documents"] += int(np.count_nonzero(chunk == EOT_TOKEN))
            self.record["tokens"] += len(chunk)
            show(len(chunk))
            yield chunk


def check_disk(out_dir: Path, needed: int) -> None:
    """Prints how many bytes are needed and free. Raises UserError if there are too few."""
    free = shutil.disk_usage(out_dir).free
    state = f"{out_dir} needs about {needed / 1e6:,.0f} MB more, {free / 1e6:,.0f} MB are free"
    print(state)
    if needed > free:
        raise UserError(f"{state}: free some, use another --out-dir, or a (smaller) --max-tokens")


def token_stream(source: Source, record: dict, workers: int) -> Iterator[np.ndarray]:
    """Yields the tokens (n,) uint16 of each part from the record's position on. When a part has
    been read to its end, its outcomes are added to the record."""
    part, skipped = record["position"]["part"], record["position"]["tokens"]
    for unit in range(record["position"]["unit"], source.num_units):
        parts = itertools.islice(source.open_unit(unit), part, None)
        for tokens, outcomes in ordered_map(tokenize_part, parts, workers):
            record["position"] = {"unit": unit, "part": part, "tokens": skipped}
            yield tokens[skipped:]
            for name, count in outcomes.items():
                record["outcomes"][name] += count
            part, skipped = part + 1, 0
        part, skipped = 0, 0
        record["position"] = FIRST["position"] | {"unit": unit + 1}


def ordered_map(function: Callable, items: Iterator, workers: int) -> Iterator:
    """A lazy `map` that runs in worker processes; with one worker, in this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or min(cores or 1, 61)  # ProcessPoolExecutor's limit on Windows
    if workers == 1:
        yield from map(function, items)
        return
    # spawn: forking a process with threads (PyTorch, Arrow) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"),
                               initializer=exit_with_parent)
    futures = deque()
    try:
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > 3 * workers:  # enough to keep all workers busy, in bounded memory
                yield futures.popleft().result()
        yield from (future.result() for future in futures)
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?): run again to resume, with "
                        "fewer --workers if it happens again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def exit_with_parent() -> None:
    """Makes a worker process exit when its parent is killed, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def tokenize_part(part: Part) -> tuple[np.ndarray, Counter]:
    """Tokenizes the documents of a part: (tokens (n,) uint16, counts of OUTCOMES)."""
    eot = np.array([EOT_TOKEN], dtype=np.uint32)
    arrays, outcomes = [eot[:0]], Counter()
    for number, text in enumerate(part.read()):
        continues = part.continues and number == 0
        if not text and not continues:
            outcomes["empty"] += 1
            continue
        valid = repair(text)
        try:
            tokens = encode_to_array(valid)
        except ValueError:  # tiktoken's regular expression failed: skip this document only
            outcomes["failed"] += 1
            continue
        outcomes["repaired"] += valid != text
        outcomes["cut"] += len(cut_runs(valid)) > 1
        outcomes["marked"] += valid.count(EOT_TEXT)
        arrays += [tokens] if continues else [eot, tokens]
    return np.concatenate(arrays, dtype=shards.TOKEN_DTYPE, casting="unsafe"), outcomes


def verify_corpus(out_dir: Path) -> None:
    """Compares every shard with its checksum. Raises UserError with the names of damaged ones."""
    entries = shards.read_record(out_dir / shards.MANIFEST)["shards"]
    bar = progress_bar(len(entries), 0, "verifying", unit="shard", over=entries)
    bad = [str(path) for shard in bar if not (path := out_dir / shard["file"]).exists()
           or sha256_of(path) != shard.get("sha256")]
    if bad:
        raise UserError(f"{len(bad)} of {len(entries)} shards are missing or damaged: rerun what "
                        f"wrote them after rm -f {shlex.join(bad)}")
    print(f"{out_dir} is intact: {len(entries)} shards match their checksums")
