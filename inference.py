"""Continues prompts with a base model, or answers them with a fine-tuned one.

    python inference.py --checkpoint out/finetune "What is a list?" "Name three colours."
    python inference.py --checkpoint gpt2 --max-steps 50 "Hello, I'm a language model,"
    python inference.py --checkpoint out/finetune --prompts-file questions.txt --json
    echo "What is a list?" | python inference.py --checkpoint out/finetune
    python inference.py --checkpoint out/finetune --chat

A checkpoint that was fine-tuned carries the name of its prompt template, which is applied by
itself; --raw gives it the bare prompts. A file and standard input hold one prompt a line. All of a
prompt is text: "<|endoftext|>" in it is not the token that separates documents. In float32, a text
depends on its prompt and the seed alone, whatever prompts there are beside it; bfloat16 rounds a
hundred times as much, and more differently in another batch. A prompt that is given again has the
next seed.

--json prints one object a line: prompt, response, prompt_tokens (how many), tokens (the response's
ids), logprobs (of each, in nats, at temperature 1 and among all tokens) and finish_reason: "stop"
(the model emitted <|endoftext|>), "length" (--max-steps) or "context" (cut, for the context is
full). From Python, `tokenize_batch_input`, `generate`, `decode_generation` and `logprobs` of
sampling.py do the same.
"""

import dataclasses
import functools
import json
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minigpt2.checkpoint import find_checkpoint, load_model, read_prompt_template
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Dtype, allow_nondeterministic, pick_device, pick_dtype
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import LOSS_ROWS_CPU, LOSS_ROWS_GPU
from minigpt2.sampling import SamplingParams, choose, row_seeds, stream_keys
from minigpt2.tokenizer import (
    EOT_TOKEN,
    N_VOCAB,
    StreamDecoder,
    decode,
    encode,
    format_prompt,
    repair,
)
from model import GPT, GPTConfig

PAD_TOKEN = 0  # what a padded place holds; only its mask says that it is padding
# On a GPU: how many tokens are decoded between two looks at what has finished, for which the host
# must wait; how many slots the cache's span grows by, each with a graph of its own; and how many
# tokens must be asked for to make graphs worth while
STEPS_PER_LOOK_GPU, SPAN_GPU, GRAPH_STEPS = 16, 128, 64


# ---------------------------------------------------------------- texts to batches and back


