"""Atomic file writes, checksums, a lock for output folders, and what is text."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import filelock

from minigpt2.config import UserError

INVALID_UTF8 = "surrogateescape"  # codec error handler: invalid bytes become U+DC80 to U+DCFF
RARE = 100_000  # one invalid byte per this many characters is damage, more are an encoding


@contextlib.contextmanager
def atomic_write(path: Path, text: bool = False) -> Iterator[IO]:
    """Opens a temporary file, renamed to `path` if the block succeeds; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    mode, encoding = ("w", "utf-8") if text else ("wb", None)
    if path.parent == Path("/dev") or (path.exists() and not (path.is_file() or path.is_dir())):
        with open(path, mode, encoding=encoding) as file:
            yield file
        return
    try:
        with open(temporary, mode, encoding=encoding, newline="\n" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a failed write() does not set it
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # already renamed, or the folder is not writable
            temporary.unlink()


def write_json(path: Path, content: object) -> None:
    """Writes an object as JSON, atomically; numbers that are not finite become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    with atomic_write(path, text=True) as file:
        file.write(json.dumps(finite, indent=1) + "\n")


def check_folder(folder: Path, what: str) -> None:
    """Raises UserError, about `what`, if nothing can be written into a folder, existing or not."""
    folders = (folder.absolute(), *folder.absolute().parents)
    existing = next(filter(os.path.exists, folders))  # what may not be seen is left out too
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{what} cannot be written: {existing} is "
                        f"{'not writable' if existing.is_dir() else 'not a folder'}")


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk: a rename in it survives a power failure."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems, such as shared folders, cannot flush a folder
            if error.errno != errno.EINVAL or path.is_file():
                raise
        finally:
            os.close(descriptor)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def folder_lock(out_dir: Path) -> Iterator[None]:
    """Locks a folder, created if needed. The system releases the lock of a killed process."""
    try:
        with filelock.FileLock(out_dir / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another process is writing to {out_dir}: use another --out-dir") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise UserError(f"{out_dir}: its file system has no locks: use another") from None


def check_text(path: Path, text: str, before: int = 0) -> None:
    """UserError if a text, after `before` bytes decoded with INVALID_UTF8, is no text in UTF-8."""
    invalid = re.findall("[\udc80-\udcff]", text)
    valid = len(re.findall("[^\0-\x7f]", text)) - len(invalid)
    if "\0" in text or len(invalid) > max(valid, (before + len(text)) // RARE):
        encoding = "UTF-16" if "\0" in text else "WINDOWS-1252"
        start = text.index("\0" if "\0" in text else invalid[0])
        found = text[max(0, start - 20) : start + 20].encode("utf-8", INVALID_UTF8)
        raise UserError(f"{path} is binary or not UTF-8, it has {found!r}: convert it, e.g. from "
                        f"{encoding} with `iconv -f {encoding} -t UTF-8`")
