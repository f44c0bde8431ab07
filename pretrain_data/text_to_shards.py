"""Tokenizes your own text into shards.

    python pretrain_data/text_to_shards.py stories/ --out-dir data/stories
    python pretrain_data/text_to_shards.py all.txt --separator '<|endoftext|>' --out-dir DIR
    python pretrain_data/text_to_shards.py 'dir/*.parquet' a.jsonl --text-column story --out-dir DIR

Reads .txt files (one document each, or several with --separator), JSON Lines (.jsonl or .json,
perhaps gzipped) and parquet. The first twentieth of all tokens is for validation: mix the documents
before. If it is stopped, the same command resumes it. More in docs/data.md.
"""

import pathlib
import sys
from dataclasses import dataclass

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from minigpt2.config import UserError, flag, parse_config, run_main
from pretrain_data.corpus import BYTES_PER_TOKEN, SHARD_TOKENS, write_corpus
from pretrain_data.documents import TEXT_COLUMN, file_format, local_source


@dataclass(frozen=True)
class TextConfig:
    inputs: tuple[str, ...] = flag((), "files, folders, patterns", positional=True, is_path=True)
    out_dir: str | None = flag(None, "folder for the shards", is_path=True)
    text_column: str = flag(TEXT_COLUMN, "parquet column or JSON key with the text")
    workers: int = flag(0, "tokenizing processes; 0: one per core", minimum=0)
    separator: str | None = flag(None, "what separates documents in .txt files; \\n: a line end")


def validation_tokens(tokens: int) -> int:
    """How many of about this many tokens are for validation: a twentieth; if possible, a window of
    1,024 but at most a quarter, and at most what trainer.py validates on by default."""
    return max(1, min(max(tokens // 20, 1025), tokens // 4, 10 * 2**20 + 1))


def main() -> None:
    config = parse_config(TextConfig, description=__doc__)
    if not (config.inputs and config.out_dir):
        raise UserError("no input or no --out-dir, expected INPUT... --out-dir DIR")
    out_dir = pathlib.Path(config.out_dir)
    if any(out_dir.resolve() in pathlib.Path(one, "x").resolve().parents for one in config.inputs):
        raise UserError(f"--out-dir {out_dir} holds an input: use a folder of its own")
    separator = config.separator and config.separator.replace("\\n", "\n").replace("\r\n", "\n")
    options = {"separator": separator, "column": config.text_column}
    description, source = local_source(config.inputs, **options)
    is_txt = {file_format(name) == ".txt" for name in description["files"]}
    if len(is_txt) == 1 and (config.text_column != TEXT_COLUMN if True in is_txt else separator):
        print(f"{'--text-column' if True in is_txt else '--separator'} is ignored for these files")
    write_corpus(description, lambda: source, out_dir, name="text",
                 shard_tokens=SHARD_TOKENS, workers=config.workers,
                 val_tokens=validation_tokens(int(source.text_bytes / BYTES_PER_TOKEN)))


if __name__ == "__main__":
    run_main(main)
