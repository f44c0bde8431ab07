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
import copy
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
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_runs, encode_to_array, repair
from pretrain_data.documents import EOT_TEXT, Part, Source

COMMIT_SECONDS = 1.0  # a killed build loses at most this much work and one part
BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
CURSOR = ("documents", "tokens", "outcomes", "position", "open_start")  # in a build's record
OUTCOMES = {"empty": "had no text and were skipped",
            "failed": "could not be encoded and were skipped",
            "repaired": "had invalid characters, now U+FFFD",
            "cut": "had very long runs of one kind of character, encoded in pieces",
            "marked": f"contain {EOT_TEXT}, encoded as text (--split-eot splits .txt files there)"}


def write_corpus(description: dict, open_source: Callable[[], Source], out_dir: Path, *, name: str,
                 shard_tokens: int, max_tokens: int | None = None, workers: int = 1,
                 file_counts: dict | None = None) -> dict:
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
                        f"validation: lower --shard-tokens {shard_tokens}, e.g. to "
                        f"{shards.good_size(max_tokens)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        if (out_dir / shards.MANIFEST).exists():
            manifest = shards.read_manifest(out_dir)
            check_same_corpus(out_dir, manifest, settings, max_tokens)
            rebuild_missing_shards(open_source, out_dir, manifest, workers)
            if manifest["max_tokens"] == max_tokens:
                return manifest
            reopen(out_dir, manifest)
        record = load_progress(out_dir, settings, max_tokens)
        record |= {"files": file_counts} if file_counts else {}
        return write_shards(open_source(), out_dir, name, record, workers)


def check_same_corpus(out_dir: Path, record: dict, settings: dict, max_tokens: int | None) -> None:
    """Raises UserError if a manifest or progress record has other settings or too many tokens."""
    for key, new in settings.items():
        if (old := record.get(key)) != new:
            found = ((changed_files(old, new) if key == "source" else "")
                     or f"its {key} is {old!s:.150}, expected {new!s:.150}")
            raise UserError(f"{out_dir} holds another corpus: {found}; choose another --out-dir, "
                            f"or delete that folder to begin anew: rm -r {out_dir}")
    if max_tokens is not None and record["tokens"] > max_tokens:
        raise UserError(f"{out_dir} already holds {record['tokens']:,} tokens, more than "
                        f"--max-tokens {max_tokens:,}: choose another --out-dir, or delete it")


def changed_files(old: dict | None, new: dict) -> str:
    """The local files in which two sources differ, "" if there are none."""
    old, new = (old or {}).get("files", {}), new.get("files", {})
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    changes = [name + (" is new" if name not in old else " is missing" if name not in new
                       else " has changed") for name in names[:3]]
    more = [f"{len(names) - 3:,} more"] if len(names) > 3 else []
    return ", ".join(changes + more) if old else ""


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
    """The record of an unfinished build, or a new one. Raises UserError if the source has changed.
    A file that stopped the build may have: the record holds nothing of it."""
    record = settings | {"max_tokens": max_tokens, "documents": 0, "tokens": 0,
                         "outcomes": dict.fromkeys(OUTCOMES, 0),
                         "position": shards.Position()._asdict(), "shards": [], "open_start": None}
    if not (out_dir / shards.PROGRESS).exists():
        return record
    progress = shards.read_record(out_dir / shards.PROGRESS)
    damaged, files = progress.pop("damaged", None), settings["source"].get("files", {})
    if damaged in files:
        progress["source"]["files"][damaged] = files[damaged]
    check_same_corpus(out_dir, progress, settings, max_tokens)
    print(f"{out_dir}: resuming after {progress['tokens']:,} tokens"
          + (f" and reading {damaged} anew" if damaged else ""), flush=True)
    return record | progress | {"max_tokens": max_tokens}


