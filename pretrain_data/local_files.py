"""Local files as the source of a corpus: which ones are read, and whether they have changed.

A folder stands for all files below it, and a pattern for all files and folders that it matches.
Files of the formats in SUFFIXES are read, in any letter case, sorted by path. Links are followed,
and no file is read twice. Hidden files and folders are skipped, unless `--files` names them.
"""

import contextlib
import functools
import glob
import hashlib
import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minigpt2.config import UserError
from minigpt2.files import sha256_of
from minigpt2.shards import MANIFEST, PROGRESS, read_record
from pretrain_data import documents
from pretrain_data.documents import SUFFIXES, Part, Source, file_format


def local_source(pattern: str, out_dir: Path, split_eot: bool = False,
                 ) -> tuple[dict, Callable[[], Source], dict]:
    """(description, function that opens the source, counts) of the files of a path or a glob. All
    files are hashed, in threads. A corpus of the first version of this project keeps its files and
    fingerprints. Raises UserError for files that are not text."""
    records = [read_record(out_dir / name) for name in (MANIFEST, PROGRESS)
               if (out_dir / name).exists()]
    recorded = records[0].get("source", {}).get("files", {}) if records else {}
    is_first_form = any(isinstance(fingerprint, list) for fingerprint in recorded.values())
    paths, counts = first_selection(pattern) if is_first_form else select_files(pattern)
    print(f"reading files: {counts['read']}, skipped: {counts['skipped'] or 'none'}", flush=True)
    if not paths:
        raise UserError(f"--files {pattern} matches no file to read, skipped: {counts['skipped']}, "
                        f"expected {', '.join(SUFFIXES)}; quote the pattern")
    stamps = list(map(stamp_of, paths))
    for path in paths if not is_first_form else ():
        documents.check_head(path)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(first_fingerprint if is_first_form else sha256_of, paths)
        files = dict(zip(relative_names(paths).values(), digests, strict=True))
    split = {"split_eot": True} if split_eot else {}
    return ({"name": "files", **split, "files": files},
            functools.partial(file_source, paths, stamps, split_eot), counts)


def select_files(pattern: str) -> tuple[list[Path], dict]:
    """The files of a path or a glob; how many are read, by format, and skipped, by reason."""
    skipped = defaultdict(set)  # an existing path is not a pattern, even if it has brackets
    roots = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(walk(roots, skipped))
    return paths, {"read": dict(sorted(Counter(map(file_format, paths)).items())),
                   "skipped": {reason: len(skipped[reason]) for reason in sorted(skipped)}}


def walk(roots: list[str], skipped: dict[str, set]) -> Iterator[Path]:
    """The files to read, with the shortest of several paths to one. Adds others to `skipped`."""
    seen, waiting = {}, [(path.count(os.sep), path) for path in map(os.path.normpath, roots)]
    heapq.heapify(waiting)
    while waiting:
        depth, path = heapq.heappop(waiting)
        real = os.path.realpath(path)
        if seen.setdefault(real, path) != path:
            skipped["a link to another"].add(path)
        elif waiting and waiting[0][1] == path:
            continue  # matched by the pattern, and below a folder that matches
        elif os.path.isdir(path):
            for name in os.listdir(path):  # fails if the folder is not readable
                if name.startswith("."):
                    skipped["hidden"].add(os.path.join(path, name))
                else:
                    heapq.heappush(waiting, (depth + 1, os.path.join(path, name)))
        elif not file_format(path) or os.path.basename(path) in (MANIFEST, PROGRESS):
            skipped["another format"].add(path)
        elif os.path.exists(path) and not os.path.isfile(path):
            skipped["not a regular file"].add(path)
        else:  # a broken link fails when it is read
            yield Path(path)


def first_selection(pattern: str) -> tuple[list[Path], dict]:
    folder = Path(pattern)
    paths = folder.rglob("*") if folder.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    suffixes = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
    paths = sorted(path for path in paths if path.name.endswith(suffixes) and path.is_file())
    return paths, {"read": len(paths), "skipped": "not counted"}


def first_fingerprint(path: Path) -> list:
    """[size, SHA-256 of the first and last 64 KiB]"""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        return [size, hashlib.sha256(head + file.read()).hexdigest()]


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes with a file: its size, and the times of the last change of content and inode."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def relative_names(paths: Iterable[Path]) -> dict[Path, str]:
    """Path -> path relative to the deepest folder that holds all files."""
    root = os.path.commonpath([path.parent for path in paths])
    return {path: os.path.relpath(path, root) for path in paths}


def file_source(paths: list[Path], stamps: list[tuple] | None = None,
                split_eot: bool = False) -> Source:
    """A source of local files, read in the given order. Each part checks the stamp of its file,
    taken before it was hashed. A UserError about a file has its name as `file`."""
    stamps = stamps or list(map(stamp_of, paths))

    def open_unit(unit: int) -> Iterator[Part]:
        for (path, name), stamp in zip(relative_names(paths).items(), stamps, strict=True):
            starts = name
            with name_file(name):
                for part in documents.open_parts(path, split_eot):
                    read = functools.partial(read_unchanged, path, stamp, name, part.read)
                    yield Part(read, part.continues, starts)
                    starts = None

    return Source(1, open_unit, sum(map(documents.text_bytes, paths)))


def read_unchanged(path: Path, stamp: tuple, name: str,
                   read: Callable[[], Iterable[str | None]]) -> Iterator[str | None]:
    with name_file(name):
        yield from read()
        if stamp_of(path) != stamp:
            raise UserError(f"{path} changed while it was read: run again to read it anew")


@contextlib.contextmanager
def name_file(name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        error.file = name
        raise
