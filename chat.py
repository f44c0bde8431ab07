"""A conversation in a terminal: read a message, stream the answer, remember both.

A fine-tuned model gets every message in the template that it was trained with, and its own answers
between them, each ended by <|endoftext|>; a base model just goes on with all that was written. When
a conversation outgrows the context, its oldest messages are forgotten.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Callable

from config import UserError
from draws import Choice
from model import GPT
from sampling import finish_reasons, generate, pad_rows
from tokenizer import EOT_TOKEN, StreamDecoder, encode, format_prompt

PROMPT, CONTINUATION, FENCE = "> ", "... ", '"""'
HELP = f"""/reset            forgets the conversation
/temperature 0.7  sets the temperature; without a number, shows it
/help             shows this
/exit or Ctrl-D   leaves; Ctrl-C stops an answer
{FENCE}               begins a message of several lines, and ends it
Anything else is a message. One that begins with / is sent with a space before it."""
CUT = {"length": " [--max-steps reached]", "context": " [cut: the context is full]"}


class Conversation:
    """What was said, as token ids: one list for every message together with its answer."""

    def __init__(self, use_template: bool, block_size: int, max_steps: int):
        self.use_template, self.block_size, self.max_steps = use_template, block_size, max_steps
        self.turns: list[list[int]] = []

    def ask(self, message: str) -> list[int]:
        """Adds a message; returns the prompt: all that is remembered, up to where the answer
        begins. Forgets the oldest turns until there is room for an answer of max_steps. Raises
        UserError, the conversation as before, for a message that leaves no room even by itself."""
        if not self.use_template:  # one text: what is written next is on a line of its own
            text = "\n" + message if self.turns else message
        else:
            text = format_prompt(message)
        turn = encode(text)
        if len(turn) >= self.block_size:
            raise UserError(f"the message has {len(turn)} tokens; the context is {self.block_size} "
                            "and must hold the answer too: shorten it")
        self.turns.append(turn)
        while len(self.turns) > 1 and self.length + self.max_steps > self.block_size:
            del self.turns[0]
        return [token for turn in self.turns for token in turn]

    def answered(self, tokens: list[int]) -> None:
        """Remembers the answer to the last message, whole or stopped half-way."""
        self.turns[-1] += tokens
        if self.use_template and self.turns[-1][-1] != EOT_TOKEN:
            self.turns[-1].append(EOT_TOKEN)

    @property
    def length(self) -> int:
        return sum(map(len, self.turns))


def chat(model: GPT, choice: Choice, max_steps: int, seed: int, use_template: bool) -> None:
    """Reads messages and commands from standard input until its end."""
    conversation = Conversation(use_template, model.config.block_size, max_steps)
    is_terminal = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")
    if is_terminal:
        if importlib.util.find_spec("readline"):  # lines can be edited, and called back
            importlib.import_module("readline")
        print("/help shows the commands, Ctrl-D leaves", flush=True)
    while True:
        try:
            message, is_command = read_message(is_terminal)
            command, _, argument = message.partition(" ")
            if not is_command and message:
                answer(model, conversation, message, choice, seed)
            elif command == "/exit":
                return
            elif command == "/reset":
                conversation.turns.clear()
                print("(forgotten)", flush=True)
            elif command == "/temperature":
                choice = set_temperature(choice, argument)
            elif message:
                print(HELP if command == "/help" else f"no command {command}: see /help",
                      flush=True)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # of a message that is being written
            print("\n(Ctrl-D or /exit leaves)", flush=True)
        except UserError as error:
            print(f"({error})", flush=True)


def read_message(is_terminal: bool) -> tuple[str, bool]:
    """One line, or the lines between two fences; and whether it is a command. Raises EOFError at
    the end of the input."""
    line = input(PROMPT if is_terminal else "")
    if not line.lstrip().startswith(FENCE):
        return line.strip(), line.startswith("/")
    text = line.lstrip().removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        text += "\n" + input(CONTINUATION if is_terminal else "")
    return text.rstrip().removesuffix(FENCE).strip("\n"), False


def set_temperature(choice: Choice, argument: str) -> Choice:
    try:
        if argument:
            choice = dataclasses.replace(choice, temperature=float(argument))
    except ValueError:
        raise UserError(f"/temperature {argument}: expected a number of at least 0") from None
    print(f"temperature {choice.temperature:g}", flush=True)
    return choice


def answer(model: GPT, conversation: Conversation, message: str, choice: Choice,
           seed: int) -> None:
    """Prints the answer to a message as it comes, and remembers it; Ctrl-C stops it."""
    before = len(conversation.turns)
    batch = pad_rows([conversation.ask(message)])
    forgotten = before + 1 - len(conversation.turns)
    if forgotten:
        print(f"(the context is full: the oldest {forgotten} of {before} messages are forgotten)",
              flush=True)
    decoder, tokens = StreamDecoder(), []
    try:
        output = generate(model, *batch, max_steps=conversation.max_steps, seed=seed,
                          on_tokens=printing(decoder, tokens), **dataclasses.asdict(choice))
        note = CUT.get(finish_reasons(*output, batch[1], conversation.block_size)[0], "")
    except KeyboardInterrupt:
        note = " [stopped]"
    print(decoder.flush() + note, flush=True)
    conversation.answered(tokens)


def printing(decoder: StreamDecoder, tokens: list[int]) -> Callable[[int, list[int]], None]:
    """What `generate` calls: notes the new tokens, and prints their text."""
    def show(row: int, new: list[int]) -> None:
        tokens.extend(new)
        print(decoder.feed([token for token in new if token != EOT_TOKEN]), end="", flush=True)
    return show
