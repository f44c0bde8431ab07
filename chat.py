"""A conversation in a terminal: read a message, stream the answer, remember both.

A fine-tuned model gets every message in the template that it was trained with, and its own answers
between them, each ended by <|endoftext|>; a base model just goes on with all that was written. When
a conversation outgrows the context, its oldest messages are forgotten.
"""

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator

from inference import finish_reasons, generate, pad_rows, printing
from minigpt2.config import UserError
from minigpt2.sampling import SamplingParams
from minigpt2.tokenizer import EOT_TOKEN, StreamDecoder, encode, format_prompt, load_tokenizer
from model import GPT

LEAST_ROOM = 4  # an answer finds a quarter of the context free, or --max-steps
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
        self.use_template, self.block_size = use_template, block_size
        # kept free for an answer; what is longer is cut, and says so
        self.room = min(max_steps, block_size // LEAST_ROOM)
        self.turns: list[list[int]] = []

    def ask(self, message: str) -> list[list[int]]:
        """What the model is to see: the turns that are remembered, and a new one, up to where its
        answer begins. The oldest turns are left out until there is room for an answer. Raises
        UserError for a message that leaves no room even by itself."""
        if not self.use_template:  # one text: what is written next is on a line of its own
            turn = encode("\n" + message if self.turns else message)
        else:
            turn = encode(format_prompt(message))
        if len(turn) >= self.block_size:
            raise UserError(f"the message has {len(turn)} tokens; the context is {self.block_size} "
                            "and must hold the answer too: shorten it")
        turns = [*self.turns, turn]
        while len(turns) > 1 and sum(map(len, turns)) + self.room > self.block_size:
            turns = turns[1:]
        return turns

    def answered(self, turns: list[list[int]], tokens: list[int]) -> None:
        """Remembers what `ask` gave with its answer, whole or stopped half-way."""
        tokens = tokens[:-1] if tokens and tokens[-1] == EOT_TOKEN else tokens
        end = [EOT_TOKEN] if self.use_template else []  # one text goes on
        self.turns = [*turns[:-1], [*turns[-1], *tokens, *end]]


def chat(model: GPT, choice: SamplingParams, max_steps: int, seed: int, use_template: bool) -> None:
    """Reads messages and commands from standard input until its end."""
    conversation = Conversation(use_template, model.config.block_size, max_steps)
    is_terminal = sys.stdin.isatty()
    load_tokenizer()  # not when the first message waits for it
    if is_terminal:
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(ImportError):  # lines can be edited, and called back
            import readline  # noqa: F401
        print("/help shows the commands, Ctrl-D leaves", flush=True)
    else:  # as a file of prompts is read
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace", newline=None)
    while True:
        try:
            message, is_command = read_message(is_terminal)
            command, argument = [*message.split(maxsplit=1), "", ""][:2]
            if not is_command and message:
                answer(model, conversation, message, choice, max_steps, seed)
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
    the end of the input, UserError where that comes before a fence."""
    line = input(PROMPT if is_terminal else "")
    if not line.lstrip().startswith(FENCE):
        return line.strip(), line.startswith("/")
    text = line.lstrip().removeprefix(FENCE)
    while not text.rstrip().endswith(FENCE):
        try:
            text += "\n" + input(CONTINUATION if is_terminal else "")
        except EOFError:
            raise UserError(f"not sent: the message that {FENCE} began has no end") from None
    return text.rstrip().removesuffix(FENCE).strip("\n"), False


def set_temperature(choice: SamplingParams, argument: str) -> SamplingParams:
    """The choice with another temperature, if there is one; says which it is. Raises UserError."""
    try:
        if argument:
            choice = dataclasses.replace(choice, temperature=float(argument))
    except ValueError:
        raise UserError(f"/temperature {argument}: expected a number of at least 0") from None
    print(f"temperature {choice.temperature:g}", flush=True)
    return choice


def answer(model: GPT, conversation: Conversation, message: str, choice: SamplingParams,
           max_steps: int, seed: int) -> None:
    """Prints the answer to a message as it comes, and remembers both; Ctrl-C stops it."""
    turns, before = conversation.ask(message), len(conversation.turns)
    forgotten = before + 1 - len(turns)
    if forgotten:
        print(f"(the context is full: forgotten, oldest first: {forgotten} of {before})",
              flush=True)
    batch = pad_rows([[token for turn in turns for token in turn]])
    decoder, tokens = StreamDecoder(), []
    try:
        with noting_interrupts() as interrupts:
            output = generate(model, *batch, max_steps=max_steps, seed=seed,
                              on_tokens=printing(decoder, tokens, interrupts),
                              **dataclasses.asdict(choice))
        note = CUT.get(finish_reasons(*output, batch[1], max_steps)[0], "")
    except KeyboardInterrupt:
        note = " [stopped]"
    conversation.answered(turns, tokens)
    print(decoder.flush() + note, flush=True)


@contextlib.contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """A list that every Ctrl-C is added to, instead of being raised wherever Python is just then:
    an answer stops between two tokens, all of which are remembered."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