def tokenize_batch_input(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts -> input_ids and attention_masks, each (B, T) int64, T the longest prompt's tokens.

    All of a prompt is text: "<|endoftext|>" in it is seven tokens and not the one that separates
    documents. Raises UserError for no prompt at all and for an empty one: there is nothing to
    continue.
    """
    return pad_rows(encode_prompts(prompts))


def encode_prompts(prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of every prompt. Raises UserError as `tokenize_batch_input` does."""
    if isinstance(prompts, str):
        raise UserError("prompts is one text, expected a list of them")
    rows = [encode(prompt) for prompt in prompts]
    if not rows:
        raise UserError("no prompt given")
    if [] in rows:
        raise UserError(f"prompt {rows.index([]) + 1} of {len(rows)} is empty")
    return rows


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of unequal length -> input_ids and attention_masks, each (B, T) int64."""
    input_ids = torch.full((len(rows), max(map(len, rows))), PAD_TOKEN)  # (B, T)
    attention_masks = torch.zeros_like(input_ids)  # (B, T)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_masks[i, : len(row)] = 1
    return input_ids, attention_masks


def generated_rows(output_ids: torch.Tensor, output_masks: torch.Tensor,
                   prompt_masks: torch.Tensor) -> list[list[int]]:
    """What `generate` added to every row: its tokens, with <|endoftext|> if it came."""
    lengths, skips = output_masks.sum(1).tolist(), prompt_masks.sum(1).tolist()
    return [ids[skip:length] for ids, skip, length in
            zip(output_ids.tolist(), skips, lengths, strict=True)]


def decode_generation(output_ids: torch.Tensor, output_masks: torch.Tensor,
                      prompt_masks: torch.Tensor | None = None) -> list[str]:
    """The text of every row of `generate`'s result, without padding and without <|endoftext|>;
    given the prompts' attention_masks, only what was generated."""
    if prompt_masks is None:
        prompt_masks = torch.zeros_like(output_masks)
    return [decode(row[:-1] if row and row[-1] == EOT_TOKEN else row)
            for row in generated_rows(output_ids, output_masks, prompt_masks)]


def finish_reasons(output_ids: torch.Tensor, output_masks: torch.Tensor,
                   prompt_masks: torch.Tensor, max_steps: int) -> list[str]:
    """Why every row of `generate`'s result ended: "stop" (<|endoftext|>), "length" (it has its
    max_steps tokens) or "context" (cut before that, for the context is full)."""
    return ["stop" if row and row[-1] == EOT_TOKEN else
            "length" if len(row) >= max_steps else "context"
            for row in generated_rows(output_ids, output_masks, prompt_masks)]


def check_vocabulary(model: GPT, checkpoint: str) -> None:
    """Raises UserError for a model that lacks ids of GPT-2's encoding. More ids (an added pad, say)
    do no harm: they are never sampled."""
    if model.config.vocab_size < N_VOCAB:
        raise UserError(f"--checkpoint {checkpoint} has {model.config.vocab_size} ids, GPT-2's "
                        f"encoding has {N_VOCAB}: it was trained with another tokenizer")


class KVCache:
    """Keys and values of every layer, allocated once: slot t of row b holds token t of row b.

    Rows may be of unequal length. What a slot held before its row reaches it (the keys of a
    prompt's padding, say) is overwritten then, and never attended before. `span` is how many slots
    the longest row has filled, or more: those beyond are not even looked at.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, device, dtype):
        # a head's keys lie together: a CPU reads them half as fast again as it would strided ones
        shape = (config.n_layer, batch_size, config.n_head, max_length, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D)
        self.v = torch.zeros(shape, device=device, dtype=dtype)  # (n_layer, B, H, S, D)
        self.rows = torch.arange(batch_size, device=device)  # (B,)
        self.slots = torch.arange(max_length, device=device)  # (S,)
        self.span = max_length

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor,
              positions: torch.Tensor | None) -> None:
        """Stores k and v (B, H, T, D): of whole prompts into slots 0 .. T - 1, or of one token a
        row at `positions` (B, 1)."""
        for stored, new in ((self.k[layer], k), (self.v[layer], v)):
            if positions is None:
                stored[:, :, : new.size(2)] = new
            else:
                stored[self.rows, :, positions[:, 0]] = new[:, :, 0].to(stored.dtype)  # (B, H, D)

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer, each (B, H, span, D)."""
        return self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span]

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of the one new token of each row, at `positions` (B, 1): 0
        for the slots that it may attend, -inf for those beyond it."""
        beyond = self.slots[: self.span] > positions  # (B, span)
        mask = torch.zeros(beyond.shape, device=beyond.device, dtype=self.k.dtype)
        return mask.masked_fill_(beyond, -torch.inf)[:, None, None, :]  # (B, 1, 1, span)

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these rows (B',) alone."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.rows = self.rows[: len(rows)]


# ---------------------------------------------------------------- the ladder


def prefill(model: GPT, input_ids: torch.Tensor, lengths: torch.Tensor,
            cache: KVCache | None) -> torch.Tensor:
    """Runs the prompts (B, T) through the model, filling cache slots 0 .. T - 1; returns the
    logits (B, V) of the token after each row's last."""
    x = model.hidden_states(input_ids, cache)  # (B, T, C)
    rows = torch.arange(len(x), device=x.device)
    return model.lm_head(x[rows, lengths - 1])


def decode_one_token(model: GPT, token: torch.Tensor, position: torch.Tensor,
                     cache: KVCache) -> torch.Tensor:
    """Feeds one token (B,) a row at its position (B,); returns the logits (B, V) of the next."""
    x = model.hidden_states(token[:, None], cache, position[:, None])  # (B, 1, C)
    return model.lm_head(x[:, 0])


