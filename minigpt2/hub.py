"""Downloads dataset files from the Hugging Face hub, verified by the size and SHA-256 it lists."""

import fnmatch
import time
from collections.abc import Callable
from errno import EACCES, EROFS
from pathlib import Path

import huggingface_hub  # loads its modules lazily

from minigpt2.config import NO_SPACE, UserError, first_line
from minigpt2.files import sha256_of

PERMANENT = {400, 401, 403, 404, 410, 416}  # HTTP status codes that are not retried
INITIAL_DELAY_S, MAX_DELAY_S = 2.0, 300.0  # before a retry; doubled after every failure


def retried(request: Callable, what: str, retries: int = 8):
    """Returns request(), retried while the network or the hub fails. Raises UserError on `what`."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()  # hides the client's own messages
    for attempt in range(retries + 1):
        try:
            return request()
        except (HTTPError, OSError, RuntimeError) as error:  # the Xet client's: RuntimeError
            if isinstance(error, OSError) and error.errno in {*NO_SPACE, EACCES, EROFS}:
                raise  # a fault of this machine
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, OfflineModeIsEnabled) or status in PERMANENT or attempt == retries:
                raise UserError(f"cannot download {what} from the hub ({first_line(error)}): "
                                "check network, access and commit, then rerun") from None
            delay = min(INITIAL_DELAY_S * 2**attempt, MAX_DELAY_S)
            print(f"{what}: {first_line(error)}; retrying in {delay:g} s")
            time.sleep(delay)


def list_files(repo: str, commit: str, pattern: str) -> list:
    """The RepoFiles that match a pattern such as "data/*.parquet", by path. Raises UserError."""
    api, folder = huggingface_hub.HfApi(), pattern.rpartition("/")[0]
    entries = retried(lambda: list(api.list_repo_tree(
        repo, folder or None, revision=commit, repo_type="dataset")), f"{repo} at {commit}")
    files = [entry for entry in entries if isinstance(entry, huggingface_hub.RepoFile)
             and fnmatch.fnmatchcase(entry.path, pattern)]
    if not files:
        raise UserError(f"{repo} has no {pattern} at {commit}")
    return sorted(files, key=lambda file: file.path)


def fetch(repo: str, commit: str, file: "huggingface_hub.RepoFile", folder: Path) -> Path:
    """Downloads a file into `folder`, unless it is there, and verifies it. Raises UserError."""
    for left in (folder / ".cache").rglob("*.incomplete"):  # of a killed run, never resumed
        left.unlink(missing_ok=True)

    def request() -> Path:
        path = Path(huggingface_hub.hf_hub_download(
            repo, file.path, repo_type="dataset", revision=commit, local_dir=folder))
        # files that the hub stores in git are small and have no SHA-256
        if path.stat().st_size != file.size or (file.lfs and file.lfs.sha256 != sha256_of(path)):
            path.unlink()
            raise OSError(f"size or SHA-256 of {file.path} differs from the hub's")
        return path

    return retried(request, f"{repo} {file.path}")
