"""Batched sampling: a base model continues prompts, a fine-tuned model answers them.

    python inference.py --checkpoint out/finetune "What is a list?" "Name three colors."
    python inference.py --checkpoint gpt2 --max-tokens 50 --json < prompts.txt

The prompt template of a fine-tuned checkpoint is applied unless --raw is given. An empty prompt
samples a text from <|endoftext|> alone. In float32, a response depends only on its prompt and seed.
docs/formats.md describes the output of --json.
"""

if __name__ == "__main__":
    from minigpt2.config import share_cores
    share_cores()  # before PyTorch is imported

import contextlib
import json
import numbers
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader import PAD_TOKEN, checked_batch, pad_rows
from minigpt2 import distributed
from minigpt2.checkpoint import find_checkpoint, load_model, read_prompt_template
from minigpt2.config import UserError, flag, parse_config, run_main
from minigpt2.distributed import Launch, SamplingDtype, share_rows
from minigpt2.kernels import capture_graph, prepare_to_sample
from minigpt2.loss import IGNORE_INDEX, linear_cross_entropy
from minigpt2.metrics import RunLog
from minigpt2.sampling import Response, SamplingParams, row_seeds, sample, seen_tokens, stream_keys
from minigpt2.tokenizer import EOT_TOKEN, N_VOCAB, decode, encode, format_prompt
from model import GPT, GPTConfig

# On a GPU: steps between two host syncs; rows are padded to a multiple of PAD_GPU tokens; attention
# reads a multiple of SPAN_GPU cache slots, with one CUDA graph per multiple; below MIN_GRAPH_STEPS,
# graphs do not pay off
STEPS_PER_SYNC_GPU, PAD_GPU, SPAN_GPU, MIN_GRAPH_STEPS = 16, 64, 128, 64


