"""The prompts that a conversation makes, the commands, and a real pseudo-terminal."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, main_error, script_env, user_error
from helpers.generation import LONG, sharp_model

import chat
from chat import Conversation
from dataloader import pad_rows
from inference import decode_generation, generate
from minigpt2.checkpoint import save_checkpoint
from minigpt2.kernels import prepare_to_sample
from minigpt2.tokenizer import ALPACA, EOT_TOKEN, encode, format_prompt
from model import GPTConfig

SCRIPT = ROOT / "chat.py"
STEPS = 12
END = " [--max-tokens reached]"
LIMIT = 120  # seconds, for a program that hangs


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tuned"), 1, sharp_model(LONG),
                           prompt_template=ALPACA)


# ------------------------------------------------------------------------------- conversations


def exchange(conversation: Conversation, message: str, tokens: list[int]) -> list[int]:
    """Adds a message and its response; returns the ids that the model saw for it."""
    turns = conversation.turns_with(message)
    conversation.add_response(turns, tokens)
    return sum(turns, [])


def test_a_tuned_model_sees_its_template_and_endoftext_after_responses():
    conversation = Conversation(ALPACA, 1024, STEPS)
    first = exchange(conversation, "What is {x}?", [5, 6, EOT_TOKEN])
    assert first == encode(format_prompt("What is {x}?"))
    second = exchange(conversation, "And y?", [7])  # stopped
    assert second == [*first, 5, 6, EOT_TOKEN, *encode(format_prompt("And y?"))]
    third = exchange(conversation, "z", [])
    assert third[len(second) :] == [7, EOT_TOKEN, *encode(format_prompt("z"))]


def test_a_base_model_sees_one_text():
    conversation = Conversation(None, 1024, STEPS)
    assert exchange(conversation, "Once", [5, 6]) == encode("Once")
    second = exchange(conversation, "upon", [7, EOT_TOKEN])
    assert second == [*encode("Once"), 5, 6, *encode("\nupon")]
    assert exchange(conversation, "a", [])[-3:] == [7, *encode("\na")]  # no <|endoftext|>


def test_the_oldest_turns_are_dropped_if_there_is_no_room_for_a_response():
    conversation = Conversation(None, 64, 10)
    for i in range(30):
        prompt = exchange(conversation, f" a{i}" * 4, [9] * 10)
        assert len(prompt) + 10 <= 64 and prompt[-2:] == encode(f" a{i}")
    assert len(conversation.turns) == 3
    assert "64 tokens" in user_error(conversation.turns_with, " b" * 63)  # and a newline
    assert len(conversation.turns) == 3  # unchanged
    # with room for one token, all other turns are dropped
    assert len(exchange(conversation, " b" * 62, [])) == 63
    assert len(conversation.turns) == 1


def test_a_large_max_steps_does_not_drop_a_short_conversation():
    conversation = Conversation(None, 64, 1000)
    exchange(conversation, "a b c", [9] * 10)
    assert len(conversation.turns_with("d")) == 2  # a quarter of the context is free


# ------------------------------------------------------------------------------- commands


def expected_response(conversation: Conversation, message: str, temperature: float = 0.0) -> str:
    """The response of the same weights, computed here; extends the conversation."""
    turns = conversation.turns_with(message)
    ids, masks = pad_rows([sum(turns, [])])
    output = generate(prepare_to_sample(sharp_model(LONG)), ids, masks, temperature, STEPS)
    conversation.add_response(turns, output[0][0, ids.size(1) :].tolist())
    return decode_generation(*output, masks)[0] + END


def typed(monkeypatch, capsys, text: str, *flags) -> str:
    """Runs the script in this process, without a terminal; returns what it prints."""
    argv = ["chat.py", "--device", "cpu", "--max-tokens", STEPS, "--temperature", 0, *flags]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), newline="\n"))
    handler = signal.getsignal(signal.SIGINT)
    chat.main()
    assert signal.getsignal(signal.SIGINT) is handler
    return capsys.readouterr().out


def test_a_conversation_without_a_terminal(tuned, monkeypatch, capsys):
    """A BOM, "\\r\\n", no prompts; the input ends without /exit."""
    printed = typed(monkeypatch, capsys, "\ufeffWhat is a list?\r\n/temperature 1\r\n",
                    "--checkpoint", tuned)
    response = expected_response(Conversation(ALPACA, 1024, STEPS), "What is a list?")
    assert printed == f"{response}\ntemperature 1\n\n"


def test_messages_and_commands(tuned, monkeypatch, capsys):
    lines = ["What is a list?", "And a tuple?", "  One  two ", "", " /exit",
             "/temperature", "/temperature -1", "/temperature hot", "/temperature 0.7",
             "/top-k", "/top-k 1234567", "/top-k 50", "/top-k 1.5", "/top-k -1", "/top-p 0.9",
             "/top-p 2", "/top-k 0", "/top-p 1", "/what",
             "/help", "/reset", "What is a list?", "a " * 1100, "And a tuple?", "/exit", "unread"]
    printed = typed(monkeypatch, capsys, "\n".join(lines), "--checkpoint", tuned)
    first, second = (Conversation(ALPACA, 1024, STEPS) for _ in range(2))
    expected = [expected_response(first, message) for message in (
        "What is a list?", "And a tuple?", "One  two", "/exit")]
    expected += ["temperature 0", "(temperature is -1.0, expected a finite number of at least 0)",
                 "(/temperature hot: expected a number)", "temperature 0.7",
                 "top-k 0", "top-k 1234567", "top-k 50", "(/top-k 1.5: expected an integer)",
                 "(top_k is -1, expected an integer of at least 0)", "top-p 0.9",
                 "(top_p is 2.0, expected a number from 0 to 1)", "top-k 0", "top-p 1",
                 "(unknown /what: see /help)", chat.HELP, "(conversation cleared)",
                 expected_response(second, "What is a list?", 0.7),
                 f"(the message has {len(encode(format_prompt('a ' * 1099 + 'a')))} tokens; the "
                 "context is 1024, response included: shorten it)",
                 expected_response(second, "And a tuple?", 0.7)]
    assert printed == "\n".join(expected) + "\n"


def test_settings_change_the_next_response(tuned, monkeypatch, capsys):
    seen = []

    def respond(model, prompts, max_steps, **options):
        seen.append((options["temperature"], options["top_k"], options["top_p"]))
        return real(model, prompts, max_steps, **options)

    real = chat.respond
    monkeypatch.setattr(chat, "respond", respond)
    typed(monkeypatch, capsys, "a\n/top-k 50\na\n/top-p 0.5\na\n/top-k 0\na\n/temperature 2\na\n",
          "--checkpoint", tuned)
    assert seen == [(0, 0, 1), (0, 50, 1), (0, 50, 0.5), (0, 0, 0.5), (2, 0, 0.5)]


@pytest.mark.parametrize("token, note", [
    (EOT_TOKEN, " [blank response]"), (220, "      [blank response] [--max-tokens reached]")])
def test_a_blank_response_says_so(tuned, monkeypatch, capsys, token, note):
    monkeypatch.setattr("inference.sample", lambda logits, *_: torch.full(
        (len(logits),), token))
    assert typed(monkeypatch, capsys, "a\n", "--checkpoint", tuned, "--max-tokens",
                 5) == f"{note}\n\n"


def test_dropped_turns_are_announced(tuned, monkeypatch, capsys):
    message = "word " * 400
    printed = typed(monkeypatch, capsys, f"{message}\n{message}\n{message}\n/exit\n",
                    "--checkpoint", tuned)
    conversation = Conversation(ALPACA, 1024, STEPS)
    responses = [expected_response(conversation, message.strip()) for _ in range(3)]
    notice = "(context full; oldest turns dropped: 1)"
    assert printed == "\n".join([*responses[:2], notice, responses[2]]) + "\n"


@pytest.mark.parametrize("flags, words", [
    (["a"], "unrecognized"), (["--json"], "--json"), (["--batch-size", "2"], "--batch-size"),
    (["--chat"], "--chat"),
    (["--top-p", "1.5"], "top_p is 1.5")])
def test_invalid_flags(tuned, flags, words, monkeypatch, capsys):
    assert words in main_error(chat.main, ["--checkpoint", tuned, *flags], monkeypatch, capsys)


@pytest.mark.parametrize("stream", ["stdin", "stdout"])
def test_closed_streams(tuned, stream, monkeypatch, capsys):
    monkeypatch.setattr(f"sys.{stream}", None)
    assert "is closed" in main_error(chat.main, ["--checkpoint", tuned], monkeypatch, capsys)


# ------------------------------------------------------------------------------- a terminal


def take_terminal() -> None:
    """Runs in the new process: makes the pseudo-terminal its controlling terminal, and restores
    Ctrl-C, which processes started in the background ignore."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--device", "cpu", *map(str, arguments)], stdin=theirs,
            stdout=theirs, stderr=theirs, env=script_env() | {"TERM": "dumb"},
            start_new_session=True, preexec_fn=take_terminal)
        os.close(theirs)
        self.file, self.seen = ours, b""

    def read(self, seconds: float = LIMIT) -> bool:
        """Waits for output and stores it; returns False at the end of the process."""
        if not select.select([self.file], [], [], seconds)[0]:
            pytest.fail(f"no output after {self.seen!r}")
        with contextlib.suppress(OSError):  # Linux raises it at the end
            new = os.read(self.file, 65536)
            self.seen += new
            return bool(new)
        return False

    def until(self, pattern: str) -> str:
        """Waits until the output ends with a pattern; returns what came before it since the last
        call."""
        deadline = time.monotonic() + LIMIT
        while not (found := re.search(rf"(?s)^(.*?){pattern}\Z", self.text)):
            assert self.read(deadline - time.monotonic()), self.text
        self.seen = b""
        return found[1]

    def until_idle(self) -> None:
        """Waits until the main thread sleeps; after an echo, that is in select() for more input."""
        deadline = time.monotonic() + LIMIT
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @property
    def text(self) -> str:
        raw = re.sub(rb"\x1b\[[?0-9;]*[a-zA-Z]", b"", self.seen)
        return raw.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def say(self, text: str) -> str:
        """Types a line; returns the output up to the next prompt, without the echo."""
        self.type(text + "\n")
        return self.until(r"\n> ").removeprefix(text + "\n")

    def wait(self) -> int:
        """Waits for the end of the process; returns its exit status."""
        while self.read():
            pass
        return self.process.wait(LIMIT)


