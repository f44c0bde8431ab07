"""Builds a corpus: tokenizes documents and writes token shards.

    source -> parts -> worker processes (read, tokenize) -> one writer, in order -> shards, manifest

Each document becomes <|endoftext|> followed by its tokens. The token stream is cut every
`shard_tokens` tokens; the first shard is the validation split. The shards are byte-identical for
any number of workers. A folder is unfinished until it has a `manifest.json`. Until then its record
is `progress.json`, written after each shard: a build resumes at the first shard that it lacks.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np

from minigpt2 import shards
from minigpt2.config import UserError
from minigpt2.files import folder_lock, sha256_of
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_runs, encode_to_array, repair
from pretrain_data.documents import EOT_TEXT, Part, Source

BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
CHECK_EVERY = 100  # every 100th document is also encoded with tiktoken, if that is not the encoder
FIRST = {"unit": 0, "part": 0, "tokens": 0}  # position
OUTCOMES = {"empty": "had no text and were skipped",
            "failed": "could not be encoded and were skipped",
            "repaired": "had invalid characters, now U+FFFD",
            "cut": "had very long runs of one kind of character, encoded in pieces",
            "marked": f"contain {EOT_TEXT}, encoded as text (--split-eot splits .txt files there)"}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1,
                 encoder: str = "tiktoken") -> dict:
    """Tokenizes a source into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `description` identifies the documents. Resumes a build that is unfinished, lacks a shard, or
    has a smaller max_tokens. Raises UserError if the folder holds another corpus or more tokens, or
    is in use, for a full disk, and for one shard."""
    tokenizer = {"name": "gpt2", "sha256": {name: file[1] for name, file in VOCABULARY.items()}}
    settings = {"source": description, "shard_tokens": shard_tokens, "tokenizer": tokenizer}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the validation shard: lower "
                        f"--shard-tokens {shard_tokens}, e.g. to {good_size(max_tokens)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    encode_to_array("", encoder)  # if it is not installed, nothing is changed
    with folder_lock(out_dir):
        finished = (out_dir / shards.MANIFEST).exists()
        record = load_record(out_dir, finished, settings, max_tokens)
        if (finished and max_tokens in (record["max_tokens"], record["tokens"])
                and all((out_dir / one["file"]).exists() for one in record["shards"])):
            print(f"{out_dir} is already complete: {record['tokens']:,} tokens")
            return record
        rewind(record, out_dir, max_tokens)
        source = open_source()
        record |= {"files": source.file_counts} if source.file_counts else {}
        return write_shards(source, out_dir, name, record, workers, encoder)


def load_record(out_dir: Path, finished: bool, settings: dict, max_tokens: int | None) -> dict:
    """The record of a build, or a new one. Raises UserError if it has more than `max_tokens`, or if
    the settings or the source have changed; only local files that no shard has tokens of may."""
    path = out_dir / (shards.MANIFEST if finished else shards.PROGRESS)
    if not path.exists():
        return settings | {"max_tokens": max_tokens, "documents": 0, "tokens": 0, "outcomes":
                           dict.fromkeys(OUTCOMES, 0), "position": dict(FIRST), "shards": []}
    record = shards.read_record(path)
    if "open_start" in record:
        raise UserError(f"{out_dir} was begun by an older version: rm -r {out_dir} and run again")
    old, new = (one.get("source", {}).get("files", {}) for one in (record, settings))
    record.setdefault("files_read", len(old) if record["shards"] else 0)  # not in old manifests
    for file in list(old)[record["files_read"] :]:
        old[file] = new.get(file, old[file])
    check_same_corpus(out_dir, record, settings)
    tokens = max(record["tokens"], record.get("counted", record)["tokens"])
    if max_tokens is not None and tokens > max_tokens:
        raise UserError(f"{out_dir} already holds {tokens:,} tokens, more than --max-tokens "
                        f"{max_tokens:,}: choose another --out-dir, or delete it: rm -r {out_dir}")
    return record


def check_same_corpus(out_dir: Path, record: dict, settings: dict) -> None:
    """Raises UserError if a manifest or progress record has other settings."""
    for key, new in settings.items():
        if (old := record.get(key)) != new:
            found = f"its {key} is {old!s:.150}, expected {new!s:.150}"
            if key == "source" and old and (files := old.get("files", {}).items()):
                changed = sorted({name for name, _ in files ^ new.get("files", {}).items()})
                found = f"changed files: {', '.join(changed[:5])}" if changed else found
            raise UserError(f"{out_dir} holds another corpus: {found}; choose another --out-dir, "
                            f"or delete that folder to begin anew: rm -r {out_dir}")


def rewind(record: dict, out_dir: Path, max_tokens: int | None) -> None:
    """Sets max_tokens, and drops the shards to be written again: from the first one that is
    missing, or short of shard_tokens because of another limit. `counted` is where the last one
    ended: the documents and outcomes up to there are in the record already."""
    for index, one in enumerate(record["shards"]):
        is_short = one["tokens"] < record["shard_tokens"] and max_tokens != record["max_tokens"]
        if is_short or not (out_dir / one["file"]).exists():
            end = record["position"] | {"tokens": record["tokens"]}
            record["counted"] = max(end, record.get("counted", end), key=itemgetter("tokens"))
            record["position"] = one["start"]
            record["tokens"] -= sum(dropped["tokens"] for dropped in record["shards"][index:])
            del record["shards"][index:]
            break
    record["max_tokens"] = max_tokens


def write_shards(source: Source, out_dir: Path, name: str, record: dict, workers: int,
                 encoder: str) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it. Raises UserError, and
    deletes what was written, if there is no training shard."""
    limit, tokens_before = record["max_tokens"] or sys.maxsize, record["tokens"]
    if tokens_before:
        print(f"{out_dir}: resuming after {tokens_before:,} tokens", flush=True)
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    on_disk = sum(path.stat().st_size for path in out_dir.glob("*.npy"))
    check_disk(out_dir, max(0, expected * shards.TOKEN_DTYPE().itemsize - on_disk))
    written, progress = record["shards"], out_dir / shards.PROGRESS
    if (out_dir / shards.MANIFEST).exists():  # a finished corpus is continued
        os.replace(out_dir / shards.MANIFEST, progress)
    shards.write_record(progress, record)
    reader = TokenReader(source, record, workers, encoder)
    with (contextlib.closing(reader.stream),
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        while record["tokens"] < limit and reader.has_next():
            split, start = "train" if written else "val", dict(record["position"])
            path = out_dir / f"{name}_{split}_{len(written):06d}.npy"
            count = min(record["shard_tokens"], limit - record["tokens"])
            size_and_sha256 = shards.write_shard(path, reader.take(count, bar.update))
            written.append({"file": path.name, "split": split, **size_and_sha256, "start": start})
            shards.write_record(progress, record)
    if len(written) < 2:
        for file in (progress.name, *(shard["file"] for shard in written)):
            (out_dir / file).unlink()
        raise UserError("the source has no text: nothing to write" if record["tokens"] <= 1 else
                        f"all {record['tokens']:,} tokens fit into the first shard, for validation:"
                        f" lower --shard-tokens, e.g. to {good_size(record['tokens'])}")
    record.pop("counted", None)
    shards.write_record(progress, record)
    os.replace(progress, out_dir / shards.MANIFEST)
    outcomes = "".join(f"; {count:,} {OUTCOMES[name]}"
                       for name, count in record["outcomes"].items() if count)
    print(f"wrote {out_dir}: {record['documents']:,} documents, {record['tokens']:,} tokens, "
          f"{len(written)} shards, the first for validation{outcomes}")
    return record


class TokenReader:
    """Reads the tokens of a source, and keeps account of them in `record`: the `position` of the
    next token, the numbers of `tokens` and `documents`, the `outcomes` of parts read to the end."""

    def __init__(self, source: Source, record: dict, workers: int, encoder: str):
        self.record, self.counted = record, record.get("counted", FIRST)
        self.stream = token_stream(source, record, self.counted, workers, encoder)
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
            new = chunk[max(0, self.counted["tokens"] - self.record["tokens"]) :]
            self.record["documents"] += int(np.count_nonzero(new == EOT_TOKEN))
            self.record["tokens"] += len(chunk)
            show(len(chunk))
            yield chunk


def check_disk(out_dir: Path, needed: int) -> None:
    """Prints how many bytes are needed and free. Raises UserError if there are too few."""
    free = shutil.disk_usage(out_dir).free
    state = f"{out_dir} needs about {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free"
    print(state, flush=True)
    if needed > free:
        raise UserError(f"{state}: free space, choose another --out-dir, or lower --max-tokens")


def token_stream(source: Source, record: dict, counted: dict, workers: int,
                 encoder: str) -> Iterator[np.ndarray]:
    """Yields the tokens (n,) uint16 of each part from the record's position on. When a part has
    been read to its end, its outcomes are added to the record, unless they are `counted`."""
    tokenize, start = partial(tokenize_part, encoder=encoder), record["position"]
    part, skipped = start["part"], start["tokens"]
    for unit in range(start["unit"], source.num_units):
        parts = itertools.islice(source.open_unit(unit), part, None)
        for tokens, outcomes, file in ordered_map(tokenize, parts, workers):
            record["position"] = {"unit": unit, "part": part, "tokens": skipped}
            record["files_read"] = max(file, record.get("files_read", 0))
            yield tokens[skipped:]
            if (unit, part) >= (counted["unit"], counted["part"]):
                for name, count in outcomes.items():
                    record["outcomes"][name] += count
            part, skipped = part + 1, 0
        part, skipped = 0, 0
        record["position"] = FIRST | {"unit": unit + 1}


def ordered_map(function: Callable, items: Iterator, workers: int) -> Iterator:
    """A lazy `map` that runs in worker processes; with one worker, in this one."""
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


def verify_corpus(out_dir: Path) -> None:
    """Compares every shard with its checksum. Raises UserError with the names of damaged ones."""
    entries = shards.read_record(out_dir / shards.MANIFEST)["shards"]
    bar = progress_bar(len(entries), 0, "verifying", unit="shard", over=entries)
    bad = [str(path) for shard in bar if not (path := out_dir / shard["file"]).exists()
           or sha256_of(path) != shard["sha256"]]
    if bad:
        raise UserError(f"{len(bad)} of {len(entries)} shards are missing or damaged: rerun what "
                        f"wrote them after rm -f {' '.join(bad)}")
    print(f"{out_dir} is intact: {len(entries)} shards match their checksums")


def good_size(tokens: int) -> int:
    """A shard size for so many tokens: about a tenth, if possible of whole windows of 1,024."""
    return max(1, tokens // 10 // 1024) * 1024 + 1 if tokens > 2 * 1025 else max(2, tokens // 10)
