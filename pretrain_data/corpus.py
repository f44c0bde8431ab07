"""Builds a corpus: tokenizes documents and writes token shards.

    source -> parts -> worker processes (read, tokenize) -> one writer, in order -> shards, manifest

Each document becomes <|endoftext|> followed by its tokens. The token stream is cut every
`shard_tokens` tokens; the first shard is the validation split, the others are for training. Parts
are written in the order of the source: the shards are byte-identical for any number of workers.

A folder is unfinished until it has a `manifest.json`. Its `progress.json` says which tokens are
safely on disk, and a killed build resumes from there. It is written between two parts, after a
flush to disk: when a unit of the source is done, and about once a second.
"""

import contextlib
import functools
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
from pathlib import Path

import numpy as np

from minigpt2 import shards
from minigpt2.config import UserError
from minigpt2.files import atomic_write, folder_lock, sha256_of, sync_folder
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_whitespace, encode_to_array, repair
from pretrain_data.documents import Part, Source

COMMIT_SECONDS = 1.0  # a killed build loses at most this much work and one part
BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
CHECK_EVERY = 100  # every 100th document is also encoded with tiktoken, if that is not the encoder
OUTCOMES = {"empty": "had no text and were skipped",
            "failed": "could not be encoded and were skipped",
            "repaired": "had invalid characters, now U+FFFD",
            "cut": "had very long runs of whitespace, encoded in pieces"}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1,
                 encoder: str = "tiktoken") -> dict:
    """Tokenizes a source into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `description` identifies the documents; a folder with another one in its manifest is refused.
    An unfinished build is resumed, and so is a finished one with a smaller max_tokens. In a
    finished folder, missing and truncated shards are rebuilt. Raises UserError if the folder holds
    another corpus or is in use, if the disk is full, or if the tokens fill only one shard.
    """
    settings = {"source": description, "shard_tokens": shard_tokens,
                "tokenizer": {"name": "gpt2", "sha256": {k: v[1] for k, v in VOCABULARY.items()}}}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the first shard, which is for "
                        f"validation: lower --shard-tokens {shard_tokens}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        if (out_dir / shards.MANIFEST).exists():
            manifest = shards.read_manifest(out_dir)
            check_same_corpus(out_dir, manifest, settings, max_tokens)
            rebuild_missing_shards(open_source, out_dir, manifest, workers, encoder)
            if manifest["max_tokens"] == max_tokens:
                return manifest
            reopen(out_dir, manifest)
        return write_shards(open_source(), out_dir, name, settings, max_tokens, workers, encoder)


def check_same_corpus(out_dir: Path, record: dict, settings: dict, max_tokens: int | None) -> None:
    """Raises UserError if a manifest or progress record has other settings or too many tokens."""
    for key, value in settings.items():
        if record.get(key) != value:
            raise UserError(f"{out_dir} holds another corpus: its {key} is "
                            f"{record.get(key)!s:.150}, expected {value!s:.150}; choose another "
                            "--out-dir, or delete that folder")
    if max_tokens is not None and record["tokens"] > max_tokens:
        raise UserError(f"{out_dir} already holds {record['tokens']:,} tokens, more than "
                        f"--max-tokens {max_tokens:,}: choose another --out-dir, or delete it")


def reopen(out_dir: Path, manifest: dict) -> None:
    """Turns a finished folder into an unfinished one that can be resumed."""
    *complete, last = manifest["shards"]
    path = out_dir / last["file"]
    if sha256_of(path) != last["sha256"]:
        raise UserError(f"{path} is damaged, so it cannot be extended: rm -f {path} and run again "
                        "to rebuild it")
    if last["tokens"] == manifest["shard_tokens"]:
        complete.append(last)
    record = manifest | {"shards": complete, "open_start": last["start"]}
    shards.write_record(out_dir / shards.PROGRESS, record)
    (out_dir / shards.MANIFEST).unlink()  # a build killed just before this line runs `reopen` again
    sync_folder(out_dir)


def load_progress(out_dir: Path, settings: dict, max_tokens: int | None) -> dict:
    """The record of an unfinished build, or a new one. A build may resume after one of its local
    files has changed: most likely, a damaged file stopped it and was replaced."""
    record = settings | {"max_tokens": max_tokens, "documents": 0, "tokens": 0,
                         "outcomes": dict.fromkeys(OUTCOMES, 0),
                         "position": shards.Position()._asdict(), "shards": [], "open_start": None}
    if not (out_dir / shards.PROGRESS).exists():
        return record
    progress = shards.read_record(out_dir / shards.PROGRESS)
    old, new = (saved.get("source", {}).get("files", {}) for saved in (progress, settings))
    changed = [name for name in new if old.get(name) != new[name]]
    if list(old) == list(new) and len(changed) == 1:
        print(f"{changed[0]} has changed since this build began: assuming it was repaired")
        progress["source"] = settings["source"]
    check_same_corpus(out_dir, progress, settings, max_tokens)
    print(f"{out_dir} is unfinished: resuming after {progress['tokens']:,} tokens", flush=True)
    return record | progress | {"max_tokens": max_tokens}