@pytest.fixture
def open_terminal():
    opened = []

    def open_one(*arguments) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)


def as_on_terminal(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "")


@pytest.mark.slow
def test_a_conversation_in_a_terminal(tuned, open_terminal):
    terminal = open_terminal("--checkpoint", tuned, "--max-tokens", STEPS, "--temperature", 0)
    assert "/help" in terminal.until(r"Ctrl-D quits\n> ")
    conversation = Conversation(ALPACA, 1024, STEPS)
    for message in ("What is a list?", "And a tuple?"):
        assert terminal.say(message) == as_on_terminal(expected_response(conversation, message))
    assert terminal.say("/temperature 0.7") == "temperature 0.7"
    assert terminal.say("/reset") == "(conversation cleared)"
    expected = expected_response(Conversation(ALPACA, 1024, STEPS), "What is a list?", 0.7)
    assert terminal.say("What is a list?") == as_on_terminal(expected)
    assert terminal.say("") == ""
    terminal.type("\x04")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_response_and_not_the_program(tmp_path, open_terminal):
    # the context has room for minutes of output: the response cannot end before Ctrl-C
    sizes = GPTConfig(block_size=2**16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    base = save_checkpoint(tmp_path, 1, sharp_model(sizes))
    terminal = open_terminal("--checkpoint", base, "--max-tokens", 2**16)
    terminal.until(r"> ")
    terminal.type("Once upon a time\n")
    while len(terminal.text) < len("Once upon a time\n") + 10:  # the response has begun
        terminal.read()
    terminal.type("\x03")
    assert terminal.until(r"\n> ").endswith("[stopped]")
    # while a message is typed; readline loses a Ctrl-C that arrives while it handles a key
    terminal.type("never m")
    terminal.until("never m")
    terminal.until_idle()
    terminal.type("\x03")
    assert "/exit quits" in terminal.until(r"\n> ")
    assert terminal.say("/temperature") == "temperature 0.8"  # still running
    terminal.type("/exit\n")
    assert terminal.wait() == 0
