"""Preference pairs, in three forms of rows (docs/alignment.md); padded lengths, micro-batches."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest

from minigpt2.config import UserError
from minigpt2.tokenizer import ALPACA, encode_example

# Names of the texts of a row, of which `input` may be missing
FORMS = (("instruction", "input", "chosen", "rejected"), ("prompt", "input", "chosen", "rejected"),
         ("chosen", "rejected"))  # the last: two transcripts, as in Anthropic's hh-rlhf
ARTIFACT = re.compile(r"##|<\||Instruction")  # of a model that continues with another prompt


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of two responses, each of which ends with EOT_TOKEN."""

    place: str  # of the row, for messages: "pairs.jsonl line 3"
    instruction: str  # whose hash holds a pair out; of a transcript, all before the response
    input: str
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def num_tokens(self) -> int:  # of the longer sequence, prompt and response
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def make_pairs(rows: Sequence[tuple[str, object]], block_size: int,
               template: str = ALPACA) -> tuple[list[Pair], str]:
    """Pairs of (place, row)s, and a summary of those left out, by reason. A pair over block_size
    tokens is not cut: its <|endoftext|> would be lost. Raises UserError naming a bad row."""
    made = []
    for place, row in rows:
        texts = row_texts(row, place, FORMS)
        pair = (transcript_pair if len(texts) == 2 else plain_pair)(place, *texts, template)
        is_long = isinstance(pair, Pair) and pair.num_tokens > block_size
        made.append(f"over {block_size} tokens" if is_long else pair)
    pairs = [pair for pair in made if isinstance(pair, Pair)]
    counts = Counter(reason for reason in made if isinstance(reason, str))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
    return pairs, f"{len(pairs):,} of {len(rows):,} pairs (left out: {reasons or 'none'})"


def row_texts(row: object, place: str, forms: Sequence[tuple]) -> list[str]:
    """The texts of a row in the first of `forms` that it has. Raises UserError."""
    maps = ",".join(f"{name}=NAME" for name in forms[0] if name != "input")
    expected = f"{'; or '.join(map(', '.join, forms))} (input may be missing); or --columns {maps}"
    if not isinstance(row, dict):
        raise UserError(f"{place} is {row!r:.60}, expected an object with {expected}")
    null = "".join(f" ({name} is null)" for name, value in row.items() if value is None)[:200]
    row = {name: value for name, value in row.items() if value is not None}
    form = next((form for form in forms if row.keys() >= {*form} - {"input"}), None)
    if form is None:
        raise UserError(f"{place} has the keys {', '.join(row)!r:.200}{null}, expected {expected}")
    texts = [require_text(row.get(name, ""), name, place) for name in form]
    if len(form) > 2 and not texts[0].strip():
        raise UserError(f"{place} has an empty {form[0]}")
    return texts


def require_text(value: object, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {name} is {value!r:.60}, expected text")
    return value


def plain_pair(place: str, instruction: str, input: str, chosen: str, rejected: str,
               template: str) -> Pair | str:
    """The pair of a row with a question, or why it is left out."""
    if not (chosen.strip() and rejected.strip()):
        return "with an empty response"
    if chosen.strip() == rejected.strip():
        return "with equal responses"
    prompt, first = encode_example(instruction, input, chosen, template)
    return Pair(place, instruction, input, prompt, first,
                encode_example(instruction, input, rejected, template)[1])


def transcript_pair(place: str, chosen: str, rejected: str, template: str) -> Pair | str:
    """The pair of two transcripts, split before their last answers, or why it is left out."""
    parts = [text.rpartition("\n\nAssistant:") for text in (chosen, rejected)]
    for name, (start, separator, _) in zip(("chosen", "rejected"), parts, strict=True):
        if not separator or not start.startswith("\n\nHuman:"):
            raise UserError(f"{place}: {name} is not a transcript that begins with a Human turn "
                            "and ends with an Assistant turn; or add its prompt")
    (text, _, chosen), (other, _, rejected) = parts
    if text != other:
        return "whose prompts differ"
    *earlier, (question, missing) = turns = transcript_turns(text)
    if missing or not all(human for human, _ in turns) or "\n\nHuman:" in chosen + rejected:
        return "without a question before the response, or with one after it"
    context = [token for human, answer in earlier
               for part in encode_example(human, "", answer, template) for token in part]
    last = plain_pair(place, question, "", chosen.strip(), rejected.strip(), template)
    return last if isinstance(last, str) else replace(last, instruction=text,
                                                      prompt=context + last.prompt)


def transcript_turns(text: str) -> list[tuple[str, str]]:
    """The turns as (question, answer), the last answer empty. Those of one speaker are joined."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    texts = ["\n\n".join(filter(None, (said.strip() for _, said in turns)))
             for _, turns in groupby(zip(parts[::2], parts[1::2], strict=True), lambda t: t[0])]
    return list(zip_longest(texts[::2], texts[1::2], fillvalue=""))


def sequences(pairs: Sequence[Pair]) -> list[list[int]]:
    """The ids of both responses of each pair after their prompt: chosen, rejected, chosen, ..."""
    return [pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected)]


def padded_length(length: int) -> int:
    """`length` rounded up to a multiple of 16 up to 192, 32 up to 384, ...: 26 up to 1,024."""
    return length + -length % (16 << ((length - 1) // 192).bit_length())


def rank_share(rows: Sequence, micro_batch_size: int, rank: int, world_size: int) -> list[Sequence]:
    """One rank's micro-batches: equally many on all ranks, the last perhaps short or empty."""
    return [rows[first + rank * micro_batch_size :][:micro_batch_size]
            for first in range(0, len(rows), micro_batch_size * world_size)]