def write_shards(source: Source, out_dir: Path, name: str, record: dict, workers: int) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it."""
    writer, tokens_before = shards.ShardWriter(out_dir, name, record), record["tokens"]
    limit = record["max_tokens"] or sys.maxsize
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    check_disk(out_dir, source.scratch_bytes + shards.shard_bytes(max(0, expected - tokens_before)))
    writer.commit()
    t0 = committed = time.monotonic()
    position = shards.Position(**record["position"])
    outcomes = record["outcomes"] = Counter(record["outcomes"])
    with (forget_damaged_file(writer),
          contextlib.closing(token_stream(source, position, workers)) as stream,
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        for start, tokens, part_outcomes, file in stream:
            unit_done = start.unit > position.unit
            record["position"] = start._asdict()
            if unit_done or time.monotonic() - committed > COMMIT_SECONDS:
                writer.commit()
                committed = time.monotonic()
            if unit_done:
                source.release_unit(position.unit)
            position = start
            if file is not None and not start.tokens:
                record["file_start"] = {
                    "file": file, "num_shards": len(record["shards"]),
                    "cursor": {key: copy.copy(record[key]) for key in CURSOR}}
            tokens = tokens[: limit - record["tokens"]]
            writer.add(tokens, start)
            bar.update(len(tokens))
            if record["tokens"] == limit:
                break
            outcomes.update(part_outcomes)
    manifest = writer.finish()
    report(out_dir, manifest, manifest["tokens"] - tokens_before, time.monotonic() - t0)
    return manifest


@contextlib.contextmanager
def forget_damaged_file(writer: shards.ShardWriter) -> Iterator[None]:
    """If a local file cannot be read, drops the tokens of that file and notes its name: the next
    run may find it repaired, and resumes with nothing of the damaged version."""
    try:
        yield
    except UserError as error:
        record, start = writer.record, writer.record.get("file_start")
        order = list(record["source"].get("files", ()))
        if (damaged := getattr(error, "file", None)) in order:  # local_files.py sets it
            begun = order.index(start["file"]) if start else len(order) if record["tokens"] else 0
            if order.index(damaged) >= begun:
                record["damaged"] = damaged
            if start and start["file"] == damaged:
                writer.roll_back(start["cursor"], start["num_shards"])
            writer.commit()
        raise


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
                 ) -> Iterator[tuple[shards.Position, np.ndarray, Counter, str | None]]:
    """Yields (start, tokens, outcomes, name of a file that starts here) for each part from
    `position` on, and after each unit the start of the next one with no tokens."""
    with worker_map(workers) as ordered_map:
        while position.unit < source.num_units:
            parts = itertools.islice(source.open_unit(position.unit), position.part, None)
            for tokens, outcomes, file in ordered_map(tokenize_part, parts):
                yield position, tokens[position.tokens :], outcomes, file
                position = shards.Position(position.unit, position.part + 1)
            position = shards.Position(position.unit + 1)
            yield position, np.empty(0, dtype=shards.TOKEN_DTYPE), Counter(), None


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


def tokenize_part(part: Part) -> tuple[np.ndarray, Counter, str | None]:
    """Tokenizes the documents of a part: (tokens (n,) uint16, counts of OUTCOMES, part.starts)."""
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
        outcomes["marked"] += EOT_TEXT in valid
        arrays += [tokens] if continues else [eot, tokens]
    tokens = np.concatenate(arrays, dtype=shards.TOKEN_DTYPE, casting="unsafe")
    return tokens, outcomes, part.starts


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 61)  # ProcessPoolExecutor's limit on Windows


def rebuild_missing_shards(open_source: Callable[[], Source], out_dir: Path, manifest: dict,
                           workers: int) -> None:
    """Rebuilds the shards of a finished folder that are missing or have another size. Raises
    UserError if their checksums differ from the manifest's."""
    missing = [shard for shard in manifest["shards"]
               if not (path := out_dir / shard["file"]).exists()
               or path.stat().st_size != shards.shard_bytes(shard["tokens"])]
    source = open_source() if missing else None
    for shard in missing:
        path, remaining = out_dir / shard["file"], shard["tokens"]
        print(f"{path} is missing or damaged: rebuilding it", flush=True)
        stream = token_stream(source, shards.Position(**shard["start"]), workers)
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
