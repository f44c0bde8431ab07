"""Documents in, verified token shards out: the one way from text to what `shards.py` reads.

    source -> parts -> worker processes (read, tokenize) -> one ordered writer -> shards + manifest

Every document becomes <|endoftext|> and its tokens; the stream is cut every `shard_tokens` tokens.
The first shard is the validation split, the others are for training. Parts come back in the order
they went out, so that the shards are the same bytes for any number of workers.

A folder is unfinished as long as it has no `manifest.json`. Until then `progress.json` says how far
the tokens on disk are good, and a run that was killed goes on from there. It is written when a
shard is full and else about once a second, always between two parts and after a flush to the disk.
"""

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from minigpt2.config import UserError
from minigpt2.files import folder_lock, sha256_of, sync_folder
from minigpt2.progress import progress_bar
from minigpt2.shards import (
    MANIFEST,
    PROGRESS,
    TOKEN_DTYPE,
    Position,
    ShardWriter,
    read_manifest,
    read_record,
    shard_header,
    write_manifest,
    write_progress,
    write_shard,
)
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_whitespace, encode_to_array, repair
from pretrain_data.documents import Part, Source

COMMIT_SECONDS = 1.0  # the most work, beside a part, that a killed run does again
BYTES_PER_TOKEN = 4.0  # of text, for the estimates; English web text has 4.5, source code 3
CHECK_EVERY = 100  # one document of so many goes through tiktoken too, if another encoder is used
# What can befall a document, and how the manifest counts it
OUTCOMES = {"empty": "had no text and were skipped",
            "failed": "could not be encoded and were skipped",
            "repaired": "had invalid characters, now U+FFFD",
            "cut": "had white space too long for the tokenizer's pattern, encoded in pieces"}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1,
                 encoder: str = "tiktoken") -> dict:
    """Tokenizes a source into OUT_DIR/{name}_{split}_{index}.npy and returns the manifest.

    `description` goes into the manifest and must hold whatever decides what the documents are; the
    source is opened only if there is something to do. An unfinished folder is gone on with, and so
    is a finished one that stopped at a smaller max_tokens; in a finished one, shards that are
    missing or too short are made again. Raises UserError for a folder that holds another corpus or
    is being written by another process, for too little disk, and for too few tokens to fill more
    than the validation shard.
    """
    settings = {"source": description, "shard_tokens": shard_tokens,
                "tokenizer": {"name": "gpt2", "sha256": {k: v[1] for k, v in VOCABULARY.items()}}}
    if max_tokens is not None and max_tokens <= shard_tokens:
        raise UserError(f"--max-tokens {max_tokens} fills only the first shard, which is for "
                        f"validation: lower --shard-tokens ({shard_tokens}) below it")
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        if (out_dir / MANIFEST).exists():
            manifest = check_same(out_dir, read_manifest(out_dir), settings, max_tokens)
            if manifest["max_tokens"] == max_tokens:
                remake_missing_shards(open_source, out_dir, manifest, workers, encoder)
                return manifest
            remake_missing_shards(open_source, out_dir, manifest, workers, encoder)
            reopen(out_dir, manifest)
        return write_shards(open_source(), out_dir, name, settings, max_tokens, workers, encoder)


def check_same(out_dir: Path, found: dict, settings: dict, max_tokens: int | None) -> dict:
    """The record of a folder (manifest or progress), if it is of the corpus that is asked for."""
    for key, value in settings.items():
        if found.get(key) != value:
            raise UserError(f"{out_dir} holds another corpus: its {key} is "
                            f"{found.get(key)!s:.150}, asked for is {value!s:.150}; use another "
                            "--out-dir, or delete that one")
    if max_tokens is not None and found["tokens"] > max_tokens:
        raise UserError(f"{out_dir} holds {found['tokens']:,} tokens already, --max-tokens is "
                        f"{max_tokens:,}: use another --out-dir, or delete that one")
    return found


def reopen(out_dir: Path, manifest: dict) -> None:
    """Turns a finished folder into one that is unfinished and can be gone on with."""
    *whole, last = manifest["shards"]
    path = out_dir / last["file"]
    if sha256_of(path) != last["sha256"]:
        raise UserError(f"{path} is damaged and cannot be gone on with: rm -f {path} and run "
                        "again, which makes it anew")
    if last["tokens"] == manifest["shard_tokens"]:
        whole.append(last)
    write_progress(out_dir, manifest | {"shards": whole, "open_start": last["start"]})
    (out_dir / MANIFEST).unlink()  # a run killed just before this line comes here again
    sync_folder(out_dir)


