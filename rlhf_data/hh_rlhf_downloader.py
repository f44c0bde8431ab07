"""Downloads a subset of Anthropic's hh-rlhf, human preferences between two answers.

    python rlhf_data/hh_rlhf_downloader.py                           # helpful-base, 46,189 pairs
    python rlhf_data/hh_rlhf_downloader.py --subset harmless-base    # offensive by design

Writes rlhf_data/hh_SUBSET_train.jsonl and hh_SUBSET_test.jsonl, rows of two transcripts, {"chosen",
"rejected"}. Files that exist already are kept.
"""

import pathlib
import sys
from dataclasses import dataclass
from typing import Literal

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from finetune_data.rows import download_rows
from minigpt2.config import ROOT, flag, parse_config, run_main

REPO, COMMIT = "Anthropic/hh-rlhf", "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"


@dataclass(frozen=True)
class HHConfig:
    subset: Literal["helpful-base", "harmless-base", "helpful-online",
                    "helpful-rejection-sampled"] = flag("helpful-base", "which part to download")
    out_dir: str = flag(str(ROOT / "rlhf_data"), "folder to write to", is_path=True)


def main() -> None:
    config = parse_config(HHConfig, description=__doc__)
    for split in ("train", "test"):
        name = f"hh_{config.subset.replace('-', '_')}_{split}.jsonl"
        download_rows(REPO, COMMIT, f"{config.subset}/{split}.jsonl.gz", ("chosen", "rejected"),
                      pathlib.Path(config.out_dir) / name)


if __name__ == "__main__":
    run_main(main)
