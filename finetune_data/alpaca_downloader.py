"""Downloads Stanford Alpaca, 52,002 instructions with responses, into one JSON file.

    python finetune_data/alpaca_downloader.py               # tatsu-lab/alpaca
    python finetune_data/alpaca_downloader.py --cleaned     # yahma/alpaca-cleaned, 51,760 rows

Writes finetune_data/alpaca.json (or alpaca_cleaned.json), a list of {"instruction", "input",
"output"}. Does nothing if that file exists.
"""

import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from finetune_data.rows import download_rows
from minigpt2.config import flag, parse_config, run_main

ALPACA = ("tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017",
          "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "alpaca.json")
CLEANED = ("yahma/alpaca-cleaned", "12567cabf869d7c92e573c7c783905fc160e9639",
           "alpaca_data_cleaned.json", "alpaca_cleaned.json")


@dataclass(frozen=True)
class AlpacaConfig:
    out: str | None = flag(None, "file to write (default: beside this script)", is_path=True)
    cleaned: bool = flag(False, "the cleaned variant, yahma/alpaca-cleaned")


def main() -> None:
    config = parse_config(AlpacaConfig, description=__doc__)
    *dataset, name = CLEANED if config.cleaned else ALPACA
    path = pathlib.Path(config.out or pathlib.Path(__file__).resolve().parent / name)
    download_rows(*dataset, ("instruction", "input", "output"), path)


if __name__ == "__main__":
    run_main(main)
