"""Atomic file writes, checksums, and a lock for output folders."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from minigpt2.config import UserError


@contextlib.contextmanager
def atomic_write(path: Path, text: bool = False) -> Iterator[IO]:
    """Opens a temporary file, flushes it to disk and renames it to `path` when the block succeeds.
    On an error the temporary file is removed and `path` is left unchanged."""
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
        error.filename = error.filename or str(path)  # a failed write() does not set it
        raise
    finally:
        with contextlib.suppress(OSError):  # already renamed, or the folder is not writable
            temporary.unlink()


def check_folder(folder: Path, what: str) -> None:
    """Raises UserError, about `what`, if nothing can be written into a folder, existing or not."""
    existing = folder.absolute()
    while not os.path.exists(existing):  # False as well for what may not be seen
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what} cannot be written: {existing} is "
                        f"{'not writable' if existing.is_dir() else 'not a folder'}")


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk, so that a rename in it survives a power failure."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
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
    """Locks a folder against other processes; the system releases the lock of a killed process."""
    try:
        lock = filelock.FileLock(out_dir / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"another process is writing to {out_dir}: wait for it, or choose another "
                        "--out-dir") from None
    with lock:
        yield
