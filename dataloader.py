"""Batches of token shards as a pure function of (seed, step, micro-step, rank).

`TokenLoader` cuts every shard into windows of T + 1 tokens (T inputs and, shifted by one, T
targets) that overlap by one token. An epoch visits every window once, the shards in a seeded order
and the windows of each shard in a seeded order. Window k of the run belongs to step k // G, where G
is the number of windows in a global batch: the same for every world size and micro-batch.

At the end of the file: rows of instruction files, and their split into training and held-out rows.
"""

import hashlib
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minigpt2.config import UserError, first_line
from minigpt2.loss import IGNORE_INDEX
from minigpt2.preferences import Pair, make_pairs, padded_length, require_text, row_texts
from minigpt2.shards import open_shard, read_manifest
from minigpt2.tokenizer import ALPACA, N_VOCAB, decode, encode, encode_example, format_prompt
from model import GPT

PAD_TOKEN = 0  # any id would do: only the mask marks padding
TextTurn = tuple[str, str, str]  # instruction, input, output
Turn = tuple[list[int], list[int]]  # ids of the prompt, ids of the response with <|endoftext|>
Example = list[Turn]  # one turn, or those of a conversation
NO_ANSWER = ("<nooutput>", "<no output>", "<noinput>")  # how such outputs begin in Alpaca
FORMS = ("instruction", "input", "output"), ("prompt", "input", "completion"), ("messages",)
COLUMNS = "instruction, prompt, input, output, completion, messages, chosen, rejected"
INSTRUCTIONS = "finetune_data/alpaca_downloader.py or pydocs_questions.py, or change --data"
ROLES = "user and assistant in turn, at most one system message before them"


@lru_cache(maxsize=4)
def permutation(n: int, *stream: int) -> np.ndarray:
    """A permutation of range(n), a pure function of the numbers in `stream`. NumPy guarantees the
    streams of `RandomState`: a run resumed under another version sees the same windows."""
    # The length comes first: SeedSequence treats (7, 0) and (7, 0, 0) alike
    bits = np.random.MT19937(np.random.SeedSequence([len(stream), *stream]))
    return np.random.RandomState(bits).permutation(n)