def write_shards(source: Source, out_dir: Path, name: str, settings: dict, max_tokens: int | None,
                 workers: int, encoder: str) -> dict:
    """Writes what is missing of the stream, then the manifest."""
    writer = ShardWriter(out_dir, name, settings["shard_tokens"])
    position, outcomes = Position(), Counter(dict.fromkeys(OUTCOMES, 0))
    if (out_dir / PROGRESS).exists():
        record = read_record(out_dir / PROGRESS)
        if mended := mended_file(record.get("source"), settings["source"]):
            print(f"{mended} is not what it was when this was begun: taken for mended", flush=True)
            record["source"] = settings["source"]
        check_same(out_dir, record, settings, max_tokens)
        position, outcomes = Position(**record["position"]), Counter(record["outcomes"])
        writer.resume(record)
        print(f"{out_dir} is unfinished: going on after {writer.total:,} tokens", flush=True)
    expected = expected_tokens(source, max_tokens)
    check_disk(out_dir, source.scratch_bytes
               + max(0, expected - writer.total) * TOKEN_DTYPE().itemsize)
    begun, before = time.monotonic(), writer.total

    def record() -> dict:
        return settings | {"max_tokens": max_tokens, "documents": writer.documents,
                           "tokens": writer.total, "outcomes": dict(outcomes),
                           "position": asdict(position), "shards": writer.shards}

    def commit() -> float:
        writer.flush()
        write_progress(out_dir, record() | {"open_start": writer.open_start})
        return time.monotonic()

    committed, shards = commit(), len(writer.shards)
    with (contextlib.closing(token_stream(source, position, workers, encoder)) as stream,
          progress_bar(expected, writer.total, "tokenizing", unit="token") as bar):
        for start, tokens, part_outcomes in stream:  # all that is before `start` was taken
            last_unit, position = position.unit, start
            if (start.unit > last_unit or len(writer.shards) > shards
                    or time.monotonic() - committed > COMMIT_SECONDS):
                committed, shards = commit(), len(writer.shards)
            if start.unit > last_unit:
                source.release_unit(last_unit)
            if max_tokens is not None:
                tokens = tokens[: max_tokens - writer.total]
            writer.add(tokens, start)
            bar.update(len(tokens))
            if writer.total == max_tokens:
                position = replace(start, tokens=start.tokens + len(tokens))
                break
            outcomes.update(part_outcomes)
    writer.finish()
    write_manifest(out_dir, record())
    (out_dir / PROGRESS).unlink()
    report(out_dir, record(), writer.total - before, time.monotonic() - begun)
    return record()


def mended_file(before: dict | None, now: dict) -> str | None:
    """The one file, if it is only one, in which an unfinished corpus' source differs: the one whose
    damage stopped the run, it is to be hoped, and which was replaced."""
    old, new = (before or {}).get("files"), now.get("files")
    if not old or not new or list(old) != list(new):
        return None
    changed = [name for name in new if list(old[name]) != list(new[name])]
    return changed[0] if len(changed) == 1 else None


def report(out_dir: Path, manifest: dict, tokens: int, seconds: float) -> None:
    """The last line: what was written, and what befell documents that are not as they were."""
    outcomes = [f"{count:,} {OUTCOMES[name]}" for name, count in manifest["outcomes"].items()
                if count]
    print(f"wrote {out_dir}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, "
          f"{len(manifest['shards'])} shards, the first for validation; {tokens / seconds:,.0f} "
          f"tokens/s over {seconds:,.0f} s"
          + "".join(f"; {outcome}" for outcome in outcomes))


def expected_tokens(source: Source, max_tokens: int | None) -> int:
    expected = int(source.text_bytes / BYTES_PER_TOKEN)
    return expected if max_tokens is None else min(expected, max_tokens)


def check_disk(out_dir: Path, needed: int) -> None:
    """Says what disk is needed, in bytes, and what is free. Raises UserError for too little."""
    free = shutil.disk_usage(out_dir).free
    print(f"{out_dir} will take about {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free",
          flush=True)
    if needed > free:
        raise UserError(f"{out_dir} needs about {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB "
                        "are free: free some, choose another --out-dir, or lower --max-tokens")


# --------------------------------------------------------------------------------- the stream


def token_stream(source: Source, position: Position, workers: int,
                 encoder: str) -> Iterator[tuple[Position, np.ndarray, Counter]]:
    """The tokens from `position` on, a part at a time: (where it starts, tokens, outcomes). When a
    unit is done, the start of the next one comes with no tokens."""
    with worker_pool(workers) as pool:
        while position.unit < source.num_units:
            parts = itertools.islice(source.open_unit(position.unit), position.part, None)
            for tokens, outcomes in tokenize_parts(parts, pool, workers, encoder):
                yield position, tokens[position.tokens :], outcomes
                position = Position(position.unit, position.part + 1)
            position = Position(position.unit + 1)
            yield position, np.empty(0, dtype=TOKEN_DTYPE), Counter()


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that tokenize; none for one worker, which is this process."""
    if workers == 1:
        yield None
        return
    # spawn: forking a process that holds threads (torch, Arrow) can deadlock
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"),
                               initializer=leave_with_parent)
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError("a process that tokenizes was killed (out of memory?): run again to go on "
                        "from here, with fewer --workers if it happens again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def leave_with_parent() -> None:
    """In a worker: ends it when the parent is killed, who cannot tell it to any more."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=wait, daemon=True).start()


