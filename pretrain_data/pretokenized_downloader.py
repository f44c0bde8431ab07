"""Downloads FineWeb as pre-tokenized shards in llm.c's format, 20 GB (kjj0/fineweb10B-gpt2).

    python pretrain_data/pretokenized_downloader.py                      # 10 billion tokens
    python pretrain_data/pretokenized_downloader.py --max-tokens 1000000000

Each shard is checked against the hub's SHA-256. Run the same command again to resume, or to
download deleted shards; fineweb_downloader.py --verify finds damaged ones.
"""

import itertools
import pathlib
import shutil
import sys
from dataclasses import dataclass

from huggingface_hub import RepoFile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2 import shards
from minigpt2.config import flag, parse_config, run_main
from minigpt2.files import folder_lock, write_json
from minigpt2.hub import fetch, list_files
from minigpt2.progress import progress_bar
from pretrain_data.corpus import check_disk, check_same_corpus

REPO, COMMIT = "kjj0/fineweb10B-gpt2", "889765ea1f903759787add96995d81171b632d0c"


@dataclass(frozen=True)
class PretokenizedConfig:
    out_dir: str = flag(str(pathlib.Path(__file__).resolve().parent / "fineweb-pretokenized"),
                        "folder for the shards", is_path=True)
    max_tokens: int | None = flag(None, "about how many tokens (default: all)", minimum=1)


def select_shards(files: list[RepoFile], max_tokens: int) -> list[RepoFile]:
    """The validation shard and as many training shards, at least one, as hold `max_tokens`."""
    files = sorted(files, key=lambda file: ("_val_" not in file.path, file.path))
    ends = itertools.accumulate(file.size // 2 for file in files)
    return files[: max(2, 1 + sum(end < max_tokens for end in ends))]


def main() -> None:
    config = parse_config(PretokenizedConfig, description=__doc__)
    files = select_shards(list_files(REPO, COMMIT, "fineweb_*_*.bin"),
                          config.max_tokens or sys.maxsize)
    source, done = {"name": REPO, "revision": COMMIT}, []
    out_dir = pathlib.Path(config.out_dir)
    with folder_lock(out_dir):
        manifest, progress = out_dir / shards.MANIFEST, out_dir / shards.PROGRESS
        for path in filter(pathlib.Path.exists, (progress, manifest)):
            check_same_corpus(out_dir, shards.read_record(path), {"source": source})
        check_disk(out_dir, sum(f.size for f in files if not (out_dir / f.path).exists()))
        if not manifest.exists():  # else the corpus stays usable until it is extended
            write_json(progress, {"source": source, "shards": []})
        for file in progress_bar(len(files), 0, "downloading", unit="shard", over=files):
            path = fetch(REPO, COMMIT, file, out_dir)
            done.append({"file": file.path, "split": file.path.split("_")[1],
                         "tokens": len(shards.open_shard(path)), "sha256": file.lfs.sha256})
        tokens = sum(shard["tokens"] for shard in done)
        write_json(manifest, {"source": source, "tokens": tokens, "shards": done})
        progress.unlink(missing_ok=True)
    shutil.rmtree(out_dir / ".cache", ignore_errors=True)  # download metadata of the hub's client
    print(f"wrote {out_dir}: {tokens:,} tokens, {len(done)} shards, the first for validation")


if __name__ == "__main__":
    run_main(main)