@dataclass
class TokenLoader:
    """Batches of one split of a corpus. Raises UserError if a shard does not match the manifest or
    holds ids beyond vocab_size, or if no shard has enough tokens for one window."""

    data_dir: Path
    split: str  # "train" or "val"
    sequence_length: int
    micro_batch_size: int  # windows per rank and micro-step
    total_batch_size: int  # tokens: a multiple of micro_batch_size * sequence_length * world_size
    vocab_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        assert self.total_batch_size % self.sequence_length == 0, "checked by the trainer"
        entries = [e for e in read_manifest(self.data_dir)["shards"] if e["split"] == self.split]
        self.paths = [self.data_dir / entry["file"] for entry in entries]
        self.shards = [open_shard(path, entry["tokens"])
                       for path, entry in zip(self.paths, entries, strict=True)]
        self.window_counts = np.array(
            [(len(tokens) - 1) // self.sequence_length for tokens in self.shards], dtype=np.int64)
        self.windows_per_epoch = int(self.window_counts.sum())
        self.windows_per_step = self.total_batch_size // self.sequence_length
        needed = self.sequence_length if self.split == "train" else 1  # targets in a row
        if max((len(tokens) - 1 for tokens in self.shards), default=0) < needed:
            raise UserError(f"{self.data_dir} has {len(entries)} {self.split} shards, none of them "
                            f"with {needed} + 1 tokens for one window: add one (docs/data.md), or "
                            "lower --sequence-length")

    def locate(self, window: int) -> tuple[int, int]:
        """(shard, first token) of a window, counted from the start of the run."""
        epoch, position = divmod(window, self.windows_per_epoch)
        order = permutation(len(self.shards), self.seed, epoch)
        ends = np.cumsum(self.window_counts[order])
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(order[place])
        inner = permutation(int(self.window_counts[shard]), self.seed, epoch, shard)
        from_end = position - ends[place]  # of the shard's windows: negative
        return shard, int(inner[from_end]) * self.sequence_length

    def read(self, windows: Sequence[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) int64 of B windows (shard, first token, number of targets). A
        short window is padded with 0 in the inputs, IGNORE_INDEX in the targets."""
        tokens = np.full((len(windows), self.sequence_length + 1), IGNORE_INDEX, dtype=np.int64)
        for row, (shard, start, length) in zip(tokens, windows, strict=True):
            row[: length + 1] = self.shards[shard][start : start + length + 1]
            if (largest := row.max()) >= self.vocab_size:
                raise UserError(f"shard {self.paths[shard]} holds id {largest} near token "
                                f"{start:,}, but the vocabulary has {self.vocab_size} ids: write "
                                "the corpus again with this tokenizer")
        ids = torch.from_numpy(tokens)  # (B, T + 1)
        return ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets, each (micro_batch_size, sequence_length) int64."""
        row = (micro_step * self.world_size + self.rank) * self.micro_batch_size
        first = step * self.windows_per_step + row
        return self.read([(*self.locate(window), self.sequence_length)
                          for window in range(first, first + self.micro_batch_size)])

    def stream(self, step: int, micro_steps: int,
               place: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches from `step` on, moved by `place`; a thread prepares the next one."""
        calls = ((s, micro) for s in itertools.count(step) for micro in range(micro_steps))
        with ThreadPoolExecutor(1) as thread:
            def prepare() -> tuple[Tensor, Tensor]:
                inputs, targets = self.batch(*next(calls))
                return place(inputs), place(targets)

            ahead = thread.submit(prepare)
            while True:
                batch, ahead = ahead.result(), thread.submit(prepare)
                yield batch

    def eval_batches(self, max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the first max_tokens targets of the split (or all), each once."""
        T, windows, budget = self.sequence_length, [], max_tokens
        for shard, tokens in enumerate(self.shards):
            for start in range(0, len(tokens) - 1, T):
                length = min(T, len(tokens) - 1 - start, budget)
                if length > 0:
                    windows.append((shard, start, length))
                    budget -= length
        mine = windows[self.rank :: self.world_size]
        for first in range(0, len(mine), self.micro_batch_size):
            yield self.read(mine[first : first + self.micro_batch_size])


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pads token ids into input_ids and attention_masks, both (B, T) int64."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    masks = pad_sequence(list(map(torch.ones_like, ids)), batch_first=True)
    return pad_sequence(ids, batch_first=True, padding_value=PAD_TOKEN), masks


def checked_batch(model: GPT, ids: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The batch (B, T) as int64 on the model's device, without columns of only padding. Raises
    UserError for other shapes or dtypes, padding before a token, and ids outside the vocabulary."""
    if (ids.dim() != 2 or ids.shape != masks.shape or not len(ids) or ids.dtype == torch.bool
            or ids.is_floating_point() or masks.is_floating_point()):
        raise UserError(f"input_ids are {ids.dtype} {tuple(ids.shape)} and attention_masks "
                        f"{masks.dtype} {tuple(masks.shape)}, expected integers (B, T), B >= 1")
    ids, masks = (x.to(model.transformer.wte.weight.device, torch.int64) for x in (ids, masks))
    lengths = masks.sum(1)  # (B,)
    is_token = torch.arange(ids.size(1), device=ids.device) < lengths[:, None]  # (B, T)
    if not torch.equal(masks, is_token.long()) or lengths.min() < 1:
        raise UserError("each row of attention_masks must be ones (at least one), then zeros")
    T, vocab_size = int(lengths.max()), min(model.config.vocab_size, N_VOCAB)
    ids = ids.where(is_token, PAD_TOKEN)[:, :T]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(f"input_ids range from {low} to {high}, expected 0 to {vocab_size - 1}")
    return ids, masks[:, :T]


def read_rows(path: Path, made_by: str = "") -> list[tuple[str, object]]:
    """The rows of a JSON list, JSON Lines or parquet, each with its place ("x.jsonl line 3", on
    every node). `made_by`: scripts that make the file. Raises UserError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})"
                        + f": make it with {made_by}" * bool(made_by)) from None
    if content.startswith(b"PAR1"):
        try:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        except (ValueError, OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} is not a whole parquet file: {first_line(error)}") from None
        return [(f"{path.name} row {number}", row) for number, row in enumerate(rows, 1)]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    place = str(path)
    try:
        if text.lstrip().startswith("["):
            return [(f"{path.name} row {n}", row) for n, row in enumerate(json.loads(text), 1)]
        return [(place := f"{path.name} line {number}", json.loads(line))
                for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    except (ValueError, RecursionError) as error:  # also too many digits, or nested too deep
        raise UserError(f"{place} is not JSON ({first_line(error)}); expected a JSON list, or JSON "
                        "Lines with one object per line, or parquet") from None


def read_columns(path: Path, columns: str, made_by: str) -> list[tuple[str, object]]:
    """`read_rows`; given `columns`, "output=NAME", only these, renamed. Raises UserError."""
    names = dict(pair.split("=", 1) for pair in columns.split(",") if "=" in pair)
    if columns and ("" in names.values() or names.keys() - {*COLUMNS.split(", ")}
                    or len({*names.values()}) <= columns.count(",")):
        raise UserError(f"--columns {columns}: expected instruction=NAME,output=NAME, or likewise "
                        f"the key of your rows for any of {COLUMNS}, each once")
    rows = read_rows(path, made_by)
    for place, row in rows if names else ():
        if isinstance(row, dict) and (missing := sorted(names.values() - row.keys())):
            raise UserError(f"{place} has no {', '.join(missing)} (--columns), only the keys "
                            f"{', '.join(row)!r:.200}")
    return [(place, {name: row[key] for name, key in names.items()}
             if names and isinstance(row, dict) else row) for place, row in rows]


def load_pairs(path: str, flag: str, block_size: int, template: str,
               columns: str = "") -> tuple[list[Pair], str]:
    """The usable pairs of a file given by `flag`, and a summary. Raises UserError."""
    rows = read_columns(Path(path), columns, f"rlhf_data/hh_rlhf_downloader.py, or change {flag}")
    pairs, summary = make_pairs(rows, block_size, template)
    if len(pairs) < 2 - (flag == "--val-data"):  # one to train on, one to validate on
        raise UserError(f"{flag} {path}: {summary}; expected more: give other rows, or a "
                        "model with a longer context")
    return pairs, summary


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample responses to, and what a reward function may compare them with."""

    place: str  # of the row, for messages
    instruction: str
    input: str
    output: str  # the reference answer; empty if the row has none
    ids: list[int]


def load_prompts(path: str, flag: str, block_size: int, max_tokens: int, val_fraction: float,
                 template: str = ALPACA, columns: str = "") -> tuple[list, list, str]:
    """(training prompts, held-out prompts, summary): the different prompts of instructions,
    conversations (the first) or pairs, with room for max_tokens. A prompt is held out if
    `split_rows` holds out all of its rows (if none is, the last), as for fine-tuning. UserError."""
    rows = read_columns(Path(path), columns, INSTRUCTIONS.replace("--data", flag))
    known = list(filter(None, (row_prompt(row, place, template) for place, row in rows)))
    first = {tuple(prompt.ids): prompt for prompt in known[::-1]}
    prompts = [prompt for prompt in known if first[tuple(prompt.ids)] is prompt]
    fitting = [prompt for prompt in prompts if len(prompt.ids) + max_tokens <= block_size]
    unusable = len(rows) - len(known)
    summary = (f"{len(fitting):,} prompts of {len(rows):,} rows (left out: "
               + f"{unusable:,} unusable pairs of transcripts, " * bool(unusable) +
               f"{len(known) - len(prompts):,} repeated, {len(prompts) - len(fitting):,} without "
               f"room for {max_tokens} tokens in a context of {block_size})")
    keys = [(prompt.instruction, prompt.input, prompt.output) for prompt in known]
    seen = {tuple(prompt.ids) for prompt in fitting and split_rows(known, keys, val_fraction)[0]}
    train = [prompt for prompt in fitting if tuple(prompt.ids) in seen]
    held_out = [prompt for prompt in fitting if tuple(prompt.ids) not in seen] or train[-1:]
    train = train[:-1] if held_out == train[-1:] else train
    if not held_out or not (train or val_fraction >= 1):
        raise UserError(f"{flag} {path}: {summary}: lower --max-tokens, or give other rows")
    return train, held_out, f"{summary}; {len(train):,} to train on, {len(held_out):,} held out"


def row_prompt(row: object, place: str, template: str) -> Prompt | None:
    """The prompt of a row; None for transcripts that are no pair. Raises UserError."""
    names = {name for name, value in row.items() if value is not None} if (
        isinstance(row, dict)) else set()
    if names & {"instruction", "prompt"}:  # all that is needed
        given = {name: row[name] for name in row if name in names}
        row = dict.fromkeys(("output", "completion"), given.get("chosen", "")) | given
    elif names >= {"chosen", "rejected"} and "messages" not in names:
        pairs, _ = make_pairs([(place, row)], sys.maxsize, template)
        return next((Prompt(place, pair.instruction, "", decode(pair.chosen[:-1]), pair.prompt)
                     for pair in pairs), None)
    texts = text_turns(row, place)[0]
    return Prompt(place, *texts, encode(format_prompt(*texts[:2], template)))


def read_turns(path: Path, columns: str = "") -> list[list[TextTurn]]:
    """The turns of every row of a file, see `read_columns`. Raises UserError for a bad row."""
    return [text_turns(row, place) for place, row in read_columns(path, columns, INSTRUCTIONS)]


def text_turns(row: object, place: str) -> list[TextTurn]:
    """The turns of a row, in one of the three schemas (docs/formats.md). Raises UserError."""
    if isinstance(row, dict) and row.get("messages") is not None:
        return message_turns(row["messages"], place)
    return [tuple(row_texts(row, place, FORMS))]


def message_turns(messages: object, place: str) -> list[TextTurn]:
    """The turns of {role, content}s; a system message begins the first turn. Raises UserError."""
    roles = [message.get("role") if isinstance(message, dict) else None
             for message in messages] if isinstance(messages, list) else []
    start = int(roles[:1] == ["system"])
    if len(roles) < 2 or roles[start:] != ["user", "assistant"] * (len(roles) // 2):
        raise UserError(f"{place}: messages have the roles {roles!r:.80}, expected {ROLES}")
    texts = [require_text(message.get("content"), "content", place) for message in messages]
    if not all(text.strip() for text in texts[start::2]):
        raise UserError(f"{place} has an empty user message")
    if start:
        texts[1] = "\n\n".join(filter(None, texts[:2]))
    return [(user, "", assistant)
            for user, assistant in zip(texts[start::2], texts[start + 1 :: 2], strict=True)]


def token_ids(example: Example) -> list[int]:
    return [token for prompt, response in example for token in prompt + response]


def num_inputs(example: Example) -> int:
    """Its tokens but for the last, which is only a target."""
    return sum(len(prompt) + len(response) for prompt, response in example) - 1


def make_examples(rows: list[list[TextTurn]], block_size: int,
                  template: str = ALPACA) -> tuple[list[TextTurn], list[Example], str]:
    """(the first turns, the token ids) of the usable rows, and a summary that counts what was left
    out: rows without an answer, and those longer than the context, whose end would be cut off."""
    answered = [turns for turns in rows if all(
        (text := normalize(output)) and not text.startswith(NO_ANSWER) for *_, output in turns)]
    encoded = [(turns[0], [encode_example(*one, template) for one in turns]) for turns in answered]
    usable = [(turn, example) for turn, example in encoded if num_inputs(example) <= block_size]
    keys, examples = [turn for turn, _ in usable], [example for _, example in usable]
    return keys, examples, (
        f"{len(usable):,} of {len(rows):,} rows (left out: {len(rows) - len(answered):,} without "
        f"an answer and {len(answered) - len(usable):,} over {block_size} tokens)")


def normalize(text: str) -> str:
    """The text without differences in case and whitespace."""
    return " ".join(text.casefold().split())


def content_hash(*texts: str) -> float:
    """The SHA-256 of texts, up to case and whitespace, as a fraction of 1."""
    digest = hashlib.sha256(json.dumps([normalize(text) for text in texts]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exact: a float has 53 bits


def split_rows(rows: Sequence, keys: Sequence[tuple[str, ...]], val_fraction: float,
               val_start: float = 0.0) -> tuple[list, list, str]:
    """(training rows, held-out rows, summary). The key of a row is (instruction, input) or
    (instruction, input, response); of a conversation, the first user message is the instruction,
    with a system message before it.

    A row is held out if content_hash(instruction, input) is below val_fraction: the same rows in
    every file, those at 0.05 also at 0.15. If none is below, the lowest is held out. A prompt of
    more than a fifth of the rows would empty one side, so its rows are hashed with their responses.
    val_start moves the held-out interval of hashes. Raises UserError if no row is left."""
    hashes = [content_hash(*key[:2]) for key in keys]
    counts = Counter(hashes)
    common = {value for value, count in counts.items() if count > max(1, len(keys) / 5)}
    hashes = [((content_hash(*key) if value in common else value) - val_start) % 1
              for key, value in zip(keys, hashes, strict=True)]
    below = max(val_fraction, math.nextafter(min(hashes, default=0), 1))
    train, held_out = ([row for row, value in zip(rows, hashes, strict=True)
                        if (value < below) == side] for side in (False, True))
    if not train and val_fraction < 1:
        raise UserError(f"none of {len(keys)} usable rows is left to train on at --val-fraction "
                        f"{val_fraction}: lower it, or give rows with more different prompts")
    summary = (f"{len(train):,} to train on, {len(held_out):,} held out; "
               f"{len(keys) - len(counts):,} repeat another's prompt")
    if common:
        summary += f"; {len(common)} prompts of over a fifth of the rows each: split by response"
    return train, held_out, summary


def split_examples(turns: list[list[TextTurn]], block_size: int, val_fraction: float,
                   template: str = ALPACA) -> tuple[list[Example], list[Example], str]:
    """(training rows, held-out rows by length, summary), see `make_examples` and `split_rows`."""
    keys, examples, usable = make_examples(turns, block_size, template)
    if len(examples) < 2:  # one to train on, one to validate on
        raise UserError(f"--data: {usable}; expected at least 2: give other rows, or a model with "
                        "a longer context")
    trained, held_out, summary = split_rows(examples, keys, val_fraction)
    return trained, sorted(held_out, key=num_inputs), f"{usable}; {summary}"


def split_pairs(pairs: Sequence[Pair], val_fraction: float, val_start: float = 0.0,
                ) -> tuple[list[Pair], list[Pair], str]:
    """(training pairs, held-out pairs by length, summary), as for fine-tuning: `split_rows`."""
    keys = [(pair.instruction, pair.input, decode(pair.chosen[:-1])) for pair in pairs]
    trained, held_out, summary = split_rows(pairs, keys, val_fraction, val_start)
    return trained, sorted(held_out, key=lambda pair: pair.num_tokens), summary


def row_batches(rows: Sequence, length_of: Callable[[object], int], batch_size: int, seed: int,
                step: int) -> Iterator[list]:
    """The rows of `step` and of every later one, a pure function of (seed, step). An epoch visits
    every row once, in a new order: shuffled, sorted by `padded_length`, cut into steps, the steps
    shuffled. So the rows of a step have nearly one padded length. The last step of an epoch
    has fewer rows if they do not divide evenly, of a random length."""
    steps_per_epoch = -(-len(rows) // batch_size)  # ceiling division
    padded = np.array([padded_length(length_of(row)) for row in rows])
    for epoch in itertools.count(step // steps_per_epoch):
        order = permutation(len(rows), seed, epoch)
        order = order[np.argsort(padded[order], kind="stable")]
        shuffled = permutation(steps_per_epoch, seed, epoch, 1)
        cuts = np.arange(batch_size, len(rows), batch_size)
        cuts[shuffled[-1] :] -= -len(rows) % batch_size  # so that the last step is the short one
        steps = np.split(order, cuts)
        for i in shuffled[step % steps_per_epoch :]:
            yield [rows[j] for j in steps[i]]
        step = 0