def tokenize_batch_input(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Encodes prompts into right-padded input_ids and attention_masks, both (B, T) int64. An empty
    prompt is <|endoftext|>; in a prompt, that is plain text. Raises UserError for an empty list."""
    if isinstance(prompts, str):
        raise UserError("prompts is a single string, expected a list of strings")
    if not prompts:
        raise UserError("no prompt given: an empty one, \"\", samples from <|endoftext|>")
    return pad_rows([encode(prompt) or [EOT_TOKEN] for prompt in prompts])


def generated_rows(output_ids: Tensor, output_masks: Tensor, prompt_masks: Tensor | None = None,
                   ) -> list[list[int]]:
    """The ids of each row of `generate`'s output; given prompt_masks, only the new ones."""
    ends = output_masks.sum(1).tolist()
    starts = [0] * len(ends) if prompt_masks is None else prompt_masks.sum(1).tolist()
    return [row[i:j] for row, i, j in zip(output_ids.tolist(), starts, ends, strict=True)]


def decode_generation(output_ids: Tensor, output_masks: Tensor,
                      prompt_masks: Tensor | None = None) -> list[str]:
    """The text of each row, or its new part given prompt_masks, without <|endoftext|>."""
    return [decode([token for token in row if token != EOT_TOKEN])
            for row in generated_rows(output_ids, output_masks, prompt_masks)]


def load_gpt2(checkpoint: str | Path, device: torch.device, dropout: float = 0.0) -> GPT:
    """The model of a checkpoint, see `load_model`. Raises UserError if it lacks ids of GPT-2."""
    model = load_model(checkpoint, device, dropout=dropout)
    if model.config.vocab_size < N_VOCAB:  # more ids are allowed, but never sampled
        raise UserError(f"{checkpoint} has {model.config.vocab_size} ids, GPT-2's encoding has "
                        f"{N_VOCAB}: it was trained with another tokenizer")
    return model


def check_room(lengths: Sequence[int], max_steps: int, block_size: int) -> None:
    """Raises UserError for an invalid max_steps, or a prompt that leaves no room for a token."""
    if not isinstance(max_steps, numbers.Integral) or max_steps < 0:
        raise UserError(f"max_steps is {max_steps!r:.60}, expected an integer of at least 0")
    if (longest := max(lengths)) + min(max_steps, 1) > block_size:
        raise UserError(f"prompt {lengths.index(longest) + 1} of {len(lengths)} has {longest} "
                        f"tokens; the context is {block_size}, response included: shorten it")


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


class KVCache:
    """Keys and values of every layer: slot t of row b holds token t of row b. In a shorter row,
    slots with padding are masked until new tokens overwrite them. Attention reads `span` slots."""

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, device, dtype):
        # Contiguous keys per head, which a CPU reads 1.5 times as fast, and rows and heads that
        # merge into one dimension, which its products need not copy: (n_layer, 2, B, H, S, D)
        self.kv = torch.zeros(config.n_layer, 2, batch_size, config.n_head, max_length,
                              config.head_dim, device=device, dtype=dtype)
        heads = torch.arange(2 * batch_size * config.n_head, device=device).view(2, batch_size, -1)
        self.first = heads.transpose(0, 1) * max_length  # (B, 2, H), see `locate`
        self.slots = torch.arange(max_length, device=device)  # (S,)
        self.span = max_length

    def locate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For one new token per row at `positions` (B, 1): where each head stores it, as indices
        (B, 2, H) into a layer as (2 * B * H * S, D), and the mask (B, 1, 1, span) of 0 and -inf."""
        beyond = self.slots[: self.span] > positions  # (B, span)
        mask = self.kv.new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)
        return self.first + positions[:, :, None], mask[:, None, None, :]

    def write(self, layer: int, kv: Tensor, slots: Tensor | None) -> None:
        """Stores kv (B', T, 2, H, D) from slot 0 on, or one token per row at `slots` (B, 2, H)."""
        stored = self.kv[layer]  # (2, B, H, S, D)
        if slots is None:
            stored[:, : len(kv), :, : kv.size(1)] = kv.permute(2, 0, 3, 1, 4)
        else:  # a single kernel
            stored.view(-1, stored.size(-1))[slots] = kv[:, 0].to(stored.dtype)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, both (B, H, span, D)."""
        return self.kv[layer, :, : len(self.first), :, : self.span].unbind()

    def select_rows(self, rows: Tensor, length: int) -> None:
        """Row i gets the first `length` slots of row rows[i]. Only len(rows) rows remain."""
        for stored in self.kv[:, :, :, :, :length]:  # layer by layer: few bytes are held twice
            stored[:, : len(rows)] = stored[:, rows]
        self.first = self.first[: len(rows)]


def hidden_states(model: GPT, ids: Tensor, cache: KVCache | None = None) -> Tensor:
    """The hidden states (B, T, C) of right-padded rows (B, T). A GPU plans for, and caches memory
    of, every shape: there, T is padded, so that rows of all lengths have few shapes."""
    T, longest = ids.size(1), model.config.block_size
    padding = min(-T % PAD_GPU, max(longest - T, 0)) if on_gpu(ids.device) else 0
    return model.hidden_states(F.pad(ids, (0, padding), value=PAD_TOKEN), cache)[:, :T]


def prefill(model: GPT, prompts: Sequence[tuple[int, ...]], cache: KVCache) -> Tensor:
    """Fills the cache with B prompts, copies only once; returns the next logits (B, V)."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids, masks = (x.to(cache.kv.device) for x in pad_rows(list(places)))  # (B', T)
    x = hidden_states(model, ids, cache)  # (B', T, C)
    logits = model.lm_head(x[torch.arange(len(x), device=x.device), masks.sum(1) - 1])  # (B', V)
    if len(places) == len(prompts):
        return logits
    rows = torch.tensor([places[prompt] for prompt in prompts], device=x.device)  # (B,)
    cache.select_rows(rows, ids.size(1))
    return logits[rows]


class DecodingBatch:
    """The unfinished rows of one `generate` call. `step` works in place, for CUDA graphs of it."""

    def __init__(self, model: GPT, params: SamplingParams, prompts: Sequence[tuple[int, ...]],
                 output_ids: Tensor, max_steps: int, keys: Tensor):
        device, config = output_ids.device, model.config
        self.model, self.params, self.output_ids, self.graph = model, params, output_ids, None
        self.on_gpu = on_gpu(device)
        self.use_graphs = self.on_gpu and max_steps >= MIN_GRAPH_STEPS
        self.span_multiple = SPAN_GPU if self.on_gpu else 1
        self.counter = torch.zeros((), dtype=torch.int64, device=device)  # tokens sampled per row
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # all logits so far
        # (B,), one entry per row that was not dropped; its index in output_ids:
        self.row = torch.arange(len(prompts), device=device)
        self.lengths, self.keys = torch.tensor(list(map(len, prompts)), device=device), keys
        self.max_lengths = (self.lengths + max_steps).clamp(max=config.block_size)
        self.finished = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.all_lengths = self.lengths.clone()  # at the last sync, also of rows dropped since
        self.longest = max(map(len, prompts))  # an upper bound of lengths, known to the host
        self.seen = None if params.repetition_penalty == 1 else seen_tokens(
            output_ids, self.lengths, config.vocab_size)  # (B, V)
        # on a CPU, attention is faster and more exact in float32 than in bfloat16
        dtype = torch.float32 if device.type == "cpu" else model.transformer.wte.weight.dtype
        slots = output_ids.size(1) + -output_ids.size(1) % self.span_multiple
        self.cache = KVCache(config, len(prompts), slots, device, dtype)
        self.cache.span = 0  # set by the first step
        self.logits = prefill(model, prompts, self.cache)  # (B, V)
        self.sample_next()

    def sample_next(self) -> None:
        """Samples the next token of each row from `logits` and appends it, unless finished."""
        self.finite &= self.logits.isfinite().all()
        token = sample(self.logits, self.params, self.keys, self.counter, self.seen)  # (B,)
        self.counter += 1
        if self.seen is not None:
            self.seen.scatter_(1, token[:, None], True)
        self.output_ids[self.row, self.lengths] = token  # finished rows: into padding
        self.lengths += ~self.finished
        self.finished |= (token == EOT_TOKEN) | (self.lengths >= self.max_lengths)

    def step(self) -> None:
        """Feeds each row its last token and samples the next."""
        last = self.lengths - 1  # (B,)
        tokens = self.output_ids[self.row, last]  # (B,)
        x = self.model.hidden_states(tokens[:, None], self.cache, last[:, None])  # (B, 1, C)
        self.logits.copy_(self.model.lm_head(x[:, 0]))
        self.sample_next()

    def decode_several(self) -> None:
        """Runs all steps up to the next sync: as CUDA graphs on a GPU, if they pay off."""
        for _ in range(STEPS_PER_SYNC_GPU if self.on_gpu else 1):
            span = self.longest + -self.longest % self.span_multiple
            if span != self.cache.span:
                self.cache.span, self.graph = span, None
                self.step()  # warm-up before a capture
            elif self.use_graphs:
                self.graph = self.graph or capture_graph(self.step, self.row.device)
                self.graph.replay()
            else:
                self.step()
            self.longest = min(self.longest + 1, self.output_ids.size(1) - 1)

    def sync(self, on_tokens: Callable[[int, list[int]], None] | None) -> bool:
        """Reports new tokens, drops finished rows once they are half of the batch; returns whether
        unfinished rows remain. The only place where the host waits for a GPU."""
        if not self.finite:
            raise UserError("logits are not finite: use an earlier checkpoint, or dtype float32")
        if on_tokens is not None:
            old, new = self.all_lengths[self.row].tolist(), self.lengths.tolist()
            for row, i, j in zip(self.row.tolist(), old, new, strict=True):
                if i < j:
                    on_tokens(row, self.output_ids[row, i:j].tolist())
        self.all_lengths[self.row] = self.lengths
        unfinished = (~self.finished).nonzero()[:, 0]  # (B',)
        if 0 < 2 * len(unfinished) <= len(self.row):
            self.keep_rows(unfinished)
        self.longest = int(self.lengths.max())
        return len(unfinished) > 0

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all but the given rows, in ascending order."""
        self.cache.select_rows(rows, self.longest)
        self.cache.span, self.graph = 0, None  # both set by the next steps
        for name in ("row", "lengths", "max_lengths", "keys", "finished", "logits", "seen"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[rows])


@torch.no_grad()
def generate(model: GPT, input_ids: Tensor, attention_masks: Tensor, temperature: float,
             max_steps: int, *, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0,
             seed: int | Sequence[int] = 0,
             on_tokens: Callable[[int, list[int]], None] | None = None) -> tuple[Tensor, Tensor]:
    """Continues right-padded prompts (B, T) until each row has sampled <|endoftext|>, has max_steps
    new tokens, or fills the context. Returns (output_ids, output_masks), both (B, T') int64 on the
    model's device and right-padded: prompt and new tokens, <|endoftext|> included.

    The settings are those of `SamplingParams`. The random stream of a row depends only on its
    prompt and seed: in float32 its tokens are batch-invariant, except for ties within rounding.
    `seed` is one per row, or one for all: repetition n of a prompt then uses seed + n.
    on_tokens(row, ids) is called with new tokens; an exception ends generation. Raises UserError
    for an invalid batch or setting, a prompt without room for a token, and non-finite logits."""
    params = SamplingParams(temperature, top_k, top_p, repetition_penalty)
    ids, masks = checked_batch(model, input_ids, attention_masks)  # (B, T)
    device, block_size = ids.device, model.config.block_size
    prompts = list(map(tuple, generated_rows(ids, masks)))
    check_room(list(map(len, prompts)), max_steps, block_size)
    keys = stream_keys(prompts, row_seeds(prompts, seed)).to(device)  # (B,)
    max_steps = min(max_steps, block_size)
    if max_steps == 0:
        return ids, masks
    # one column more, into which finished rows write
    output_ids = F.pad(ids, (0, min(max_steps, block_size - ids.size(1)) + 1))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.cuda.device(device if device.type == "cuda" else -1))
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("default")  # training may run with --deterministic
        batch = DecodingBatch(model, params, prompts, output_ids, max_steps, keys)
        while batch.sync(on_tokens):
            batch.decode_several()
    T = int(batch.all_lengths.max())
    masks = torch.arange(T, device=device) < batch.all_lengths[:, None]  # (B, T')
    return output_ids[:, :T].where(masks, PAD_TOKEN), masks.long()


def respond(model: GPT, prompts: Sequence[Sequence[int]], max_steps: int,
            **options) -> list[Response]:
    """The responses to one batch of prompts, given as ids; the options are those of `generate`."""
    ids, masks = pad_rows(prompts)
    output = generate(model, ids, masks, max_steps=max_steps, **options)
    return [Response(list(prompt), tokens, "stop" if tokens[-1:] == [EOT_TOKEN] else
                     "length" if len(tokens) >= max_steps else "context")
            for prompt, tokens in zip(prompts, generated_rows(*output, masks), strict=True)]


def sample_responses(model: GPT, prompts: Sequence[Sequence[int]], seeds: Sequence[int],
                     max_steps: int, launch: Launch, *, temperature: float = 1.0,
                     **options) -> list[Response] | None:
    """A response to each prompt, in order, on every rank; for the options see `share_rows`."""
    def work(batch: list[tuple[Sequence[int], int]]) -> list[Response]:
        prompts, seeds = zip(*batch, strict=True)
        return respond(model, prompts, max_steps, temperature=temperature, seed=seeds)

    return share_rows(list(zip(prompts, seeds, strict=True)), work, launch,
                      size_of=lambda row: (len(row[0]), row[0]), **options)


def check_sample_prompt(prompt: list[int], config, block_size: int) -> None:
    """Raises UserError if a run is to sample and its context has no room, before it starts."""
    if config.sample_tokens and (size := len(prompt) or 1) >= block_size:  # "" is <|endoftext|>
        raise UserError(f"--sample-prompt has {size} tokens; the context is {block_size}, "
                        "response included: shorten it, or use --sample-tokens 0")


def write_sample(model: GPT, prompt: list[int], run) -> str:
    """Continues a prompt, given as ids, in OUT_DIR/samples.jsonl of a Run, and returns the text."""
    [sample] = respond(model, [prompt or [EOT_TOKEN]], run.config.sample_tokens, temperature=1.0,
                       seed=run.config.seed + run.step)
    text = decode(sample.prompt + sample.tokens)
    log = RunLog(run.out_dir / "samples.jsonl", fresh=run.step == 0)
    log.write(run.step, "sample", text=text)
    log.close()
    return "  " + text.replace("\n", "\n  ")


def logprobs(model: GPT, input_ids: Tensor, attention_masks: Tensor) -> Tensor:
    """The log-probability, in nats, of each token given those before it, as `generate` samples at
    temperature 1: (B, T - 1) float32 for input_ids (B, T), 0 for padding. Differentiable; holds few
    rows of logits at a time. Raises UserError for an invalid batch, ValueError past block_size."""
    ids, masks = checked_batch(model, input_ids, attention_masks)  # (B, T')
    x = hidden_states(model, ids)[:, :-1].flatten(0, 1).float()  # (B * (T' - 1), C)
    targets = ids.where(masks.bool(), IGNORE_INDEX)[:, 1:]  # (B, T' - 1)
    # wte is the tied head, of which a model prepared for sampling has packed a copy
    int8 = model.lm_head.weight.dtype == torch.int8
    head = model.lm_head if int8 else model.transformer.wte.weight[:N_VOCAB]  # (V', C)
    losses = linear_cross_entropy(x, head, targets.flatten(), reduction="none")
    return F.pad(-losses.view(targets.shape), (0, input_ids.size(1) - ids.size(1)))  # (B, T - 1)


@dataclass(frozen=True)
class SamplingConfig:
    """The options that inference.py and chat.py share."""
    checkpoint: str = flag("gpt2", "folder, OUT_DIR of a run, or hub name", is_path=True)
    raw: bool = flag(False, "do not apply the prompt template of a fine-tuned checkpoint")
    temperature: float = flag(0.8, "sampling temperature; 0: greedy", minimum=0)
    top_k: int = flag(0, "keep the k most likely tokens; 0: all", minimum=0)
    top_p: float = flag(1.0, "keep the most likely tokens with total probability p", minimum=0)
    repetition_penalty: float = flag(1.0, "above 1: tokens already in the text are less likely")
    max_tokens: int = flag(128, "longest response, in tokens", minimum=1, old="max_steps")
    seed: int = flag(0, "seed of the samples", minimum=0, below=2**63)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: SamplingDtype = flag("auto", "dtype of the weights; int8: fastest on a CPU; auto: "
                                "bfloat16 (or float16) on CUDA, else float32")

    def load(self) -> tuple[GPT, SamplingParams, str | None]:
        """The model prepared for sampling, how to sample, and the prompt template, if any."""
        params = SamplingParams(self.temperature, self.top_k, self.top_p, self.repetition_penalty)
        if sys.stdout is None:
            raise UserError("standard output is closed, expected a terminal, pipe or file")
        device, folder = distributed.pick_device(self.device), find_checkpoint(self.checkpoint)
        model = load_gpt2(folder, device)
        prepare_to_sample(model, distributed.pick_dtype(self.dtype, device))
        return model, params, None if self.raw else read_prompt_template(folder)


@dataclass(frozen=True)
class InferenceConfig(SamplingConfig):
    prompts: tuple[str, ...] = flag((), "prompts (default: the lines of stdin)", positional=True)
    json: bool = flag(False, "print JSON lines, with tokens and their log-probabilities")
    batch_size: int = flag(8, "prompts per batch", minimum=1)
    input: str = flag("", "text that the prompts are about (Alpaca's input)", may_be_empty=True)


def read_prompts(config: InferenceConfig) -> list[str]:
    """The prompts, from arguments or else standard input. Raises UserError if it is not UTF-8."""
    if config.prompts:  # in sys.argv, surrogate escapes are bytes that are not UTF-8
        return [p.encode(errors="surrogateescape").decode(errors="replace") for p in config.prompts]
    if sys.stdin is not None and sys.stdin.isatty():
        print("one prompt per line, then Ctrl-D:", file=sys.stderr)
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is not UTF-8: {error}") from None
    return text.split("\n") if text else []  # `str.splitlines` would also split at U+2028


def print_responses(model: GPT, config: InferenceConfig, params: SamplingParams,
                    prompts: list[str], rows: list[list[int]], seeds: list[int]) -> None:
    """Generates and prints the responses to one batch of prompts, given as text and as ids."""
    responses = respond(model, rows, config.max_tokens, seed=seeds, **asdict(params))
    if config.json:
        scores = logprobs(model, *pad_rows([one.prompt + one.tokens for one in responses])).tolist()
    for i, (prompt, one) in enumerate(zip(prompts, responses, strict=True)):
        n, text = len(one.prompt), decode(one.tokens[: -1 if one.stopped else None])
        if config.json:
            tokens, logs = one.tokens, scores[i][n - 1 : n - 1 + len(one.tokens)]
            print(json.dumps({"prompt": prompt, "response": text, "prompt_tokens": n, "tokens":
                              tokens, "logprobs": logs, "finish_reason": one.finish_reason}))
            continue
        blank = "" if text.strip() else "blank, "
        end = {"stop": "<|endoftext|>", "length": "--max-tokens", "context": "a full context"}
        print(f"prompt:   {prompt}\nresponse: {text}\n          [{blank}{len(one.tokens)} tokens, "
              f"ended by {end[one.finish_reason]}]\n")


def main() -> None:
    config = parse_config(InferenceConfig, description=__doc__)
    prompts = read_prompts(config)
    tokenize_batch_input(prompts[:1])  # refuses an empty list at once
    model, params, template = config.load()
    if config.input and not template:
        raise UserError("--input: no template is applied here; write the input into the prompt")
    if config.input and not all(map(str.strip, prompts)):
        raise UserError("--input: a prompt is blank, to which no template is applied: leave it out")
    rows = [encode(format_prompt(p, config.input, template) if template else p) if p.strip() else
            [EOT_TOKEN] for p in prompts]
    seeds = row_seeds(list(map(tuple, rows)), config.seed)
    check_room(list(map(len, rows)), config.max_tokens, model.config.block_size)
    for i in range(0, len(rows), config.batch_size):
        part = slice(i, i + config.batch_size)
        print_responses(model, config, params, prompts[part], rows[part], seeds[part])


if __name__ == "__main__":
    run_main(main)
