"""Stanford Alpaca: 52,002 instructions with their answers, as one JSON file that is checked.

    python finetune_data/alpaca_downloader.py

Writes finetune_data/alpaca.json, a list of {"instruction", "input", "output"}. Does nothing when
that file is already whole.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from config import UserError, first_line, flag, parse_config, run_main
from files import atomic_write

REPO = "tatsu-lab/alpaca"
NUM_ROWS = 52_002
COLUMNS = ["instruction", "input", "output"]


@dataclass(frozen=True)
class AlpacaConfig:
    out: str = flag(str(pathlib.Path(__file__).resolve().parent / "alpaca.json"),
                    "the file to write")
    revision: str = flag("main", "branch, tag or commit of the set on the hub")


def is_whole(path: pathlib.Path, num_rows: int) -> bool:
    """Whether `path` holds the set already. Raises UserError when it holds something else."""
    if not path.exists():
        return False
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        rows = None
    if isinstance(rows, list) and len(rows) == num_rows and all(list(r) == COLUMNS for r in rows):
        return True
    raise UserError(f"{path} exists but is not the {num_rows:,} rows of {REPO}: "
                    "delete it, or choose another --out")


def download(path: pathlib.Path, revision: str, num_rows: int = NUM_ROWS) -> None:
    """Fetches the set from the hub, checks its columns and row count, and writes `path`."""
    from datasets import load_dataset  # slow to import, and not needed when the file is there
    from huggingface_hub.errors import HTTPError  # HTTP status or no connection at all

    try:
        rows = load_dataset(REPO, split="train", revision=revision)
    except (HTTPError, OSError) as error:
        raise UserError(f"cannot fetch {REPO} from the Hugging Face hub ({first_line(error)}): "
                        "check the network and run again") from None
    if not set(COLUMNS) <= set(rows.column_names) or len(rows) != num_rows:
        raise UserError(f"{REPO} at {revision} has {len(rows):,} rows with {rows.column_names}, "
                        f"expected {num_rows:,} rows with {COLUMNS}; choose another --revision")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, text=True) as file:
        json.dump([{name: row[name] for name in COLUMNS} for row in rows], file,
                  ensure_ascii=False, indent=0)


def main() -> None:
    config = parse_config(AlpacaConfig, description=__doc__)
    path = pathlib.Path(config.out)
    if is_whole(path, NUM_ROWS):
        print(f"{path} is already whole: {NUM_ROWS:,} rows")
        return
    download(path, config.revision)
    print(f"wrote {path}: {NUM_ROWS:,} rows")


if __name__ == "__main__":
    run_main(main)
