"""Conversations: what the model is given, and the terminal, through a real pseudo-terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
from helpers.common import ROOT, run_script, script_env, user_error
from helpers.generation import LONG, sharp_model

from chat import Conversation
from inference import decode_generation, generate, pad_rows
from minigpt2.checkpoint import save_checkpoint
from minigpt2.kernels import prepare_to_sample
from minigpt2.tokenizer import EOT_TOKEN, encode, format_prompt

SCRIPT = ROOT / "inference.py"
STEPS = 12


@pytest.fixture
def tuned(tmp_path):
    return save_checkpoint(tmp_path / "tuned", 1, sharp_model(LONG), prompt_template="alpaca")


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base", 1, sharp_model(LONG))


# ------------------------------------------------------------------------------- conversations


def said(talk: Conversation, message: str, tokens: list[int]) -> list[int]:
    """What the model sees of a message that it then answers with these tokens."""
    turns = talk.ask(message)
    talk.answered(turns, tokens)
    return sum(turns, [])


def test_a_tuned_model_sees_its_template_and_the_ends_of_its_answers():
    talk = Conversation(True, 1024, STEPS)
    first = said(talk, "What is {x}?", [5, 6, EOT_TOKEN])
    assert first == encode(format_prompt("What is {x}?"))
    second = said(talk, "And y?", [7])  # stopped half-way
    assert second == [*first, 5, 6, EOT_TOKEN, *encode(format_prompt("And y?"))]
    assert said(talk, "z", [])[len(second) :] == [7, EOT_TOKEN, *encode(format_prompt("z"))]


def test_a_base_model_sees_one_text():
    talk = Conversation(False, 1024, STEPS)
    assert said(talk, "Once", [5, 6]) == encode("Once")
    assert said(talk, "upon", [7, EOT_TOKEN]) == [*encode("Once"), 5, 6, *encode("\nupon")]
    assert said(talk, "a", [])[-3:] == [7, *encode("\na")]  # no new document


def test_the_oldest_messages_are_forgotten_where_there_is_no_room_for_an_answer():
    talk = Conversation(False, 64, 10)
    for i in range(30):
        prompt = said(talk, f" a{i}" * 4, [9] * 10)
        assert len(prompt) + 10 <= 64 and prompt[-2:] == encode(f" a{i}")
    assert len(talk.turns) == 3
    assert "64 tokens" in user_error(talk.ask, " b" * 63)  # and a line end
    assert len(talk.turns) == 3  # as before
    assert len(said(talk, " b" * 62, [])) == 63  # room for one token: all others are forgotten
    assert len(talk.turns) == 1


def test_a_long_answer_that_is_asked_for_does_not_forget_a_short_past():
    talk = Conversation(False, 64, 1000)
    said(talk, "a b c", [9] * 10)
    assert len(talk.ask("d")) == 2  # a quarter is free


# ------------------------------------------------------------------------------- a terminal


def take_terminal() -> None:
    """In the new process: the terminal is its own, and Ctrl-C is not ignored, as it is in what a
    shell started in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """A program on a pseudo-terminal of its own, driven as somebody who types would."""

    def __init__(self, *arguments):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--device", "cpu", *map(str, arguments)], stdin=theirs,
            stdout=theirs, stderr=theirs, env=script_env() | {"TERM": "dumb"},
            start_new_session=True, preexec_fn=take_terminal)
        os.close(theirs)
        self.file, self.seen = ours, b""

    def read(self, seconds: float) -> bool:
        """Takes what has come; False at the end of the program."""
        if not select.select([self.file], [], [], seconds)[0]:
            pytest.fail(f"nothing more came after {self.seen!r}")
        with contextlib.suppress(OSError):  # the end, on Linux
            new = os.read(self.file, 65536)
            self.seen += new
            return bool(new)
        return False

    def until(self, pattern: str) -> str:
        """What was printed since the last call, up to a pattern at its end."""
        deadline = time.monotonic() + 60
        while not (found := re.search(rf"(?s)^(.*?){pattern}\Z", self.text)):
            assert self.read(deadline - time.monotonic()), self.text
        self.seen = b""
        return found[1]

    @property
    def text(self) -> str:
        raw = re.sub(rb"\x1b\[[?0-9;]*[a-zA-Z]", b"", self.seen)
        return raw.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "")

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def say(self, text: str) -> str:
        """Types a line; returns what comes back, up to the next prompt, without the echo."""
        self.type(text + "\n")
        return self.until(r"\n> ").removeprefix(text + "\n")

    def close(self) -> int:
        """Waits for the end of the program; returns its exit status."""
        while self.read(60):
            pass
        return self.process.wait(60)


