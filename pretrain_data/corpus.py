"""Builds a corpus: tokenizes documents and writes token shards.

    source -> parts -> worker processes (read, tokenize) -> one writer, in order -> shards, manifest

Each document becomes <|endoftext|> followed by its tokens. The token stream is cut every
`shard_tokens` tokens; the first shard is the validation split, the others are for training. Parts
are written in the order of the source: the shards are byte-identical for any number of workers.

A folder is unfinished until it has a `manifest.json`. Until then its record is `progress.json`,
written after each shard. A build that was killed, or that a larger --max-tokens extends, resumes at
the first token of its incomplete shard.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from minigpt2 import shards
from minigpt2.config import UserError
from minigpt2.files import folder_lock
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_runs, encode_to_array, repair
from pretrain_data.documents import EOT_TEXT, Part, Source

BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
CHECK_EVERY = 100  # every 100th document is also encoded with tiktoken, if that is not the encoder
OUTCOMES = {"empty": "had no text and were skipped",
            "failed": "could not be encoded and were skipped",
            "repaired": "had invalid characters, now U+FFFD",
            "cut": "had very long runs of one kind of character, encoded in pieces",
            "marked": f"contain {EOT_TEXT}, encoded as text (--split-eot splits .txt files there)"}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1,
                 encoder: str = "tiktoken") -> dict:
    """Tokenizes a source into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `description` identifies the documents. An unfinished build is resumed, and a larger max_tokens
    extends a finished one; missing shards of a finished one are rebuilt. Raises UserError if the
    folder holds another corpus or more tokens, or is in use, for a full disk, and for one shard."""
    tokenizer = {"name": "gpt2", "sha256": {name: file[1] for name, file in VOCABULARY.items()}}
    settings = {"source": description, "shard_tokens": shard_tokens, "tokenizer": tokenizer}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the validation shard: lower "
                        f"--shard-tokens {shard_tokens}, e.g. to {shards.good_size(max_tokens)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    read = partial(TokenReader, workers=workers, encoder=encoder)
    encode_to_array("", encoder)  # if it is not installed, nothing is changed
    with folder_lock(out_dir):
        finished = (out_dir / shards.MANIFEST).exists()
        record = load_record(out_dir, finished, settings, max_tokens)
        if finished:
            rebuild_missing_shards(open_source, out_dir, record, read)
            if max_tokens in (record["max_tokens"], record["tokens"]):
                return record
        change_limit(record, max_tokens)
        source = open_source()
        record |= {"files": source.file_counts} if source.file_counts else {}
        return write_shards(source, out_dir, name, record, read)


def load_record(out_dir: Path, finished: bool, settings: dict, max_tokens: int | None) -> dict:
    """The record of a build, or a new one. Raises UserError if it has more than `max_tokens`, or if
    the settings or the source have changed; only local files that no shard has tokens of may."""
    path = out_dir / (shards.MANIFEST if finished else shards.PROGRESS)
    if not path.exists():
        return settings | {
            "max_tokens": max_tokens, "documents": 0, "tokens": 0,
            "outcomes": dict.fromkeys(OUTCOMES, 0),
            "position": {"unit": 0, "part": 0, "tokens": 0}, "shards": []}
    record = shards.read_record(path)
    if "open_start" in record:
        raise UserError(f"{out_dir} was begun by an older version: rm -r {out_dir} and run again")
    old, new = (one.get("source", {}).get("files", {}) for one in (record, settings))
    record.setdefault("files_read", len(old) if record["shards"] else 0)  # not in old manifests
    for file in list(old)[record["files_read"] :]:
        old[file] = new.get(file, old[file])
    shards.check_same_corpus(out_dir, record, settings)
    tokens = max(record["tokens"], record.get("counted", record)["tokens"])
    if max_tokens is not None and tokens > max_tokens:
        raise UserError(f"{out_dir} already holds {tokens:,} tokens, more than --max-tokens "
                        f"{max_tokens:,}: choose another --out-dir, or delete it: rm -r {out_dir}")
    return record


def change_limit(record: dict, max_tokens: int | None) -> None:
    """Sets max_tokens. If it was another, a short last shard is written again: `counted` is where
    it ended, because the documents and outcomes up to there are in the record already."""
    short = [one for one in record["shards"] if one["tokens"] < record["shard_tokens"]]
    if short and record["max_tokens"] != max_tokens:
        record["counted"] = record["position"] | {"tokens": record["tokens"]}
        record["position"] = record["shards"].pop()["start"]
        record["tokens"] -= short[0]["tokens"]
    record["max_tokens"] = max_tokens


def write_shards(source: Source, out_dir: Path, name: str, record: dict, read: Callable) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it. Raises UserError, and
    deletes what was written, if there is no training shard."""
    limit, tokens_before = record["max_tokens"] or sys.maxsize, record["tokens"]
    if tokens_before:
        print(f"{out_dir}: resuming after {tokens_before:,} tokens", flush=True)
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    check_disk(out_dir, source.scratch_bytes + shards.shard_bytes(max(0, expected - tokens_before)))
    written, progress = record["shards"], out_dir / shards.PROGRESS
    if (out_dir / shards.MANIFEST).exists():  # a finished corpus is continued
        os.replace(out_dir / shards.MANIFEST, progress)
    shards.write_record(progress, record)
    t0, reader = time.monotonic(), read(source, record)
    with (contextlib.closing(reader.stream),
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        while record["tokens"] < limit and reader.has_next():
            split, start = "train" if written else "val", record["position"]
            path = out_dir / f"{name}_{split}_{len(written):06d}.npy"
            count = min(record["shard_tokens"], limit - record["tokens"])
            size_and_sha256 = shards.write_shard(path, reader.take(count, bar.update))
            written.append({"file": path.name, "split": split, **size_and_sha256, "start": start})
            shards.write_record(progress, record)
    if len(written) < 2:
        for file in (progress.name, *(shard["file"] for shard in written)):
            (out_dir / file).unlink()
        tokens = record["tokens"]
        raise UserError("the source has no text: nothing to write" if tokens <= 1 else
                        f"all {tokens:,} tokens fit into the first shard, which is for "
                        f"validation: lower --shard-tokens, e.g. to {shards.good_size(tokens)}")
    record.pop("counted", None)
    shards.write_record(progress, record)
    os.replace(progress, out_dir / shards.MANIFEST)
    report(out_dir, record, record["tokens"] - tokens_before, time.monotonic() - t0)
    return record


class TokenReader:
    """Reads the tokens of a source, and keeps account of them in `record`: the `position` of the
    next token, the numbers of `tokens` and `documents`, the `outcomes` of parts read to the end."""

    def __init__(self, source: Source, record: dict, workers: int, encoder: str):
        self.record, record["outcomes"] = record, Counter(record["outcomes"])
        self.counted = record.get("counted", {"unit": 0, "part": 0, "tokens": 0})
        self.stream = token_stream(source, record["position"], workers, encoder)
        self.rest, self.outcomes = np.empty(0, shards.TOKEN_DTYPE), Counter()  # of the current part

    def has_next(self) -> bool:
        """Whether there is another token. If so, `position` is in its part."""
        while not len(self.rest) and (item := next(self.stream, None)):
            ended, counted = self.record["position"], self.counted
            if (ended["unit"], ended["part"]) >= (counted["unit"], counted["part"]):
                self.record["outcomes"].update(self.outcomes)
            self.record["position"], self.rest, self.outcomes, file = item
            self.record["files_read"] = max(file, self.record.get("files_read", 0))
        return len(self.rest) > 0

    def take(self, count: int, show: Callable[[int], None]) -> Iterator[np.ndarray]:
        """Yields arrays (n,) uint16, `count` tokens or all that are left. `show` gets each size."""
        while count and self.has_next():
            chunk, self.rest = self.rest[:count], self.rest[count:]
            count -= len(chunk)
            position = self.record["position"]
            self.record["position"] = position | {"tokens": position["tokens"] + len(chunk)}
            new = chunk[max(0, self.counted["tokens"] - self.record["tokens"]) :]
            self.record["documents"] += int(np.count_nonzero(new == EOT_TOKEN))
            self.record["tokens"] += len(chunk)
            show(len(chunk))
            yield chunk


def report(out_dir: Path, manifest: dict, tokens: int, seconds: float) -> None:
    outcomes = "".join(f"; {count:,} {OUTCOMES[name]}"
                       for name, count in manifest["outcomes"].items() if count)
    print(f"wrote {out_dir}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
          f"{len(manifest['shards'])} shards, the first for validation; {tokens / seconds:,.0f} "
          f"tokens/s over {seconds:,.0f} s{outcomes}")


def check_disk(out_dir: Path, needed: int) -> None:
    """Prints how many bytes are needed and free. Raises UserError if there are too few."""
    free = shutil.disk_usage(out_dir).free
    state = f"{out_dir} needs about {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free"
    print(state, flush=True)
    if needed > free:
        raise UserError(f"{state}: free space, choose another --out-dir, or lower --max-tokens")


def token_stream(source: Source, start: dict, workers: int, encoder: str) -> Iterator[tuple]:
    """Yields (position, tokens, outcomes, file), see `tokenize_part`, for each part from `start`
    on, and after each unit the start of the next one with no tokens."""
    tokenize = partial(tokenize_part, encoder=encoder)
    part, skipped = start["part"], start["tokens"]
    with worker_map(workers) as ordered_map:
        for unit in range(start["unit"], source.num_units):
            parts = itertools.islice(source.open_unit(unit), part, None)
            for tokens, outcomes, file in ordered_map(tokenize, parts):
                yield ({"unit": unit, "part": part, "tokens": skipped}, tokens[skipped:], outcomes,
                       file)
                part, skipped = part + 1, 0
            part, skipped = 0, 0
            yield {"unit": unit + 1, "part": 0, "tokens": 0}, tokens[:0], Counter(), 0


@contextlib.contextmanager
def worker_map(workers: int) -> Iterator[Callable]:
    """Yields a lazy, ordered `map` that runs in worker processes; with one worker, in this one."""
    if workers == 1:
        yield map
        return
    # spawn: forking a process with threads (PyTorch, Arrow) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"),
                               initializer=exit_with_parent)

    def ordered_map(function: Callable, items: Iterator) -> Iterator:
        futures = deque()
        for item in items:
            futures.append(pool.submit(function, item))
            if len(futures) > 3 * workers:  # enough to keep all workers busy, in bounded memory
                yield futures.popleft().result()
        yield from (future.result() for future in futures)

    try:
        yield ordered_map
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


