"""Stanford Alpaca: 52,002 instructions with their answers, as one JSON file that is checked.

    python finetune_data/alpaca_downloader.py               # tatsu-lab/alpaca
    python finetune_data/alpaca_downloader.py --cleaned     # 51,760 rows, mistakes mended

Writes finetune_data/alpaca.json (or alpaca_cleaned.json), a list of {"instruction", "input",
"output"}. Does nothing when that file is already whole.
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
class Set:
    """A data set on the hub, and what it must hold at the commit this script was written for."""

    repo: str
    commit: str
    num_rows: int
    file: str


ALPACA = Set("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", 52_002, "alpaca.json")
CLEANED = Set("yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639", 51_760,
              "alpaca_cleaned.json")


@dataclass(frozen=True)
class AlpacaConfig:
    out: str | None = flag(None, "the file to write (default: beside this script)")
    cleaned: bool = flag(False, "the cleaned variant, yahma/alpaca-cleaned")
    revision: str | None = flag(None, "branch, tag or commit of the set on the hub (default: the "
                                      "one this script was written for)")
    retries: int = flag(5, "repetitions of a request that failed", minimum=0)
    retry_wait: float = flag(2.0, "seconds before the first repetition, doubled each time",
                             minimum=0)


def is_whole(path: pathlib.Path, wanted: Set) -> bool:
    """Whether `path` holds the set already. Raises UserError when it holds something else."""
    if not path.exists():
        return False
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if (isinstance(rows, list) and len(rows) == wanted.num_rows
            and all(isinstance(row, dict) and list(row) == COLUMNS for row in rows)):
        return True
    raise UserError(f"{path} exists but is not the {wanted.num_rows:,} rows of {wanted.repo}: "
                    "delete it, or choose another --out")


def download(path: pathlib.Path, wanted: Set, revision: str, patience: RetryPolicy) -> None:
    """Fetches the set from the hub, checks its columns and row count, and writes `path`."""
    from datasets import load_dataset  # slow to import, and not needed when the file is there

    rows = patience.attempt(f"{wanted.repo} at {revision}",
                            lambda: load_dataset(wanted.repo, split="train", revision=revision))
    if not set(COLUMNS) <= set(rows.column_names) or len(rows) != wanted.num_rows:
        raise UserError(f"{wanted.repo} at {revision} has {len(rows):,} rows with "
                        f"{rows.column_names}, expected {wanted.num_rows:,} rows with {COLUMNS}; "
                        "choose another --revision")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, text=True) as file:
        json.dump([{name: row[name] for name in COLUMNS} for row in rows], file,
                  ensure_ascii=False, indent=0)


def main() -> None:
    config = parse_config(AlpacaConfig, description=__doc__)
    wanted = CLEANED if config.cleaned else ALPACA
    path = pathlib.Path(config.out or pathlib.Path(__file__).resolve().parent / wanted.file)
    if is_whole(path, wanted):
        print(f"{path} is already whole: {wanted.num_rows:,} rows")
        return
    download(path, wanted, config.revision or wanted.commit,
             RetryPolicy(config.retries, config.retry_wait))
    print(f"wrote {path}: {wanted.num_rows:,} rows")


if __name__ == "__main__":
    run_main(main)
