"""Instruction rows: their three forms (see docs/formats.md), and their text as token ids."""

from minigpt2.config import UserError
from minigpt2.tokenizer import encode_example

SCHEMAS = "instruction, output and optionally input; prompt and completion; or messages"
ROLES = "user and assistant in turn, at most one system message before them"
TextTurn = tuple[str, str, str]  # instruction, input, output
Turn = tuple[list[int], list[int]]  # ids of the prompt, ids of the response with <|endoftext|>
Example = list[Turn]  # one turn, or those of a conversation
NO_ANSWER = ("<nooutput>", "<no output>", "<noinput>")  # how such outputs begin in Alpaca


def text_turns(row: object, place: str) -> list[TextTurn]:
    """The turns of a row, in one of the three schemas. Raises UserError."""
    if not isinstance(row, dict):
        raise UserError(f"{place} is {row!r:.60}, expected an object with {SCHEMAS}")
    row = {name: value for name, value in row.items() if value is not None}
    if {"instruction", "output"} <= row.keys():
        names = ("instruction", "input", "output")
    elif "messages" in row:
        return message_turns(row["messages"], place)
    elif {"prompt", "completion"} <= row.keys():
        names = ("prompt", "", "completion")
    else:
        raise UserError(f"{place} has the keys {', '.join(row)!r:.200}, expected {SCHEMAS}")
    turn = tuple(require_text(row.get(name, ""), name, place) for name in names)
    if not turn[0].strip():
        raise UserError(f"{place} has an empty {names[0]}")
    return [turn]


def message_turns(messages: object, place: str) -> list[TextTurn]:
    """The turns of a list of {role, content}. A system message becomes the beginning of the first
    user message. Raises UserError."""
    roles = [message.get("role") if isinstance(message, dict) else None
             for message in messages] if isinstance(messages, list) else []
    start = int(roles[:1] == ["system"])
    pairs = (len(roles) - start) // 2
    if not pairs or roles[start:] != ["user", "assistant"] * pairs:
        raise UserError(f"{place}: messages have the roles {roles!r:.80}, expected {ROLES}")
    texts = [require_text(message.get("content"), "content", place) for message in messages]
    if not all(text.strip() for text in texts[start::2]):
        raise UserError(f"{place} has an empty user message")
    if start:
        texts[1] = "\n\n".join(filter(None, texts[:2]))
    return [(user, "", assistant)
            for user, assistant in zip(texts[start::2], texts[start + 1 :: 2], strict=True)]


def require_text(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected text")
    return value


def num_inputs(example: Example) -> int:
    """Its tokens but for the last, which is only a target."""
    return sum(len(prompt) + len(response) for prompt, response in example) - 1


def token_ids(example: Example) -> list[int]:
    return [token for prompt, response in example for token in prompt + response]


def make_examples(rows: list[list[TextTurn]], block_size: int,
                  ) -> tuple[list[TextTurn], list[Example], str]:
    """(the first turns, the token ids) of the usable rows, and a summary that counts what was left
    out: rows without an answer (Alpaca has some), and rows longer than the context, whose
    <|endoftext|> would be cut off."""
    keys, examples, empty, long = [], [], 0, 0
    for turns in rows:
        example = [encode_example(*turn) for turn in turns]
        outputs = [normalize(output) for _, _, output in turns]
        if any(not output or output.startswith(NO_ANSWER) for output in outputs):
            empty += 1
        elif num_inputs(example) > block_size:
            long += 1
        else:
            keys.append(turns[0])
            examples.append(example)
    return keys, examples, (f"{len(examples):,} of {len(rows):,} rows (left out: {empty:,} without "
                            f"an answer and {long:,} over {block_size} tokens)")


def normalize(text: str) -> str:
    """The text without differences in case and whitespace."""
    return " ".join(text.casefold().split())