def tokenize_part(part: Part, encoder: str) -> tuple[np.ndarray, Counter, int]:
    """Tokenizes the documents of a part: (tokens (n,) uint16, counts of OUTCOMES, part.file)."""
    eot = np.array([EOT_TOKEN], dtype=np.uint32)
    arrays, outcomes = [eot[:0]], Counter()
    for number, text in enumerate(part.read()):
        continues = part.continues and number == 0
        if not text and not continues:
            outcomes["empty"] += 1
            continue
        valid = repair(text)
        try:
            tokens = encode_to_array(valid, encoder)
        except ValueError:  # tiktoken's regular expression failed: skip this document only
            outcomes["failed"] += 1
            continue
        if (encoder != "tiktoken" and number % CHECK_EVERY == 0
                and not np.array_equal(tokens, encode_to_array(valid))):
            raise UserError(f"--encoder {encoder} and tiktoken give different ids for the document "
                            f"{text[:60]!r}: omit the flag, and delete the shards written with it")
        outcomes["repaired"] += valid != text
        outcomes["cut"] += len(cut_runs(valid)) > 1
        outcomes["marked"] += EOT_TEXT in valid
        arrays += [tokens] if continues else [eot, tokens]
    tokens = np.concatenate(arrays, dtype=shards.TOKEN_DTYPE, casting="unsafe")
    return tokens, outcomes, part.file


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 61)  # ProcessPoolExecutor's limit on Windows


def rebuild_missing_shards(open_source: Callable[[], Source], out_dir: Path, manifest: dict,
                           read: Callable) -> None:
    """Rebuilds the shards of a finished folder that are missing. Raises UserError if the source has
    changed."""
    missing = [one for one in manifest["shards"] if not (out_dir / one["file"]).exists()]
    source = open_source() if missing else None
    for one in missing:
        path, reader = out_dir / one["file"], read(source, manifest | {"position": one["start"]})
        with (contextlib.closing(reader.stream),
              progress_bar(one["tokens"], 0, f"rebuilding {path.name}", unit="token") as bar):
            written = shards.write_shard(path, reader.take(one["tokens"], bar.update))
        if written["sha256"] != one["sha256"]:
            path.unlink()
            raise UserError(f"{path} cannot be rebuilt, its source has changed: delete {out_dir} "
                            "and run again")
    print(f"{out_dir} is {'complete again' if missing else 'already complete'}: "
          f"{manifest['tokens']:,} tokens, {len(manifest['shards'])} shards")
