"""Local files as the source of a corpus: which ones are read, and whether they have changed.

A folder stands for all files below it, and a pattern for all files and folders that it matches.
Files of the formats in SUFFIXES are read, in any letter case, sorted by path. Links are followed,
and no file is read twice. Hidden files and folders are skipped, unless `--files` names them.
"""

import dataclasses
import glob
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minigpt2.config import UserError
from minigpt2.files import sha256_of
from minigpt2.shards import MANIFEST, PROGRESS
from pretrain_data import documents
from pretrain_data.documents import SUFFIXES, Part, Source, file_format


def local_source(pattern: str, split_eot: bool) -> tuple[dict, Callable[[], Source], dict]:
    """(description, function that opens the source, counts) of the files of a path or a glob. All
    files are hashed, in threads. Raises UserError for files that are not text."""
    paths, counts = select_files(pattern)
    print(f"reading files: {counts['read']}, skipped: {counts['skipped'] or 'none'}", flush=True)
    if not paths:
        raise UserError(f"--files {pattern} matches no file to read, skipped: {counts['skipped']}, "
                        f"expected {', '.join(SUFFIXES)}; quote the pattern")
    for path in paths:
        documents.check_head(path)
    source = file_source(paths, split_eot)  # before hashing: it notices changes from now on
    root = os.path.commonpath([path.parent for path in paths])
    with ThreadPoolExecutor() as pool:
        files = {os.path.relpath(path, root): digest
                 for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)}
    split = {"split_eot": True} if split_eot else {}
    return {"name": "files", **split, "files": files}, lambda: source, counts


def select_files(pattern: str) -> tuple[list[Path], dict]:
    """The files of a path or a glob; how many are read, by format, and skipped, by reason."""
    skipped = defaultdict(set)  # an existing path is not a pattern, even if it has brackets
    roots = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
    paths = sorted(set(walk(roots, skipped)))
    return paths, {"read": dict(sorted(Counter(map(file_format, paths)).items())),
                   "skipped": {reason: len(skipped[reason]) for reason in sorted(skipped)}}


def walk(roots: list[str], skipped: dict[str, set]) -> Iterator[Path]:
    """The files to read, by the first of several paths to one. Adds others to `skipped`."""
    seen, level = {}, set(map(os.path.normpath, roots))
    while level:
        below = set()
        for path in sorted(level):
            if seen.setdefault(os.path.realpath(path), path) != path:
                skipped["a link to another"].add(path)
            elif os.path.isdir(path):
                for name in os.listdir(path):  # fails if the folder is not readable
                    found = skipped["hidden"] if name.startswith(".") else below
                    found.add(os.path.join(path, name))
            elif not file_format(path) or os.path.basename(path) in (MANIFEST, PROGRESS):
                skipped["another format"].add(path)
            elif os.path.exists(path) and not os.path.isfile(path):
                skipped["not a regular file"].add(path)
            else:  # a broken link fails when it is read
                yield Path(path)
        level = below


def stamp_of(path: Path) -> tuple[int, int, int]:
    """What changes with a file: its size, and the times of the last change of content and inode."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def file_source(paths: list[Path], split_eot: bool = False) -> Source:
    """A source of local files, read in the given order. A file that changes from now on, until it
    is read, raises UserError."""
    stamps = list(map(stamp_of, paths))

    def open_unit(unit: int) -> Iterator[Part]:
        for number, (path, stamp) in enumerate(zip(paths, stamps, strict=True), 1):
            for part in documents.open_parts(path, split_eot):
                if stamp_of(path) != stamp:
                    raise UserError(f"{path} changed while it was read: run again to read it anew")
                yield dataclasses.replace(part, file=number)

    return Source(1, open_unit, sum(map(documents.text_bytes, paths)))
