"""Builds a corpus: tokenizes documents and writes token shards.

    source -> parts -> worker processes (read, tokenize) -> one writer, in order -> shards, manifest

Each document becomes <|endoftext|> followed by its tokens. The token stream is cut every
`shard_tokens` tokens; the first shard is the validation split, the others are for training. Parts
are written in the order of the source: the shards are byte-identical for any number of workers.

A folder is unfinished until it has a `manifest.json`. Until then its record is `progress.json`,
written after each shard: a killed build resumes at the first token of its incomplete shard.
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
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minigpt2 import shards
from minigpt2.config import UserError
from minigpt2.files import folder_lock, sha256_of
from minigpt2.progress import progress_bar
from minigpt2.tokenizer import EOT_TOKEN, VOCABULARY, cut_runs, encode_to_array, repair
from pretrain_data.documents import EOT_TEXT, Part, Source

BYTES_PER_TOKEN = 4.0  # of text, for estimates: English web text has 4.5, source code 3
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
    return f"{len(names):,} changed files: {', '.join(names[:3])}" if old and names else ""


def reopen(out_dir: Path, manifest: dict) -> None:
    """Makes a finished folder unfinished, so that it can be extended."""
    last = manifest["shards"][-1]
    if sha256_of(path := out_dir / last["file"]) != last["sha256"]:
        raise UserError(f"{path} is damaged, so it cannot be extended: rm -f {path} and run again "
                        "to rebuild it")
    os.replace(out_dir / shards.MANIFEST, out_dir / shards.PROGRESS)


def load_progress(out_dir: Path, settings: dict, max_tokens: int | None) -> dict:
    """The record of an unfinished build, or a new one. Raises UserError if the source has changed;
    only local files that no complete shard has tokens of may have."""
    if not (out_dir / shards.PROGRESS).exists():
        return settings | {"max_tokens": max_tokens, "documents": 0, "tokens": 0,
                           "outcomes": dict.fromkeys(OUTCOMES, 0),
                           "position": {"unit": 0, "part": 0, "tokens": 0}, "shards": []}
    progress = shards.read_record(out_dir / shards.PROGRESS)
    if "open_start" in progress:
        raise UserError(f"{out_dir} was begun by an older version of this script and cannot be "
                        f"resumed: rm -r {out_dir} and run again")
    old, new = (record.get("source", {}).get("files", {}) for record in (progress, settings))
    for file in list(old)[progress.get("files_read", len(old)) :]:
        old[file] = new.get(file, old[file])
    check_same_corpus(out_dir, progress, settings, max_tokens)
    print(f"{out_dir}: resuming after {progress['tokens']:,} tokens", flush=True)
    return progress | {"max_tokens": max_tokens}


def write_shards(source: Source, out_dir: Path, name: str, record: dict, workers: int) -> dict:
    """Writes the shards that are missing, then the manifest, and returns it. Raises UserError, and
    deletes what was written, if there is no training shard."""
    limit, tokens_before = record["max_tokens"] or sys.maxsize, record["tokens"]
    expected = min(int(source.text_bytes / BYTES_PER_TOKEN), limit)
    check_disk(out_dir, source.scratch_bytes + shards.shard_bytes(max(0, expected - tokens_before)))
    shards.write_record(out_dir / shards.PROGRESS, record)
    t0, reader = time.monotonic(), TokenReader(source, record, workers)
    with (contextlib.closing(reader.stream),
          progress_bar(expected, tokens_before, "tokenizing", unit="token") as bar):
        while record["tokens"] < limit and reader.has_next():
            write_next_shard(reader, out_dir, name, limit, bar)
            shards.write_record(out_dir / shards.PROGRESS, record)
    if len(record["shards"]) < 2:
        for file in (shards.PROGRESS, *(shard["file"] for shard in record["shards"])):
            (out_dir / file).unlink()
        tokens = record["tokens"]
        raise UserError("the source has no text: nothing to write" if tokens <= 1 else
                        f"all {tokens:,} tokens fit into the first shard, which is for "
                        f"validation: lower --shard-tokens, e.g. to {shards.good_size(tokens)}")
    record.pop("files_read", None)
    shards.write_record(out_dir / shards.PROGRESS, record)
    os.replace(out_dir / shards.PROGRESS, out_dir / shards.MANIFEST)
    report(out_dir, record, record["tokens"] - tokens_before, time.monotonic() - t0)
    return record


def write_next_shard(reader: "TokenReader", out_dir: Path, name: str, limit: int,
                     bar: tqdm) -> None:
    """Writes one more shard and enters it in the record. A last shard that is short, because the
    build had a smaller max_tokens, is completed instead."""
    record, written = reader.record, reader.record["shards"]
    begun, start = np.empty(0, shards.TOKEN_DTYPE), record["position"]
    if written and written[-1]["tokens"] < record["shard_tokens"]:
        last = written.pop()  # its file is already longer if the build was killed right here
        begun = np.array(shards.open_shard(out_dir / last["file"])[: last["tokens"]])
        start = last["start"]
    split = "train" if written else "val"
    path = out_dir / f"{name}_{split}_{len(written):06d}.npy"
    chunks = reader.take(min(record["shard_tokens"] - len(begun), limit - record["tokens"]), bar)
    tokens, sha256 = shards.write_shard(path, itertools.chain([begun], chunks))
    written.append({"file": path.name, "split": split, "tokens": tokens, "sha256": sha256,
                    "start": start})


class TokenReader:
    """Reads the tokens of a source, and keeps account of them in `record`: the `position` of the
    next token, the numbers of `tokens` and `documents`, the `outcomes` of parts read to the end."""

    def __init__(self, source: Source, record: dict, workers: int):
        self.record, record["outcomes"] = record, Counter(record["outcomes"])
        self.stream = token_stream(source, record["position"], workers)
        self.rest, self.outcomes = np.empty(0, shards.TOKEN_DTYPE), Counter()  # of the current part

    def has_next(self) -> bool:
        """Whether there is another token. If so, `position` is in its part."""
        while not len(self.rest):
            item = next(self.stream, None)
            if item is None:
                return False
            self.record["outcomes"].update(self.outcomes)
            self.record["position"], self.rest, self.outcomes, file = item
            if file:
                self.record["files_read"] = file
        return True

    def take(self, count: int, bar: tqdm) -> Iterator[np.ndarray]:
        """Yields arrays (n,) uint16 of `count` tokens together, fewer at the end of the source."""
        while count and self.has_next():
            chunk, self.rest = self.rest[:count], self.rest[count:]
            count -= len(chunk)
            position = self.record["position"]
            self.record["position"] = position | {"tokens": position["tokens"] + len(chunk)}
            self.record["tokens"] += len(chunk)
            self.record["documents"] += int(np.count_nonzero(chunk == EOT_TOKEN))
            bar.update(len(chunk))
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


def token_stream(source: Source, start: dict, workers: int,
                 ) -> Iterator[tuple[dict, np.ndarray, Counter, int]]:
    """Yields (position, tokens, outcomes, file) for each part from `start` on, and after each unit
    the start of the next one with no tokens."""
    part, skipped = start["part"], start["tokens"]
    with worker_map(workers) as ordered_map:
        for unit in range(start["unit"], source.num_units):
            parts = itertools.islice(source.open_unit(unit), part, None)
            for tokens, outcomes, file in ordered_map(tokenize_part, parts):
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


def tokenize_part(part: Part) -> tuple[np.ndarray, Counter, int]:
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
            tokens = encode_to_array(valid)
        except ValueError:  # tiktoken's regular expression failed: skip this document only
            outcomes["failed"] += 1
            continue
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
                           workers: int) -> None:
    """Rebuilds the shards of a finished folder that are missing or have another size. Raises
    UserError if their checksums differ from the manifest's."""
    missing = [shard for shard in manifest["shards"]
               if not (path := out_dir / shard["file"]).exists()
               or path.stat().st_size != shards.shard_bytes(shard["tokens"])]
    source = open_source() if missing else None
    for shard in missing:
        path, reader = out_dir / shard["file"], TokenReader(source, manifest | {
            "position": shard["start"]}, workers)
        print(f"{path} is missing or damaged: rebuilding it", flush=True)
        with (contextlib.closing(reader.stream),
              progress_bar(shard["tokens"], 0, "rebuilding", unit="token") as bar):
            _, sha256 = shards.write_shard(path, reader.take(shard["tokens"], bar))
        if sha256 != shard["sha256"]:
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
