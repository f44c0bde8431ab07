"""Downloads a subset of Anthropic's hh-rlhf, human preferences between two answers.

    python rlhf_data/hh_rlhf_downloader.py                           # helpful-base, 46,189 pairs
    python rlhf_data/hh_rlhf_downloader.py --subset harmless-base    # offensive by design

Writes rlhf_data/hh_SUBSET_train.jsonl and hh_SUBSET_test.jsonl, rows of two transcripts, {"chosen",
"rejected"}. Files are checked against the hub's SHA-256. Files that exist already are kept.
"""

import gzip
import json
import pathlib
import shutil
import sys
from dataclasses import dataclass
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import atomic_write, folder_lock
from minigpt2.hub import RetryPolicy, fetch, find_commit, list_files

REPO, COMMIT = "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
NUM_ROWS = {  # train, test
    "helpful-base": (43_835, 2_354), "harmless-base": (42_537, 2_312),
    "helpful-online": (22_007, 1_137), "helpful-rejection-sampled": (52_421, 2_749)}


@dataclass(frozen=True)
class HHConfig:
    subset: Literal["helpful-base", "harmless-base", "helpful-online",
                    "helpful-rejection-sampled"] = flag("helpful-base", "which part to download")
    out_dir: str = flag(str(pathlib.Path(__file__).resolve().parent), "folder to write to",
                        is_path=True)
    revision: str = flag(COMMIT, "branch, tag or commit on the hub")
    retries: int = flag(5, "retries of a failed request, with exponential backoff", minimum=0)


def download_split(config: HHConfig, split: str, num_rows: int, path: pathlib.Path) -> None:
    """Downloads one file, unpacks and checks it, and writes `path`. Raises UserError."""
    retry, name = RetryPolicy(config.retries), f"{config.subset}/{split}.jsonl.gz"
    commit, folder = find_commit(REPO, config.revision, retry), path.parent / ".hh_rlhf"
    files = [file for file in list_files(REPO, commit, config.subset, retry) if file.path == name]
    if not files:
        raise UserError(f"{REPO} at {commit} has no {name}: choose another --revision")
    content = gzip.decompress(fetch(REPO, commit, files[0], folder, retry).read_bytes())
    try:
        rows = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        rows = []
    if len(rows) != num_rows or not all(isinstance(row, dict) and {"chosen", "rejected"}
                                        <= row.keys() for row in rows):
        raise UserError(f"{name} at {commit} does not hold the {num_rows:,} pairs of {REPO}: "
                        "choose another --revision")
    with atomic_write(path) as file:
        file.write(content)
    shutil.rmtree(folder)


def main() -> None:
    config = parse_config(HHConfig, description=__doc__)
    out_dir = pathlib.Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock(out_dir):
        for split, num_rows in zip(("train", "test"), NUM_ROWS[config.subset], strict=True):
            path = out_dir / f"hh_{config.subset.replace('-', '_')}_{split}.jsonl"
            if not path.exists():  # it is renamed into place when it is complete
                download_split(config, split, num_rows, path)
            print(f"{path}: {num_rows:,} pairs")


if __name__ == "__main__":
    run_main(main)