def tokenize_parts(parts: Iterator[Part], pool: ProcessPoolExecutor | None, workers: int,
                   encoder: str) -> Iterator[tuple[np.ndarray, Counter]]:
    """What `tokenize_part` makes of every part, in order."""
    if pool is None:
        yield from (tokenize_part(part, encoder) for part in parts)
        return
    # a few parts a worker in flight: memory does not grow with the set
    pending = deque(pool.submit(tokenize_part, part, encoder)
                    for part in itertools.islice(parts, 3 * workers))
    while pending:
        result = pending.popleft().result()
        pending.extend(pool.submit(tokenize_part, part, encoder)
                       for part in itertools.islice(parts, 1))
        yield result


def tokenize_part(part: Part, encoder: str) -> tuple[np.ndarray, Counter]:
    """The tokens (n,) uint16 of a part's documents, and what befell some of them."""
    begin = np.array([EOT_TOKEN], dtype=np.uint32)
    arrays, outcomes = [begin[:0]], Counter()
    for number, text in enumerate(part.read()):
        continues = part.continues and number == 0
        if not text and not continues:
            outcomes["empty"] += 1
            continue
        whole = repair(text)
        try:
            tokens = encode_to_array(whole, encoder)
        except ValueError:  # tiktoken's pattern gave up: the document is lost, not its neighbours
            outcomes["failed"] += 1
            continue
        if encoder != "tiktoken" and number % CHECK_EVERY == 0:
            check_encoder(encoder, whole, tokens)
        outcomes["repaired"] += whole != text
        outcomes["cut"] += len(cut_whitespace(whole)) > 1
        arrays += [tokens] if continues else [begin, tokens]
    return np.concatenate(arrays, dtype=TOKEN_DTYPE, casting="unsafe"), outcomes


def check_encoder(encoder: str, text: str, tokens: np.ndarray) -> None:
    if not np.array_equal(tokens, encode_to_array(text)):
        raise UserError(f"--encoder {encoder} gives other ids than tiktoken for the document "
                        f"{text[:60]!r}: leave that flag out, and delete what was written with it")


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 61)  # Windows waits for no more processes than that


# ------------------------------------------------------------------------- a finished folder


def remake_missing_shards(open_source: Callable[[], Source], out_dir: Path, manifest: dict,
                          workers: int, encoder: str) -> None:
    """Makes those shards of a finished folder again whose files are gone or of another size. Raises
    UserError when they do not come out as they were."""
    def is_there(shard: dict) -> bool:
        path, itemsize = out_dir / shard["file"], TOKEN_DTYPE().itemsize
        size = len(shard_header(shard["tokens"])) + shard["tokens"] * itemsize
        return path.exists() and path.stat().st_size == size

    missing = [shard for shard in manifest["shards"] if not is_there(shard)]
    source = open_source() if missing else None
    for shard in missing:
        path, filled = out_dir / shard["file"], 0
        print(f"{path} is missing or damaged: making it again", flush=True)
        tokens = np.empty(shard["tokens"], dtype=TOKEN_DTYPE)
        stream = token_stream(source, Position(**shard["start"]), workers, encoder)
        with contextlib.closing(stream):
            for _, part, _ in stream:
                part = part[: len(tokens) - filled]
                tokens[filled : filled + len(part)] = part
                filled += len(part)
                if filled == len(tokens):
                    break
        write_shard(path, tokens[:filled])
        if sha256_of(path) != shard["sha256"]:
            path.unlink()
            raise UserError(f"{path} cannot be made again, its source gives other tokens now: "
                            f"delete {out_dir} and make it anew")
    print(f"{out_dir} is {'whole again' if missing else 'already whole'}: "
          f"{manifest['tokens']:,} tokens, {len(manifest['shards'])} shards")


def verify_corpus(out_dir: Path) -> None:
    """Compares every shard with its checksum. Raises UserError naming those that are bad."""
    shards, bad = read_manifest(out_dir)["shards"], []
    if not all("sha256" in shard for shard in shards):
        raise UserError(f"{out_dir} has no checksums to verify: its shards are known by their "
                        "names only")
    for shard in progress_bar(len(shards), 0, "verifying", unit="shard", over=shards):
        path = out_dir / shard["file"]
        if not path.exists() or sha256_of(path) != shard["sha256"]:
            bad.append(str(path))
    if bad:
        raise UserError(f"{len(bad)} of {len(shards)} shards are missing or damaged: delete them "
                        "and run the command that made them again, which makes only what is "
                        f"missing: rm -f {' '.join(bad)}")
    print(f"{out_dir} is whole: {len(shards)} shards match their checksums")
