"""Files that are whole or absent: written under a temporary name, flushed to disk, then renamed."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from minigpt2.config import UserError

LOCK = ".lock"


@contextlib.contextmanager
def atomic_write(path: Path, text: bool = False) -> Iterator[IO]:
    """Opens a temporary neighbour of `path` for writing; on success it becomes `path`.

    On any error the temporary file is removed and what was at `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    mode, encoding = ("w", "utf-8") if text else ("wb", None)
    try:
        with open(temporary, mode, encoding=encoding, newline="\n" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write() does not name its file
        raise
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written to has none
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` survive a power cut, where folders can be opened at all."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def folder_lock(out_dir: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system takes back from a process that dies."""
    lock = filelock.FileLock(out_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is writing to {out_dir}: wait for it, or choose another "
                        "--out-dir") from None
    try:
        yield
    finally:
        lock.release()
