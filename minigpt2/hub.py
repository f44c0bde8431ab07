"""Files of a data set on the Hugging Face hub, at one commit, verified.

The hub's own client lists and downloads. Here are the patience of a run that nobody watches, the
check of every file against the size and the SHA-256 that the hub announces, and errors of one line.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from minigpt2.config import NO_SPACE, UserError, first_line
from minigpt2.files import sha256_of

PERMANENT = {400, 401, 403, 404, 410, 416}  # HTTP: asking again will not help
LONGEST_WAIT = 300  # seconds between two attempts
COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """One file of a data set at one commit."""

    repo: str
    commit: str
    path: str
    size: int  # bytes
    sha256: str | None  # None for small files that the hub keeps in git


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after what first wait in seconds (then doubled), a request is repeated."""

    retries: int
    wait: float

    def attempt(self, what: str, call):
        """call(), again and again while the network or the hub fails. Raises UserError."""
        from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its own retries and warnings: what matters is said here

        for number in range(self.retries + 1):
            try:
                return call()
            # an HTTP status, no connection, or (as the hub's storage client puts it) RuntimeError
            except (HTTPError, OSError, RuntimeError) as error:
                if isinstance(error, OSError) and error.errno in NO_SPACE:
                    raise
                response = getattr(error, "response", None)
                status = getattr(response, "status_code", None)
                # "not found locally" is what the client says of a hub that does not answer
                absent = status in PERMANENT or (isinstance(error, FileNotFoundError) and not
                                                 isinstance(error, LocalEntryNotFoundError))
                if number == self.retries or absent:
                    raise UserError(f"cannot fetch {what} from the Hugging Face hub "
                                    f"({first_line(error)}): check the network and run again, "
                                    "which goes on from here") from None
                seconds = min(self.wait * 2**number, LONGEST_WAIT)
                print(f"{what}: {first_line(error)}; trying again in {seconds:g} s", flush=True)
                time.sleep(seconds)


def find_commit(repo: str, revision: str, patience: RetryPolicy) -> str:
    """The commit that a branch, a tag or a commit of a data set means now; the hub is not asked for
    a commit's. Raises UserError."""
    from huggingface_hub import HfApi  # slow to import, and not needed for local files

    if COMMIT.fullmatch(revision):
        return revision
    return patience.attempt(f"{repo} at {revision}",
                            lambda: HfApi().dataset_info(repo, revision=revision).sha)


def list_files(repo: str, commit: str, folder: str, patience: RetryPolicy) -> list[HubFile]:
    """The files of a folder ("" for the root) of a data set, by name. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def ask() -> list[HubFile]:
        entries = HfApi().list_repo_tree(repo, folder or None, repo_type="dataset", revision=commit)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return [HubFile(repo, commit, file.path, file.size, file.lfs and file.lfs.sha256)
                for file in sorted(files, key=lambda file: file.path)]

    return patience.attempt(f"{repo} at {commit}", ask)


def fetch(file: HubFile, folder: Path, patience: RetryPolicy) -> Path:
    """Downloads a file below `folder`, unless it is there already, and checks it. Halves of files
    that earlier runs left in the folder are removed. Raises UserError."""
    from huggingface_hub import hf_hub_download

    for half in folder.rglob("*.incomplete"):
        half.unlink()

    def download() -> Path:
        path = Path(hf_hub_download(file.repo, file.path, repo_type="dataset",
                                    revision=file.commit, local_dir=folder))
        if path.stat().st_size != file.size or file.sha256 not in (None, sha256_of(path)):
            path.unlink()
            raise OSError(f"size or SHA-256 of {file.path} is not what the hub announced")
        return path

    return patience.attempt(f"{file.repo} {file.path}", download)
