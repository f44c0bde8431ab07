"""Downloads Stanford Alpaca, 52,002 instructions with responses, into one JSON file.

    python finetune_data/alpaca_downloader.py               # tatsu-lab/alpaca
    python finetune_data/alpaca_downloader.py --cleaned     # yahma/alpaca-cleaned, 51,760 rows

Writes finetune_data/alpaca.json (or alpaca_cleaned.json), a list of {"instruction", "input",
"output"}. Does nothing if that file exists.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.files import atomic_write
from minigpt2.hub import RetryPolicy

COLUMNS = ["instruction", "input", "output"]


@dataclass(frozen=True)
class HubDataset:
    repo: str
    commit: str
    num_rows: int  # at this commit
    file: str  # written beside this script


ALPACA = HubDataset("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", 52_002,
                    "alpaca.json")
CLEANED = HubDataset("yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639", 51_760,
                     "alpaca_cleaned.json")


@dataclass(frozen=True)
class AlpacaConfig:
    out: str | None = flag(None, "file to write (default: beside this script)", is_path=True)
    cleaned: bool = flag(False, "the cleaned variant, yahma/alpaca-cleaned")
    revision: str | None = flag(None, "branch, tag or commit on the hub (default: a pinned commit)")
    retries: int = flag(5, "retries of a failed request, with exponential backoff", minimum=0)


def download(path: pathlib.Path, dataset: HubDataset, revision: str, retry: RetryPolicy) -> None:
    """Downloads the training split, checks its columns and row count, and writes `path`."""
    from datasets import load_dataset  # slow to import, and not needed if the file is complete

    rows = retry.call(lambda: load_dataset(dataset.repo, split="train", revision=revision),
                      f"{dataset.repo} at {revision}")
    if not set(COLUMNS) <= set(rows.column_names) or rows.num_rows != dataset.num_rows:
        raise UserError(f"{dataset.repo} at {revision} has {rows.num_rows:,} rows with columns "
                        f"{rows.column_names}, expected {dataset.num_rows:,} rows with {COLUMNS}; "
                        "choose another --revision")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, text=True) as file:
        json.dump(rows.select_columns(COLUMNS).to_list(), file, ensure_ascii=False, indent=0)


def main() -> None:
    config = parse_config(AlpacaConfig, description=__doc__)
    dataset = CLEANED if config.cleaned else ALPACA
    path = pathlib.Path(config.out or pathlib.Path(__file__).resolve().parent / dataset.file)
    if path.exists():  # it was renamed into place when it was complete
        print(f"{path} exists already: delete it to download it again")
        return
    download(path, dataset, config.revision or dataset.commit, RetryPolicy(config.retries))
    print(f"wrote {path}: {dataset.num_rows:,} rows")


if __name__ == "__main__":
    run_main(main)
