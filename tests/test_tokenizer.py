"""The GPT-2 tokenizer against Hugging Face's, the prompt template, and streaming."""

import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.common import ROOT, script_env, user_error

from chat import StreamDecoder
from minigpt2 import tokenizer
from minigpt2.tokenizer import (
    EOT_TOKEN,
    decode,
    encode,
    encode_example,
    encode_to_array,
    format_prompt,
    load_tokenizer,
    repair,
    vocabulary_path,
)

TEXTS = {
    "plain": "Hello, I'm a language model, and I've been trained on 40GB of text.",
    "unicode": "Ünïcödé 日本語 текст عربى 👩‍👩‍👧‍👦 \u200b\ufeff naïve café ﬁ",
    "white space": "  a\n\n\n\tb   \r\n    def f(x):\n        return x   \n" + " " * 57 + "\n\n   ",
    "special": "before<|endoftext|>after <|endoftext|><|im_start|> [PAD]",
    "numbers": "1234567890 3.14159 0x7f 1,000,000 '''s 're we'll DON'T",
    "control": "\x00\x01\x1f\x7f\u2028 null\x00byte",
    "empty": "",
}


@pytest.fixture(scope="module")
def reference():
    """Hugging Face's GPT-2 tokenizer, from the same two files."""
    from transformers import GPT2TokenizerFast
    return GPT2TokenizerFast(vocab=str(vocabulary_path("vocab.json")),
                             merges=str(vocabulary_path("merges.txt")))


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_the_reference(name, reference):
    text = TEXTS[name]
    # split_special_tokens: "<|endoftext|>" is encoded as text
    assert encode(text) == reference.encode(text, split_special_tokens=True)
    assert decode(encode(text)) == text


def test_known_ids():
    assert encode("Hello world") == [15496, 995]
    assert encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
    assert EOT_TOKEN not in encode(TEXTS["special"])
    assert decode([EOT_TOKEN]) == "<|endoftext|>"


@pytest.mark.parametrize("name", TEXTS)
def test_encode_to_array(name):
    tokens = encode_to_array(TEXTS[name])
    assert tokens.dtype == np.uint32 and tokens.tolist() == encode(TEXTS[name])
    assert encode(TEXTS[name]) == load_tokenizer().encode_ordinary(TEXTS[name])


def test_a_run_of_spaces_that_overflows_tiktoken():
    text = "x" + " " * 1_000_001 + "y" + "\n" * 600_000 + "z"
    ids = encode(text)
    assert decode(ids) == text
    assert ids[: 1_000_002] == [87, *[220] * 1_000_000, 331]  # like a short run
    assert encode("x" + " " * 101 + "y") == [87, *[220] * 100, 331]


@pytest.mark.parametrize("run", ["a", "ACGT", "日本", "12", "-=", "_", "\n"])
def test_long_runs_are_cut(run):
    """A single word of 24 MB would take 1.1 GB to encode; text with borders is not cut."""
    MAX = tokenizer.MAX_RUN
    text = "start " + run * (2_000_000 // len(run)) + " end"
    pieces = tokenizer.cut_runs(text)
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * MAX and len(pieces) > 6
    assert len(tokenizer.cut_runs((run * 9 + " x1. ") * 100_000)) == 1
    short = "start " + run * (MAX // len(run)) + " end"
    assert len(tokenizer.cut_runs(short)) <= 2


def test_lone_surrogates_become_replacement_characters():
    assert repair("a\ud800b\U0001f600") == "a\ufffdb\U0001f600"
    assert decode(encode("a\ud800b")) == "a\ufffdb"


def test_a_damaged_vocabulary_is_refused(tmp_path, monkeypatch):
    for name, (file, _) in tokenizer.VOCABULARY.items():
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(vocabulary_path(name), target)
    broken = tmp_path / tokenizer.VOCABULARY["merges.txt"][0]
    broken.write_bytes(broken.read_bytes().replace(b"\xc4\xa0 t\n", b"\xc4\xa0 q\n", 1))

    class Distribution:
        def locate_file(self, file):
            return tmp_path / file

    monkeypatch.setattr(tokenizer, "distribution", lambda name: Distribution())
    check = vocabulary_path.__wrapped__  # without the cache
    assert check("vocab.json").is_file()
    for _ in range(2):  # damaged, then missing
        message = user_error(check, "merges.txt")
        assert "vocab.bpe" in message and "not installed or damaged: pip install" in message
        broken.unlink(missing_ok=True)


def test_no_network_is_needed(tmp_path):
    """In a new process without caches, where opening a socket fails."""
    code = ("import socket\n"
            "def refuse(*a, **k): raise OSError('no network in this test')\n"
            "socket.socket = socket.create_connection = refuse\n"
            "from minigpt2 import tokenizer\nprint(tokenizer.encode('Hello world'))\n")
    environment = script_env() | {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                            capture_output=True)
    assert result.stdout.strip() == "[15496, 995]", result.stderr


def test_the_template_is_that_of_alpaca():
    plain = format_prompt("Name {three} colors.")
    assert plain == ("Below is an instruction that describes a task. Write a response that "
                     "appropriately completes the request.\n\n### Instruction:\n"
                     "Name {three} colors.\n\n### Response:\n")
    both = format_prompt("Add.", "{0} and 2")
    assert both == ("Below is an instruction that describes a task, paired with an input that "
                    "provides further context. Write a response that appropriately completes the "
                    "request.\n\n### Instruction:\nAdd.\n\n### Input:\n{0} and 2\n\n"
                    "### Response:\n")


def test_prompt_and_response_are_encoded_separately():
    prompt, response = encode_example("Say hi.", "", "hi <|endoftext|>")
    assert prompt == encode(format_prompt("Say hi.")) and EOT_TOKEN not in prompt
    assert response[-1] == EOT_TOKEN and response.count(EOT_TOKEN) == 1
    assert decode(response[:-1]) == "hi <|endoftext|>"


def test_streamed_pieces_join_to_the_full_text():
    """Random ids, random bytes and emoji, one by one and several at a time."""
    rng = random.Random(0)
    byte_ids = [load_tokenizer().encode_single_token(bytes([i])) for i in range(256)]
    emoji = "\U0001F468\u200D\U0001F469\u200D\U0001F467 \U0001F1E9\U0001F1EA caf\u00e9 \u4f60\u597d"
    cases = [[byte_ids[i] for i in text.encode()] for text in (emoji, "a" + emoji * 3)]
    cases += [[rng.choice(byte_ids) for _ in range(n)] for n in (1, 2, 3, *[60] * 40)]
    cases += [[rng.randrange(50256) for _ in range(40)] for _ in range(40)]
    cases += [encode(emoji), encode(emoji)[:-1], [], [byte_ids[0xF0], byte_ids[0x9F]]]
    for ids in cases:
        for longest in (1, 4):
            decoder, pieces, start = StreamDecoder(), [], 0
            while start < len(ids):
                end = start + rng.randint(1, longest)
                pieces.append(decoder.feed(ids[start:end]))
                start = end
            pieces.append(decoder.feed([], final=True))
            assert "".join(pieces) == decode(ids)


def test_incomplete_characters_are_held_back():
    decoder = StreamDecoder()
    byte_ids = [load_tokenizer().encode_single_token(bytes([i])) for i in "a\u20acb".encode()]
    assert [decoder.feed([i]) for i in byte_ids] == ["a", "", "", "\u20ac", "b"]
    assert decoder.feed([], final=True) == ""