def write_shards(source: Source, out_dir: Path, name: str, settings: dict, max_tokens: int | None,
                 workers: int, encoder: str) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it."""
    record = load_progress(out_dir, settings, max_tokens)
    writer, tokens_before = shards.ShardWriter(out_dir, name, record), record["tokens"]
    limit = max_tokens or sys.maxsize
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    check_disk(out_dir, source.scratch_bytes + shards.shard_bytes(max(0, expected - tokens_before)))
    writer.commit()
    t0 = committed = time.monotonic()
    position = shards.Position(**record["position"])
    outcomes = record["outcomes"] = Counter(record["outcomes"])
    with (contextlib.closing(token_stream(source, position, workers, encoder)) as stream,
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        for start, tokens, part_outcomes in stream:
            unit_done = start.unit > position.unit
            record["position"] = start._asdict()
            if unit_done or time.monotonic() - committed > COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
            if unit_done:
                source.release_unit(position.unit)
            position = start
            tokens = tokens[: limit - record["tokens"]]
            writer.add(tokens, start)
            bar.update(len(tokens))
            if record["tokens"] == limit:
                break
            outcomes.update(part_outcomes)
    manifest = writer.finish()
    report(out_dir, manifest, manifest["tokens"] - tokens_before, time.monotonic() - t0)
    return manifest


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


def token_stream(source: Source, position: shards.Position, workers: int,
                 encoder: str) -> Iterator[tuple[shards.Position, np.ndarray, Counter]]:
    """Yields (start, tokens, outcomes) for each part from `position` on. After the last part of a
    unit, yields the start of the next unit with no tokens."""
    tokenize = functools.partial(tokenize_part, encoder=encoder)
    with worker_map(workers) as ordered_map:
        while position.unit < source.num_units:
            parts = itertools.islice(source.open_unit(position.unit), position.part, None)
            for tokens, outcomes in ordered_map(tokenize, parts):
                yield position, tokens[position.tokens :], outcomes
                position = shards.Position(position.unit, position.part + 1)
            position = shards.Position(position.unit + 1)
            yield position, np.empty(0, dtype=shards.TOKEN_DTYPE), Counter()


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


def tokenize_part(part: Part, encoder: str) -> tuple[np.ndarray, Counter]:
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
            tokens = encode_to_array(valid, encoder)
        except ValueError:  # tiktoken's regular expression failed: skip this document only
            outcomes["failed"] += 1
            continue
        if (encoder != "tiktoken" and number % CHECK_EVERY == 0
                and not np.array_equal(tokens, encode_to_array(valid))):
            raise UserError(f"--encoder {encoder} and tiktoken give different ids for the document "
                            f"{text[:60]!r}: omit the flag, and delete the shards written with it")
        outcomes["repaired"] += valid != text
        outcomes["cut"] += len(cut_whitespace(valid)) > 1
        arrays += [tokens] if continues else [eot, tokens]
    return np.concatenate(arrays, dtype=shards.TOKEN_DTYPE, casting="unsafe"), outcomes


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 61)  # ProcessPoolExecutor's limit on Windows


def rebuild_missing_shards(open_source: Callable[[], Source], out_dir: Path, manifest: dict,
                           workers: int, encoder: str) -> None:
    """Rebuilds the shards of a finished folder that are missing or have another size. Raises
    UserError if their checksums differ from the manifest's."""
    missing = [shard for shard in manifest["shards"]
               if not (path := out_dir / shard["file"]).exists()
               or path.stat().st_size != shards.shard_bytes(shard["tokens"])]
    source = open_source() if missing else None
    for shard in missing:
        path, remaining = out_dir / shard["file"], shard["tokens"]
        print(f"{path} is missing or damaged: rebuilding it", flush=True)
        stream = token_stream(source, shards.Position(**shard["start"]), workers, encoder)
        with contextlib.closing(stream), atomic_write(path) as file:
            file.write(shards.shard_header(shard["tokens"]))
            while remaining and (item := next(stream, None)):
                tokens = item[1][:remaining]
                file.write(tokens.data)
                remaining -= len(tokens)
        if sha256_of(path) != shard["sha256"]:
            path.unlink()
            raise UserError(f"{path} cannot be rebuilt, its source has changed: delete {out_dir} "
                            "and run again")
    print(f"{out_dir} is {'complete again' if missing else 'already complete'}: "
          f"{manifest['tokens']:,} tokens, {len(manifest['shards'])} shards")


def verify_corpus(out_dir: Path) -> None:
    """Compares every shard with its checksum. Raises UserError with the names of damaged ones."""
    entries, bad = shards.read_manifest(out_dir)["shards"], []
    if not all("sha256" in shard for shard in entries):
        raise UserError(f"{out_dir} has no {shards.MANIFEST} with checksums to verify against")
    for shard in progress_bar(len(entries), 0, "verifying", unit="shard", over=entries):
        path = out_dir / shard["file"]
        if not path.exists() or sha256_of(path) != shard["sha256"]:
            bad.append(str(path))
    if bad:
        raise UserError(f"{len(bad)} of {len(entries)} shards are missing or damaged: delete them "
                        "and rerun the command that wrote them, which rebuilds only those: "
                        f"rm -f {' '.join(bad)}")
    print(f"{out_dir} is intact: {len(entries)} shards match their checksums")
