"""The command line of inference.py: prompts in, text or JSON lines out."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from helpers.common import ROOT, TINY, assert_user_error, main_error, script_env

import inference
from inference import generate
from minigpt2.checkpoint import load_model, save_checkpoint
from minigpt2.kernels import can_pack
from minigpt2.tokenizer import ALPACA, EOT_TOKEN, decode, encode, format_prompt
from model import GPT, GPTConfig

SCRIPT = ROOT / "inference.py"
SIZES = GPTConfig(block_size=64, vocab_size=TINY.vocab_size, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp("base"), 1, GPT(SIZES))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path_factory.mktemp("tuned"), 1, GPT(SIZES),
                           prompt_template=ALPACA)


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


def run(*arguments, stdin: str = "") -> str:
    """Runs the script in this process and returns what it prints."""
    argv = ["inference.py", "--device", "cpu", "--max-tokens", 5, *arguments]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setattr("sys.argv", list(map(str, argv)))
        patch.setattr("sys.stdin", stdin_of(stdin.encode()))
        inference.main()
    return printed.getvalue()


def test_prompts_from_arguments_and_standard_input_give_the_same(base):
    prompts = ["Hello there", "wörld {} %s"]
    printed = run("--checkpoint", base, *prompts)
    assert all(f"prompt:   {prompt}\n" in printed for prompt in prompts)
    assert printed.count("response: ") == 2 and printed.count("[5 tokens, ended by") == 2
    assert run("--checkpoint", base, stdin="\n".join(prompts)) == printed
    assert run("--checkpoint", base, stdin="\n".join(prompts) + "\n") == printed
    assert run("--checkpoint", base.parent / "latest", *prompts) == printed
    assert run("--checkpoint", base, *prompts, "--seed", 1) != printed


@pytest.mark.slow
def test_the_script_with_real_streams(base):
    """Standard input and output are pipes, then both closed."""
    command = [sys.executable, SCRIPT, "--device", "cpu", "--max-tokens", "5", "--checkpoint", base]
    prompts = ["Hello there", "wörld {} %s"]
    piped = subprocess.run(command, input="\n".join(prompts).encode(), capture_output=True,
                           env=script_env(), check=True)
    assert piped.stdout.decode() == run("--checkpoint", base, *prompts)
    closed = subprocess.run(["bash", "-c", " ".join(map(str, command)) + " <&- >&-"],
                            capture_output=True, text=True, env=script_env())
    assert_user_error(closed, "no prompt given")


def test_batch_size_and_json_do_not_change_the_text(base):
    prompts = ["one", "two three four", "one", "five", "six"]
    printed = run("--checkpoint", base, *prompts)
    assert run("--checkpoint", base, *prompts, "--batch-size", 2) == printed
    assert run(*prompts[:2], "--checkpoint", base, *prompts[2:]) == printed  # flags in between
    assert run("--checkpoint", base, "two three four") in printed
    objects = [json.loads(line) for line in
               run("--checkpoint", base, *prompts, "--json", "--batch-size", 3).splitlines()]
    assert printed == "".join(
        f"prompt:   {prompt}\nresponse: {one['response']}\n          [5 tokens, ended by "
        "--max-tokens]\n\n" for prompt, one in zip(prompts, objects, strict=True))
    assert objects[0]["response"] != objects[2]["response"]  # repeated: the next seed


def test_json_has_tokens_logprobs_and_the_finish_reason(tuned):
    prompt = "What is it?"
    text = format_prompt(prompt)
    used = len(encode(text))
    lines = run("--checkpoint", tuned, prompt, "--json", "--max-tokens", 40).splitlines()
    full = json.loads(lines[0])
    assert len(lines) == 1 and list(full) == [
        "prompt", "response", "prompt_tokens", "tokens", "logprobs", "finish_reason"]
    assert full["prompt"] == prompt and full["prompt_tokens"] == used
    assert decode(full["tokens"]) == full["response"]
    assert len(full["tokens"]) == len(full["logprobs"]) == 64 - used
    assert full["finish_reason"] == "context"
    with torch.no_grad():
        ids = torch.tensor([encode(text) + full["tokens"]])
        scores = load_model(tuned)(ids)[0][0].log_softmax(-1)
    expected = [scores[used - 1 + i, token].item() for i, token in enumerate(full["tokens"])]
    assert full["logprobs"] == pytest.approx(expected, abs=1e-4)
    short = json.loads(run("--checkpoint", tuned, prompt, "--json", "--max-tokens", 3))
    assert short["finish_reason"] == "length" and short["tokens"] == full["tokens"][:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("inference.EOT_TOKEN", short["tokens"][2])  # the third token
        stopped = json.loads(run("--checkpoint", tuned, prompt, "--json"))
    assert stopped["finish_reason"] == "stop" and stopped["tokens"] == short["tokens"]
    assert stopped["response"] == decode(short["tokens"][:2])


def test_sampling_options_reach_generate(base, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(inference, "generate", lambda model, ids, masks, **options: (
        given.update(options), generate(model, ids, masks, **options))[1])
    monkeypatch.setattr("sys.argv", ["inference.py", "--device", "cpu", "--checkpoint", str(base),
                                     "--temperature", "0.5", "--top-k", "9", "--top-p", "0.7",
                                     "--repetition-penalty", "1.5", "--max-tokens", "4",
                                     "--seed", "7", "Hello"])
    inference.main()
    capsys.readouterr()
    assert given == {"temperature": 0.5, "top_k": 9, "top_p": 0.7, "repetition_penalty": 1.5,
                     "max_steps": 4, "seed": [7]}


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="the CPU has no bfloat16")
def test_dtype_of_the_weights(base):
    greedy = ["--checkpoint", base, "Hello there", "--temperature", 0, "--json"]
    single, half = (json.loads(run(*greedy, "--dtype", dtype)) for dtype in ("float32", "bfloat16"))
    assert single == json.loads(run(*greedy))
    assert half["logprobs"] != single["logprobs"]
    assert half["logprobs"][0] == pytest.approx(single["logprobs"][0], abs=0.05)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_only_newlines_separate_prompts(base, end):
    text = f"\ufeffone \u2028 line{end}another\x0cone{end}{end}"
    printed = run("--checkpoint", base, stdin=text)
    assert "prompt:   one \u2028 line\n" in printed and "prompt:   another\x0cone\n" in printed
    assert printed.count("prompt:") == 2


def prompts_of_generate(monkeypatch, capsys, *arguments) -> list[str]:
    seen = []

    def spy(model, input_ids, masks, **options):
        output = generate(model, input_ids, masks, **options)
        seen.extend(inference.decode_generation(input_ids, masks))
        return output

    monkeypatch.setattr(inference, "generate", spy)
    monkeypatch.setattr("sys.argv", ["inference.py", "--device", "cpu", "--max-tokens", "2",
                                     *map(str, arguments)])
    inference.main()
    capsys.readouterr()
    return seen


def test_the_prompt_template_is_applied_unless_raw(base, tuned, monkeypatch, capsys):
    def given(*arguments):
        return prompts_of_generate(monkeypatch, capsys, *arguments)

    assert given("--checkpoint", tuned, "What is {x}?") == [format_prompt("What is {x}?")]
    assert given("--checkpoint", tuned, "--raw", "What is {x}?") == ["What is {x}?"]
    assert given("--checkpoint", base, "What is {x}?") == ["What is {x}?"]


def test_an_input_beside_the_instruction(tuned, monkeypatch, capsys):
    about = ["--input", "3, 1 {x}"]
    seen = prompts_of_generate(monkeypatch, capsys, "--checkpoint", tuned, "Sort.", "Add.", *about)
    assert seen == [format_prompt("Sort.", "3, 1 {x}"), format_prompt("Add.", "3, 1 {x}")]
    assert "### Input:\n3, 1 {x}\n" in seen[0]
    empty = prompts_of_generate(monkeypatch, capsys, "--checkpoint", tuned, "Sort.", "--input", "")
    assert empty == [format_prompt("Sort.")]


@pytest.mark.parametrize("kind", ["base", "tuned"])
def test_sampling_without_a_prompt(kind, base, tuned):
    """An empty prompt samples from <|endoftext|> alone, without a template; each with a seed of its
    own. So does a line of spaces; a prompt beside it is not changed."""
    folder = {"base": base, "tuned": tuned}[kind]
    arguments = ["--checkpoint", folder, "--json"]
    objects = [json.loads(line) for line in run(*arguments, "", "", "  ").splitlines()]
    assert [(one["prompt"], one["prompt_tokens"]) for one in objects] == [
        ("", 1), ("", 1), ("  ", 1)]
    assert len({one["response"] for one in objects}) == 3
    assert [json.loads(line) for line in
            run(*arguments, "", "", "  ", "--batch-size", 2).splitlines()] == objects
    lines = run(*arguments, stdin="one\n\n\n  \ntwo\n\n").splitlines()  # empty last lines: none
    assert [json.loads(line) for line in lines[1:4]] == objects
    assert [lines[0], lines[4]] == run(*arguments, "one", "two").splitlines()
    with torch.no_grad():
        ids = torch.tensor([[EOT_TOKEN, *objects[0]["tokens"]]])
        scores = load_model(folder)(ids)[0][0].log_softmax(-1)
    expected = [scores[i, token].item() for i, token in enumerate(objects[0]["tokens"])]
    assert objects[0]["logprobs"] == pytest.approx(expected, abs=1e-4)
    printed = run("--checkpoint", folder, "")
    assert printed.startswith(f"prompt:   \nresponse: {objects[0]['response']}\n")
    typed = json.loads(run("--checkpoint", base, "--json", "<|endoftext|>"))
    assert typed["prompt_tokens"] == 7  # in a prompt it is text


def test_a_blank_answer_says_so(base, monkeypatch):
    """Of spaces, or of nothing but <|endoftext|>; alone or in a batch."""
    for token, end in ((220, "[blank, 5 tokens, ended by --max-tokens]"),
                       (EOT_TOKEN, "[blank, 1 tokens, ended by <|endoftext|>]"),
                       (64, "          [5 tokens, ended by --max-tokens]")):
        monkeypatch.setattr(inference, "sample", lambda logits, *_, token=token: torch.full(
            (len(logits),), token))
        assert end in run("--checkpoint", base, "one")
        assert run("--checkpoint", base, "one", "two").count(end) == 2


def test_the_old_name_of_max_tokens_stays_accepted(base):
    argv = ["--checkpoint", base, "one"]
    assert run(*argv, "--max-steps", 3) == run(*argv, "--max-tokens", 3) != run(*argv)
    assert run(*argv, "--max_steps=3") == run(*argv, "--max-tokens", 3)


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "TUNED", "a", "", "--input", "x"], ["--input", "no template"]),
    (["--checkpoint", "BASE", "a", "--input", "x"], ["--input", "no template"]),
    (["--checkpoint", "TUNED", "a", "--raw", "--input", "x"], ["--input", "no template"]),
    (["--checkpoint", "TUNED", "a", " ", "--input", "x"], ["--input", "a prompt is blank"]),
    (["--checkpoint", "TUNED", "a", "--input", "word " * 64], ["tokens", "context is 64"]),
    (["--checkpoint", "BASE", "word " * 64], ["tokens", "context is 64"]),
    (["--checkpoint", "BASE", "a", "--temperature", "-1"], ["--temperature", "at least 0"]),
    (["--checkpoint", "BASE", "a", "--temperature", "inf"], ["temperature"]),
    (["--checkpoint", "BASE", "a", "--max-tokens", "0"], ["--max-tokens"]),
    (["--checkpoint", "BASE/none", "a"], ["none"]),
    (["--checkpoint", "BASE", "a", "--top", "1"], ["--top"]),
    (["--checkpoint", "BASE", "a", "--top-k", "-1"], ["--top-k", "at least 0"]),
    (["--checkpoint", "BASE", "a", "--top-p", "1.5"], ["top_p is 1.5"]),
    (["--checkpoint", "BASE", "a", "--repetition-penalty", "0"], ["repetition_penalty is 0"]),
    (["--checkpoint", "BASE", "a", "--batch-size", "0"], ["--batch-size"]),
    (["--checkpoint", "BASE", "a", "--device", "cpu", "--dtype", "float16"], ["float16"]),
])
def test_invalid_input(base, tuned, arguments, words, monkeypatch, capsys):
    argv = [argument.replace("BASE", str(base)).replace("TUNED", str(tuned))
            for argument in arguments]
    message = main_error(inference.main, argv, monkeypatch, capsys)
    for word in words:
        assert word in message


@pytest.mark.parametrize("stdin, words", [
    (b"", "no prompt"), (None, "no prompt"), (b"caf\xe9\n", "stdin is not UTF-8")])
def test_invalid_standard_input(base, stdin, words, monkeypatch, capsys):
    """None: closed."""
    monkeypatch.setattr("sys.stdin", None if stdin is None else stdin_of(stdin))
    assert words in main_error(inference.main, ["--checkpoint", base], monkeypatch, capsys)


def test_closed_standard_output(base, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    message = main_error(inference.main, ["--checkpoint", base, "a"], monkeypatch, capsys)
    assert "standard output is closed" in message


def test_an_argument_that_is_not_utf8(base):
    printed = run("--checkpoint", base, "--json", os.fsdecode(b"caf\xe9"))
    assert json.loads(printed)["prompt"] == "caf\ufffd"