@pytest.fixture
def terminals():
    opened = []

    def opening(*arguments) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield opening
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.file)


def answer_to(talk: Conversation, message: str, temperature: float = 0.0) -> str:
    """What the same weights answer in this process."""
    turns = talk.ask(message)
    batch = pad_rows([sum(turns, [])])
    output = generate(prepare_to_sample(sharp_model(LONG)), *batch, temperature, STEPS)
    talk.answered(turns, output[0][0, batch[0].size(1):].tolist())
    return decode_generation(*output, batch[1])[0].replace("\r\n", "\n").replace("\r", "")


def test_a_conversation(tuned, terminals):
    terminal = terminals("--checkpoint", tuned, "--chat", "--max-steps", STEPS, "--temperature", 0)
    terminal.until(r"Ctrl-D leaves\n> ")
    talk, end = Conversation(True, 1024, STEPS), " [--max-steps reached]"
    first = terminal.say("What is a list?")
    assert first == answer_to(talk, "What is a list?") + end
    assert terminal.say("And a tuple?") == answer_to(talk, "And a tuple?") + end
    # several lines
    for line in ('"""', "One"):
        terminal.type(line + "\n")
        terminal.until(r"\.\.\. ")
    assert terminal.say('  two"""').endswith(answer_to(talk, "One\n  two") + end)
    # commands
    assert terminal.say("/temperature") == "temperature 0"
    assert "-1" in terminal.say("/temperature -1") and "hot" in terminal.say("/temperature hot")
    assert terminal.say("/temperature 0.7") == "temperature 0.7"
    assert "/reset" in terminal.say("/help") and "no command /what" in terminal.say("/what")
    assert terminal.say("/reset") == "(forgotten)"
    talk = Conversation(True, 1024, STEPS)
    assert terminal.say("What is a list?") == answer_to(talk, "What is a list?", 0.7) + end
    assert terminal.say("/temperature 0") == "temperature 0"
    assert terminal.say("/reset") == "(forgotten)"
    assert terminal.say("What is a list?") == first
    assert terminal.say("") == ""
    # too long a message is refused, and nothing is lost by it
    talk = Conversation(True, 1024, STEPS)
    answer_to(talk, "What is a list?")
    assert "the context is 1024" in terminal.say("a " * 1100)
    assert terminal.say("And a tuple?") == answer_to(talk, "And a tuple?") + end
    terminal.type("\x04")
    assert terminal.close() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(base, terminals):
    terminal = terminals("--checkpoint", base, "--chat", "--max-steps", 1000)
    terminal.until(r"> ")
    terminal.type("Once upon a time\n")
    while len(terminal.text) < len("Once upon a time\n") + 10:  # it has begun to answer
        terminal.read(60)
    terminal.type("\x03")
    assert terminal.until(r"\n> ").endswith("[stopped]")
    # of a message that is being written
    terminal.type("never m")
    terminal.until("never m")
    terminal.type("\x03")  # readline overlooks one in the instant in which it handles a letter
    if not select.select([terminal.file], [], [], 5)[0]:
        terminal.type("\x03")
    assert "/exit leaves" in terminal.until(r"\n> ")
    assert terminal.say("/temperature") == "temperature 0.8"  # it goes on
    terminal.type("/exit\n")
    assert terminal.close() == 0


def test_a_conversation_without_a_terminal(tuned):
    typed = "\ufeffWhat is a list?\r\n/temperature 1\r\n"
    result = run_script(SCRIPT, "--device", "cpu", "--checkpoint", tuned, "--chat", "--max-steps",
                        STEPS, "--temperature", 0, stdin=typed)
    expected = answer_to(Conversation(True, 1024, STEPS), "What is a list?")
    assert result.stdout == f"{expected} [--max-steps reached]\ntemperature 1\n\n"


def test_a_message_without_its_end_is_not_lost_in_silence(tuned):
    result = run_script(SCRIPT, "--device", "cpu", "--checkpoint", tuned, "--chat",
                        stdin='"""\nWhat is\n')
    assert result.stdout.startswith("(not sent") and '"""' in result.stdout