@torch.no_grad()
def generate(model: GPT, input_ids: torch.Tensor, attention_masks: torch.Tensor,
             temperature: float, max_steps: int, *, top_k: int = 0, top_p: float = 1.0,
             repetition_penalty: float = 1.0, seed: int | Sequence[int] = 0,
             use_cache: bool = True, on_tokens: Callable[[int, list[int]], None] | None = None,
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """Continues every row until it has emitted <|endoftext|>, or max_steps tokens, or the context
    is full (`finish_reasons` tells which). Returns (output_ids, output_masks), (B, T') int64 on the
    model's device, in the same right-padded layout: prompt, new tokens with <|endoftext|> if it
    came, then pads with mask 0.

    For temperature, top_k, top_p and repetition_penalty see `SamplingParams`. A row draws from a
    random stream of its own, named by its prompt and `seed`, or its own seed where there is one for
    every row, so that its tokens are the same whatever else is in the batch: in float32, but for
    tokens that are equal to rounding; weights in bfloat16 round a hundred times as much. With one
    seed, a prompt that is given again has the next one: of two equal rows, the second is what the
    next seed gives. `use_cache=False` computes everything anew for every token, as a check.

    on_tokens(row, tokens) is called with the new tokens of a row as they come: one at a time, on a
    GPU some together. An exception that it raises, or a KeyboardInterrupt, ends everything.

    Raises UserError for a prompt without room to grow, naming its length and the limit; for a batch
    of another layout, ids that are no tokens, settings without a meaning, and a model whose logits
    are not finite.
    """
    choice = SamplingParams(temperature, top_k, top_p, repetition_penalty)
    ids, masks = checked_batch(model, input_ids, attention_masks)  # (B, T)
    device, lengths = ids.device, masks.sum(1)  # (B,)
    prompts = [tuple(row[:length]) for row, length in
               zip(ids.tolist(), lengths.tolist(), strict=True)]
    check_room(list(map(len, prompts)), max_steps, model.config.block_size)
    seeds = row_seeds(prompts, seed)
    T, max_steps = ids.size(1), min(max_steps, model.config.block_size)
    total = min(T + max_steps, model.config.block_size)
    output_ids = F.pad(ids, (0, total - T), value=PAD_TOKEN)  # (B, total)
    if max_steps > 0:
        keys = stream_keys(prompts, seeds).to(device)
        # what is drawn here has no part in a training that must be deterministic
        with allow_nondeterministic(), torch.cuda.device(device if device.type == "cuda" else -1):
            rows = Continuation(model, choice, output_ids, lengths, max_steps, keys, use_cache)
            while rows.look(on_tokens):
                rows.advance()
        lengths = rows.final_lengths
    T = int(lengths.max())
    output_masks = torch.arange(T, device=device) < lengths[:, None]  # (B, T')
    return output_ids[:, :T], output_masks.long()


class Continuation:
    """The rows that are being continued. With a cache, all that `step` changes it changes in place,
    so that a CUDA graph of one step is a graph of every one."""

    def __init__(self, model: GPT, choice: SamplingParams, output_ids: torch.Tensor,
                 lengths: torch.Tensor, max_steps: int, keys: torch.Tensor, use_cache: bool):
        device, config = output_ids.device, model.config
        self.model, self.choice, self.output_ids = model, choice, output_ids
        self.on_gpu, self.graph = device.type == "cuda", None
        self.uses_graphs = self.on_gpu and use_cache and max_steps >= GRAPH_STEPS
        self.final_lengths = lengths.clone()  # (B,), of all rows, also those let go
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all logits so far
        # of the rows kept:
        self.row = torch.arange(len(lengths), device=device)  # which of the batch it is
        self.lengths, self.prompt_lengths, self.keys = lengths.clone(), lengths, keys
        self.ends = (lengths + max_steps).clamp(max=config.block_size)  # the longest it may become
        self.finished = torch.zeros_like(lengths, dtype=torch.bool)
        self.told = lengths.tolist()  # how much of it on_tokens knows
        self.longest = max(self.told)  # no row is longer
        self.seen = self.cache = None
        if choice.repetition_penalty != 1:
            vocab_size = min(config.vocab_size, N_VOCAB)
            self.seen = torch.zeros(len(lengths), vocab_size, dtype=torch.bool, device=device)
            for seen, ids, length in zip(self.seen, output_ids, self.told, strict=True):
                seen[ids[:length]] = True
        if use_cache:
            # a CPU computes attention in float32 faster than in bfloat16, and more exactly
            dtype = torch.float32 if device.type == "cpu" else model.transformer.wte.weight.dtype
            slots = self.span_of(output_ids.size(1))
            self.cache = KVCache(config, len(lengths), slots, device, dtype)
            self.cache.span = 0  # until the first step
        prompts = output_ids[:, : self.longest]
        self.logits = prefill(model, prompts, lengths, self.cache)  # (B, V)
        self.choose()

    def span_of(self, length: int) -> int:
        """How many slots are attended when the longest row has `length` tokens."""
        return -(-length // SPAN_GPU) * SPAN_GPU if self.on_gpu else length

    def choose(self) -> None:
        """The next token of every row that has not finished, from `logits`."""
        self.finite &= self.logits.isfinite().all()
        draw = self.lengths - self.prompt_lengths
        token = choose(self.logits, self.choice, self.keys, draw, self.seen)  # (B,)
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        place = self.lengths.clamp(max=self.output_ids.size(1) - 1)  # a full row writes nothing
        written = self.output_ids[self.row, place]
        self.output_ids[self.row, place] = torch.where(self.finished, written, token)
        self.lengths += ~self.finished
        self.finished |= (token == EOT_TOKEN) | (self.lengths >= self.ends)

    def step(self) -> None:
        """Feeds every row its last token and chooses the next."""
        if self.cache is None:
            written = self.output_ids[self.row, : self.longest]
            self.logits = prefill(self.model, written, self.lengths, None)
        else:
            last = self.lengths - 1
            token = self.output_ids[self.row, last]
            self.logits.copy_(decode_one_token(self.model, token, last, self.cache))
        self.choose()

    def advance(self) -> None:
        """As many steps as come between two looks."""
        for _ in range(STEPS_PER_LOOK_GPU if self.on_gpu else 1):
            span = self.span_of(self.longest)
            if self.cache is not None and span != self.cache.span:
                self.cache.span, self.graph = span, None
                self.step()  # warms up what is captured next
            elif self.uses_graphs:
                if self.graph is None:
                    self.capture()
                self.graph.replay()
            else:
                self.step()
            self.longest = min(self.longest + 1, self.output_ids.size(1))

    def capture(self) -> None:
        """Takes `step` down as a CUDA graph, which does it again on the same tensors."""
        self.graph = torch.cuda.CUDAGraph()
        # on the rows' own device, and while a loader's thread may pin memory
        with torch.cuda.graph(self.graph, stream=capture_stream(self.row.device),
                              capture_error_mode="thread_local"):
            self.step()

    def look(self, on_tokens: Callable[[int, list[int]], None] | None) -> bool:
        """Tells on_tokens what is new, drops finished rows once they are half of all; whether any
        is left. The only place where the host waits for a GPU."""
        if not self.finite:
            raise UserError("the model's logits are not finite: its training has diverged (use an "
                            "earlier checkpoint), or its weights are too large for float16")
        lengths = self.lengths.tolist()
        assert lengths != self.told, "steps that continue no row"
        if on_tokens is not None:
            first = min(self.told)
            new = self.output_ids[self.row, first : max(lengths)].tolist()
            for row, ids, told, length in zip(self.row.tolist(), new, self.told, lengths,
                                              strict=True):
                if told < length:
                    on_tokens(row, ids[told - first : length - first])
        self.told, self.longest = lengths, max(lengths)
        self.final_lengths[self.row] = self.lengths
        live = (~self.finished).nonzero()[:, 0]  # (B',)
        if 0 < 2 * len(live) <= len(self.row):
            self.keep(live)
        return len(live) > 0

    def keep(self, rows: torch.Tensor) -> None:
        """Goes on with these of the rows (B',) alone."""
        for name in ("row", "lengths", "prompt_lengths", "keys", "ends", "finished", "logits"):
            setattr(self, name, getattr(self, name)[rows])
        self.told = [self.told[i] for i in rows.tolist()]
        self.longest, self.graph = max(self.told), None
        if self.seen is not None:
            self.seen = self.seen[rows]
        if self.cache is not None:
            self.cache.keep(rows)
            self.cache.span = 0  # the next step warms up


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which graphs are captured: each would keep a workspace of its own."""
    return torch.cuda.Stream(device)


def checked_batch(model: GPT, input_ids: torch.Tensor, attention_masks: torch.Tensor,
                  ) -> tuple[torch.Tensor, torch.Tensor]:
    """The two as (B, T) int64 on the model's device, padding all PAD_TOKEN, and no column of
    nothing but padding. Raises UserError unless both are integers (B, T), rows are real tokens and
    then padding, and real tokens are ids that the model and the tokenizer have."""
    ids, masks = input_ids, attention_masks
    if ids.dim() != 2 or ids.shape != masks.shape or not len(ids):
        raise UserError(f"input_ids {tuple(ids.shape)} and attention_masks {tuple(masks.shape)} "
                        "must both be (B, T) with B at least 1")
    if ids.is_floating_point() or ids.dtype == torch.bool or masks.is_floating_point():
        raise UserError(f"input_ids are {ids.dtype} and attention_masks {masks.dtype}, expected "
                        "integers")
    device = model.transformer.wte.weight.device
    ids, masks = ids.to(device, torch.int64), masks.to(device, torch.int64)
    lengths = masks.sum(1)  # (B,)
    real = torch.arange(ids.size(1), device=device) < lengths[:, None]  # (B, T)
    if not torch.equal(masks, real.long()) or lengths.min() < 1:
        raise UserError("every row of attention_masks must be ones, at least one, and then zeros")
    least, most = int(ids[real].min()), int(ids[real].max())
    vocab_size = min(model.config.vocab_size, N_VOCAB)
    if least < 0 or most >= vocab_size:
        raise UserError(f"input_ids holds ids from {least} to {most}, expected 0 to "
                        f"{vocab_size - 1}")
    T = int(lengths.max())
    return ids.where(real, PAD_TOKEN)[:, :T], masks[:, :T]


def check_room(lengths: Sequence[int], max_steps: int, block_size: int) -> None:
    """Raises UserError unless prompts of these lengths can grow by a token, if any is asked for."""
    if not isinstance(max_steps, numbers.Integral) or max_steps < 0:
        raise UserError(f"max_steps is {max_steps!r:.60}, expected a whole number, 0 or above")
    longest = max(lengths)
    if longest + min(max_steps, 1) > block_size:
        raise UserError(f"prompt {lengths.index(longest) + 1} of {len(lengths)} has {longest} "
                        f"tokens; the context is {block_size} and must hold the answer too: "
                        "shorten it")


# ---------------------------------------------------------------- scoring


def logprobs(model: GPT, input_ids: torch.Tensor, attention_masks: torch.Tensor) -> torch.Tensor:
    """The log-probability, in nats, of every token but the first given those before it: (B, T - 1)
    float32 for input_ids (B, T), 0 where the token is padding. One forward pass; gradients flow if
    they are enabled. At temperature 1, this is what `generate` draws from: ids beyond the
    tokenizer's have probability zero.

    Logits exist for a few rows at a time only; a backward pass computes them once more. Raises
    UserError for a batch that `generate` would not take either, ValueError past block_size.
    """
    ids, masks = checked_batch(model, input_ids, attention_masks)  # (B, T')
    x = model.hidden_states(ids)[:, :-1]  # (B, T' - 1, C)
    keep = masks[:, 1:].bool()  # (B, T' - 1)
    rows = LOSS_ROWS_CPU if x.device.type == "cpu" else LOSS_ROWS_GPU
    picked = [checkpoint(picked_logprobs, model, *part, use_reentrant=False,
                         preserve_rng_state=False) if torch.is_grad_enabled() else
              picked_logprobs(model, *part)
              for part in zip(x[keep].split(rows), ids[:, 1:][keep].split(rows), strict=True)]
    scores = torch.zeros(keep.shape, device=x.device).masked_scatter(keep, torch.cat(picked))
    return F.pad(scores, (0, input_ids.size(1) - ids.size(1)))  # (B, T - 1)


def picked_logprobs(model: GPT, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log softmax(head(x))[target] of rows x (N, C) and targets (N,): (N,) float32."""
    logits = model.lm_head(x)[:, :N_VOCAB].float()  # (N, V)
    return -F.cross_entropy(logits, targets, reduction="none")


# ---------------------------------------------------------------- the command line

ENDINGS = {"stop": "ended by <|endoftext|>", "length": "ended by --max-steps",
           "context": "cut: the context is full"}


@dataclass(frozen=True)
class InferenceConfig:
    prompts: tuple[str, ...] = flag((), "prompts (default: read standard input)", positional=True)
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name")
    prompts_file: str | None = flag(None, "a file with one prompt a line")
    chat: bool = flag(False, "a conversation instead of prompts")
    json: bool = flag(False, "one JSON object a line, with tokens and their log-probabilities")
    raw: bool = flag(False, "give the prompts to a fine-tuned model without its template")
    temperature: float = flag(0.8, "0 takes the likeliest token", minimum=0)
    top_k: int = flag(0, "only the k likeliest tokens; 0: all", minimum=0)
    top_p: float = flag(1.0, "only the likeliest tokens with this probability together; 1: all",
                       minimum=0)
    repetition_penalty: float = flag(1.0, "above 1: tokens that are there become less likely")
    max_steps: int = flag(128, "most tokens of an answer", minimum=1)
    batch_size: int = flag(8, "prompts that are continued at once", minimum=1)
    seed: int = flag(0, "of the samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Dtype = flag("auto", "of the weights; auto: bfloat16 on CUDA, float32 elsewhere")


def read_prompts(config: InferenceConfig) -> list[str]:
    """The prompts from the one place they were given in. Raises UserError for none or an empty."""
    if config.prompts and config.prompts_file:
        raise UserError("prompts given both as arguments and with --prompts-file: choose one")
    if config.prompts:
        prompts = list(map(repair, config.prompts))
    elif config.prompts_file:
        prompts = lines(Path(config.prompts_file).read_bytes(), config.prompts_file)
    else:
        if sys.stdin is not None and sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        prompts = [] if sys.stdin is None else lines(sys.stdin.buffer.read(), "standard input")
    if not prompts:
        raise UserError("no prompt given: as arguments, with --prompts-file or on standard input")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} of {len(prompts)} is empty")
    return prompts


def lines(data: bytes, source: str) -> list[str]:
    """The lines of a text in UTF-8, whatever ends them on the system it comes from, but for empty
    ones at its end. Not `splitlines`, which also cuts at characters like U+2028. Raises
    UserError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is no UTF-8: {error}") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    return text.split("\n") if text else []


def check_config(config: InferenceConfig) -> SamplingParams:
    """How tokens are chosen. Raises UserError for settings that have no meaning, alone or
    together."""
    if config.chat and (config.prompts or config.prompts_file or config.json):
        raise UserError("--chat reads what is typed: it takes no prompts, --prompts-file or --json")
    if config.chat and config.batch_size != InferenceConfig.batch_size:
        raise UserError("--chat answers one message at a time: --batch-size has no meaning")
    if sys.stdout is None:
        raise UserError("standard output is closed: there is nowhere to print to")
    if config.chat and sys.stdin is None:
        raise UserError("--chat reads standard input, which is closed")
    return SamplingParams(config.temperature, config.top_k, config.top_p, config.repetition_penalty)


def respond(model: GPT, config: InferenceConfig, choice: SamplingParams, prompts: list[str],
            texts: list[str]) -> None:
    """Continues the texts that were made of the prompts, some at a time, and prints what comes; of
    a single one, every token as it comes."""
    rows = encode_prompts(texts)
    check_room(list(map(len, rows)), config.max_steps, model.config.block_size)  # of all, first
    seeds = row_seeds(texts, config.seed)
    is_streamed = len(texts) == 1 and not config.json
    for start in range(0, len(texts), config.batch_size):
        part = slice(start, start + config.batch_size)
        batch, decoder = pad_rows(rows[part]), StreamDecoder()
        if is_streamed:
            print(f"prompt:   {prompts[0]}\nresponse: ", end="", flush=True)
        output = generate(model, *batch, max_steps=config.max_steps, seed=seeds[part],
                          on_tokens=printing(decoder, [], []) if is_streamed else None,
                          **dataclasses.asdict(choice))
        if is_streamed:
            print(decoder.flush(), end="")
        show(model, config, prompts[part], batch[1], *output, is_streamed)


def show(model: GPT, config: InferenceConfig, prompts: list[str], prompt_masks: torch.Tensor,
         output_ids: torch.Tensor, output_masks: torch.Tensor, is_streamed: bool) -> None:
    """Prints the results of some prompts, but for what was streamed already."""
    responses = decode_generation(output_ids, output_masks, prompt_masks)
    rows = generated_rows(output_ids, output_masks, prompt_masks)
    lengths = prompt_masks.sum(1).tolist()
    reasons = finish_reasons(output_ids, output_masks, prompt_masks, config.max_steps)
    if config.json:
        with torch.no_grad():
            scores = logprobs(model, output_ids, output_masks).tolist()
    for i, prompt in enumerate(prompts):
        if config.json:
            print(json.dumps({
                "prompt": prompt, "response": responses[i], "prompt_tokens": lengths[i],
                "tokens": rows[i], "logprobs": scores[i][lengths[i] - 1 :][: len(rows[i])],
                "finish_reason": reasons[i]}), flush=True)
            continue
        if not is_streamed:
            print(f"prompt:   {prompt}\nresponse: {responses[i]}", end="")
        print(f"\n          [{len(rows[i])} tokens, {ENDINGS[reasons[i]]}]\n", flush=True)


def printing(decoder: StreamDecoder, tokens: list[int], interrupts: list[int],
             ) -> Callable[[int, list[int]], None]:
    """What `generate` calls: notes the new tokens, prints their text, and raises KeyboardInterrupt
    once there was an interrupt."""
    def show(row: int, new: list[int]) -> None:
        tokens.extend(new)
        print(decoder.feed([token for token in new if token != EOT_TOKEN]), end="", flush=True)
        if interrupts:
            raise KeyboardInterrupt
    return show


def main() -> None:
    config = parse_config(InferenceConfig, description=__doc__)
    choice = check_config(config)
    prompts = [] if config.chat else read_prompts(config)
    device = pick_device(config.device)
    folder = find_checkpoint(config.checkpoint)
    use_template = not config.raw and read_prompt_template(folder) is not None
    model = load_model(folder, device)
    check_vocabulary(model, config.checkpoint)
    prepare_to_sample(model, pick_dtype(config.dtype, device))
    if config.chat:
        from chat import chat

        chat(model, choice, config.max_steps, config.seed, use_template)
    else:
        texts = [format_prompt(prompt) for prompt in prompts] if use_template else prompts
        respond(model, config, choice, prompts, texts)


if __name__ == "__main__":
    run_main(main)
