"""Tokenizes the documentation of Python, NumPy and PyTorch on this machine into shards.

    python pretrain_data/pydocs_corpus.py --out-dir pretrain_data/pydocs

About 15,000 documents (see pydocs.py) and 2.8 million tokens in half a minute, without a network.
The documents are shuffled, so the validation shard is a random sample of them.
"""

import pathlib
import platform
import random
import sys
from dataclasses import dataclass
from importlib.metadata import version

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import ROOT, flag, parse_config, run_main
from pretrain_data.corpus import write_corpus
from pretrain_data.documents import Source, memory_source
from pretrain_data.pydocs import PACKAGES, read_documents


@dataclass(frozen=True)
class CorpusConfig:
    out_dir: str = flag(str(ROOT / "pretrain_data" / "pydocs"), "folder for shards", is_path=True)
    shard_tokens: int = flag(65_536, "tokens per shard, the first for validation", minimum=2)


def shuffled_documents() -> Source:
    documents = read_documents()
    random.Random(1337).shuffle(documents)
    return memory_source([document.text for document in documents])


def main() -> None:
    config = parse_config(CorpusConfig, description=__doc__)
    description = {"name": "pydocs", "python": platform.python_version(),
                   **{package: version(package) for package in PACKAGES}}
    write_corpus(description, shuffled_documents, pathlib.Path(config.out_dir), name="pydocs",
                 shard_tokens=config.shard_tokens)


if __name__ == "__main__":
    run_main(main)
