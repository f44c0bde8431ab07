"""Chat with a model in the terminal; responses are streamed.

    python chat.py --checkpoint out/finetune

A fine-tuned model sees its prompt template, as in training; a base model, or any with --raw,
continues one plain text. When the context is full, the oldest turns are dropped. A file or pipe on
standard input has one message per line. /help lists the commands.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import codecs
import contextlib
import signal
import sys
from dataclasses import asdict, replace

from inference import SamplingConfig, respond
from minigpt2.config import UserError, parse_config, run_main
from minigpt2.sampling import SamplingParams
from minigpt2.tokenizer import EOT_TOKEN, encode, format_prompt, load_tokenizer
from model import GPT

SETTINGS = {"/temperature": float, "/top-k": int, "/top-p": float}
HELP = """/reset            clear the conversation
/temperature 0.7  set the temperature; without a number, show it; so /top-k 50 and /top-p 0.9
/help             show this help
/exit or Ctrl-D   quit; Ctrl-C stops a response
Anything else is a message. To send a message that starts with /, type a space first."""
NOTES = {"stop": "", "length": " [--max-tokens reached]", "context": " [context full]"}


class StreamDecoder:
    """Decodes ids as they arrive; an incomplete character is held back until `final`."""

    def __init__(self):
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: list[int], final: bool = False) -> str:
        return self.utf8.decode(load_tokenizer().decode_bytes(ids), final)


class Conversation:
    """The turns so far, as token ids; a turn is a message with its response."""

    def __init__(self, template: str | None, block_size: int, max_tokens: int):
        self.template, self.block_size = template, block_size
        self.reserved = min(max_tokens, block_size // 4)  # context left free for a response
        self.turns: list[list[int]] = []

    def turns_with(self, message: str) -> list[list[int]]:
        """The turns that the model sees: a new one with the message, after as many earlier ones as
        leave room for a response. Raises UserError if the message alone fills the context."""
        turn = encode(format_prompt(message, "", self.template) if self.template else
                      "\n" * bool(self.turns) + message)
        if len(turn) >= self.block_size:
            raise UserError(f"the message has {len(turn)} tokens; the context is {self.block_size},"
                            " response included: shorten it")
        turns = [*self.turns, turn]
        while len(turns) > 1 and sum(map(len, turns)) + self.reserved > self.block_size:
            turns = turns[1:]
        return turns

    def add_response(self, turns: list[list[int]], tokens: list[int]) -> None:
        """Stores the turns from `turns_with`, and the response, which may be incomplete."""
        text = [token for token in tokens if token != EOT_TOKEN]
        self.turns = [*turns[:-1], turns[-1] + text + [EOT_TOKEN] * bool(self.template)]


def chat(config: SamplingConfig, model: GPT, params: SamplingParams, template: str | None) -> None:
    """Reads messages and commands from standard input until it ends."""
    conversation = Conversation(template, model.config.block_size, config.max_tokens)
    is_terminal = sys.stdin.isatty()
    load_tokenizer()  # before the first message, which would wait for it
    sys.stdin.reconfigure(encoding=None if is_terminal else "utf-8-sig", errors="replace",
                          newline=None)
    if is_terminal:
        with contextlib.suppress(ImportError):  # enables line editing and history in input()
            import readline  # noqa: F401
        print("/help shows the commands, Ctrl-D quits")
    while True:
        try:
            line = input("> " if is_terminal else "")
            message = line.strip()
            command, argument = [*message.split(maxsplit=1), "", ""][:2]
            if message and not line.startswith("/"):
                stream_response(config, model, params, conversation, message)
            elif command == "/exit":
                return
            elif command == "/reset":
                conversation.turns.clear()
                print("(conversation cleared)")
            elif command in SETTINGS:
                params = change_setting(params, command, argument)
            elif message:
                print(HELP if command == "/help" else f"(unknown {command}: see /help)")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # while a message is typed
            print("\n(Ctrl-D or /exit quits)")
        except UserError as error:
            print(f"({error})")


def change_setting(params: SamplingParams, command: str, argument: str) -> SamplingParams:
    """Changes a setting if an argument is given, and prints it. Raises UserError."""
    name, kind = command[1:].replace("-", "_"), SETTINGS[command]
    try:
        params = replace(params, **{name: kind(argument or getattr(params, name))})
    except ValueError:
        wanted = "a number" if kind is float else "an integer"
        raise UserError(f"{command} {argument}: expected {wanted}") from None
    print(f"{command[1:]} {str(getattr(params, name)).removesuffix('.0')}")
    return params


def stream_response(config: SamplingConfig, model: GPT, params: SamplingParams,
                    conversation: Conversation, message: str) -> None:
    """Streams the response to a message and stores both. Ctrl-C stops it between two tokens."""
    def on_tokens(row: int, new: list[int]) -> None:
        tokens.extend(new)
        print(decoder.feed([i for i in new if i != EOT_TOKEN]), end="", flush=True)
        if interrupts:
            raise KeyboardInterrupt

    turns, decoder, tokens, interrupts = conversation.turns_with(message), StreamDecoder(), [], []
    if dropped := len(conversation.turns) + 1 - len(turns):
        print(f"(context full; oldest turns dropped: {dropped})")
    prompt = [token for turn in turns for token in turn]
    handler = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append(number))
    try:
        [response] = respond(model, [prompt], config.max_tokens, seed=config.seed,
                             on_tokens=on_tokens, **asdict(params))
        note = NOTES[response.finish_reason]
        if not StreamDecoder().feed([i for i in tokens if i != EOT_TOKEN], final=True).strip():
            note = " [blank response]" + note
    except KeyboardInterrupt:
        note = " [stopped]"
    finally:
        signal.signal(signal.SIGINT, handler)
    conversation.add_response(turns, tokens)
    print(decoder.feed([], final=True) + note)


def main() -> None:
    config = parse_config(SamplingConfig, description=__doc__)
    if sys.stdin is None:
        raise UserError("standard input is closed, expected a terminal, pipe or file")
    chat(config, *config.load())


if __name__ == "__main__":
    run_main(main)
