import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_user_error, main_error, run_script, script_env

import inference
from checkpoint import save_checkpoint
from model import GPT, GPTConfig
from sampling import generate
from tokenizer import format_prompt

SCRIPT = ROOT / "inference.py"
SIZES = GPTConfig(block_size=64, vocab_size=TINY.vocab_size, n_layer=1, n_head=2, n_embd=16)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "base", 1, GPT(SIZES))


@pytest.fixture
def tuned(tmp_path):
    torch.manual_seed(0)
    return save_checkpoint(tmp_path / "tuned", 1, GPT(SIZES), prompt_template="alpaca")


def run(*arguments, **options) -> str:
    return run_script(SCRIPT, "--device", "cpu", "--max-steps", 5, *arguments, **options).stdout


def test_prompts_from_arguments_a_file_and_standard_input_are_the_same(base, tmp_path):
    prompts = ["Hello there", "wörld {} %s"]
    printed = run("--checkpoint", base, *prompts)
    assert all(f"prompt:   {prompt}\n" in printed for prompt in prompts)
    assert printed.count("response: ") == 2 and printed.count("[5 tokens, ended by") == 2
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    assert run("--checkpoint", base, "--prompts-file", file) == printed
    assert run("--checkpoint", base, stdin="\n".join(prompts)) == printed
    assert run("--checkpoint", base.parent / "latest", *prompts) == printed
    assert run("--checkpoint", base, *prompts, "--seed", 1) != printed


def test_a_prompt_is_a_line_and_nothing_else_ends_one(base, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone \u2028 line\r\nanother\x0cone\r\n".encode())
    printed = run("--checkpoint", base, "--prompts-file", file)
    assert "prompt:   one \u2028 line\n" in printed and "prompt:   another\x0cone\n" in printed
    closed = subprocess.run(["bash", "-c", f"{sys.executable} {SCRIPT} --checkpoint {base} <&-"],
                            capture_output=True, text=True, env=script_env())
    assert_user_error(closed, "no prompt given")


def texts_given_to_the_model(monkeypatch, capsys, *arguments) -> list[str]:
    seen = []

    def spy(model, input_ids, masks, temperature, max_steps, **options):
        output = generate(model, input_ids, masks, temperature, max_steps, **options)
        seen.extend(inference.decode_generation(input_ids, masks))
        return output

    monkeypatch.setattr(inference, "generate", spy)
    monkeypatch.setattr("sys.argv", ["inference.py", "--device", "cpu", "--max-steps", "2",
                                     *map(str, arguments)])
    inference.main()
    capsys.readouterr()
    return seen


def test_the_template_is_applied_by_itself(base, tuned, monkeypatch, capsys):
    def given(*arguments):
        return texts_given_to_the_model(monkeypatch, capsys, *arguments)

    assert given("--checkpoint", tuned, "What is {x}?") == [format_prompt("What is {x}?")]
    assert given("--checkpoint", tuned, "--raw", "What is {x}?") == ["What is {x}?"]
    assert given("--checkpoint", base, "What is {x}?") == ["What is {x}?"]


@pytest.mark.parametrize("arguments, words", [
    (["--checkpoint", "BASE", "one", ""], ["prompt 2 of 2 is empty"]),
    (["--checkpoint", "BASE", "   "], ["prompt 1 of 1 is empty"]),
    (["--checkpoint", "BASE", "word " * 64], ["tokens", "context is 64"]),
    (["--checkpoint", "BASE", "a", "--prompts-file", "x"], ["--prompts-file"]),
    (["--checkpoint", "BASE", "--prompts-file", "/no/such/file"], ["/no/such/file"]),
    (["--checkpoint", "BASE", "a", "--temperature", "-1"], ["--temperature", "at least 0"]),
    (["--checkpoint", "BASE", "a", "--temperature", "inf"], ["temperature"]),
    (["--checkpoint", "BASE", "a", "--max-steps", "0"], ["--max-steps"]),
    (["--checkpoint", "BASE/none", "a"], ["none"]),
    (["--checkpoint", "BASE", "a", "--top", "1"], ["--top"]),
])
def test_bad_input(base, arguments, words, monkeypatch, capsys):
    argv = [argument.replace("BASE", str(base)) for argument in arguments]
    message = main_error(inference.main, argv, monkeypatch, capsys)
    for word in words:
        assert word in message


def test_no_prompt_at_all(base):
    assert_user_error(run_script(SCRIPT, "--checkpoint", base, check=False), "no prompt")
