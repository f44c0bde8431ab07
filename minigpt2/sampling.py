"""Batch-invariant sampling (docs/sampling.md): the Gumbel-max trick in exponential form (Maddison
et al. 2014, section 2.1), with counter-based noise for each row and token (Salmon et al. 2011)."""

import hashlib
import numbers
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from minigpt2.config import UserError
from minigpt2.tokenizer import N_VOCAB

# Shifts and factors for `mix`: of SplitMix64, and of MurmurHash3's finalizer (Appleby)
SPLITMIX64 = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None))
FMIX32 = ((16, -0x7A143595), (13, -0x3D4D51CB), (16, None))


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled, in the order of Hugging Face. Ties are kept or dropped together."""

    temperature: float  # 0: the most likely token
    top_k: int = 0  # keeps the k most likely tokens; 0, or more than the vocabulary: all
    top_p: float = 1.0  # keeps the most likely tokens with total probability p (Holtzman 2019)
    repetition_penalty: float = 1.0  # divides logits > 0 of tokens in the row, multiplies others

    def __post_init__(self):
        for name, kind, is_valid, expected in (
                ("temperature", numbers.Real, lambda x: x >= 0, "a finite number of at least 0"),
                ("top_k", numbers.Integral, lambda x: x >= 0, "an integer of at least 0"),
                ("top_p", numbers.Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
                ("repetition_penalty", numbers.Real, lambda x: x > 0, "a finite number above 0")):
            value = getattr(self, name)
            if not (isinstance(value, kind) and is_valid(value) and value < float("inf")):
                raise UserError(f"{name} is {value!r:.60}, expected {expected}")


@dataclass(frozen=True)
class Response:
    """A sampled response, ended by "stop" (<|endoftext|>), "length" or a full "context"."""

    prompt: list[int]
    tokens: list[int]
    finish_reason: str

    @property
    def stopped(self) -> bool:
        return self.finish_reason == "stop"


def sample(logits: torch.Tensor, params: SamplingParams, keys: torch.Tensor, counter: torch.Tensor,
           seen: torch.Tensor | None = None) -> torch.Tensor:
    """Samples one token per row: logits (B, V) -> (B,) int64. keys (B,) int64 identify the rows'
    random streams; counter (B,) or () int64 is the position in each stream. seen (B, V') bool marks
    the tokens to penalize. Ids beyond the tokenizer's (a padded vocabulary) are never sampled."""
    logits = logits[:, :N_VOCAB].float()  # (B, V')
    if seen is not None:
        penalized = torch.where(logits > 0, logits / params.repetition_penalty,
                                logits * params.repetition_penalty)
        largest = torch.finfo(torch.float32).max
        logits = torch.where(seen, penalized.clamp(-largest, largest), logits)
    if params.temperature == 0:
        return logits.argmax(-1)
    weights = token_weights(logits, params)  # (B, V')
    token_ids = torch.arange(weights.size(1), device=logits.device, dtype=torch.int32)  # (V',)
    return (weights / exponential_noise(keys, counter, token_ids)).argmax(-1)


def seen_tokens(ids: torch.Tensor, lengths: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Marks the tokens of each row of ids (B, T), padding excluded: (B, V') bool for `sample`."""
    seen = torch.zeros(len(ids), min(vocab_size, N_VOCAB), dtype=torch.bool, device=ids.device)
    is_padding = torch.arange(ids.size(1), device=ids.device) >= lengths[:, None]  # (B, T)
    return seen.scatter_(1, ids.where(~is_padding, ids[:, :1]), True)  # instead: the first token


def token_weights(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities (B, V) of logits (B, V), scaled to a maximum of 1, 0 for those left out."""
    if 0 < params.top_k < logits.size(-1):
        smallest = logits.topk(params.top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    temperature = max(params.temperature, torch.finfo(torch.float32).tiny)  # else rounded to 0
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()
    if params.top_p < 1:  # on a CPU, NumPy sorts 15 times as fast as PyTorch
        ascending = (torch.from_numpy(np.sort(weights.numpy(), axis=-1))  # (B, V)
                     if weights.device.type == "cpu" else weights.sort(-1).values)
        cumulative = ascending.cumsum(-1)
        dropped = (cumulative <= (1 - params.top_p) * cumulative[:, -1:]).sum(-1, keepdim=True)
        dropped = dropped.clamp(max=weights.size(-1) - 1)  # (B, 1): keep at least one token
        weights = weights * (weights >= ascending.gather(-1, dropped))
    return weights


def row_seeds(prompts: Sequence[Hashable], seed: int | Sequence[int]) -> list[int]:
    """One seed per row; from one, a prompt's n-th repetition gets seed + n. Raises UserError."""
    one_per_row = isinstance(seed, list | tuple | range)
    seeds = list(seed) if one_per_row else [seed] * len(prompts)
    if len(seeds) != len(prompts) or not all(
            isinstance(one, numbers.Integral) and 0 <= one < 2**64 for one in seeds):
        raise UserError(f"seed is {seed!r:.60}, expected 0 to 2**64 - 1, or a list of one per row")
    repetitions = defaultdict(count)  # prompt -> 0, 1, ...
    return [int(one) + (0 if one_per_row else next(repetitions[prompt]))
            for one, prompt in zip(seeds, prompts, strict=True)]


def stream_keys(prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> torch.Tensor:
    """The keys (B,) int64 of the rows' random streams: 64 bits of a hash of prompt and seed."""
    digests = [hashlib.sha256(repr((seed, prompt)).encode()).digest()
               for prompt, seed in zip(prompts, seeds, strict=True)]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def exponential_noise(keys: torch.Tensor, counter: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise of mean 1 (B, V) float32 of keys (B,), counter (B,) or (), and token ids (V,)."""
    words = splitmix64(keys, counter).view(torch.int32).view(-1, 2)  # (B, 2)
    # the factor is 2654435761, a prime near 2**32 / golden ratio (Knuth), as int32
    x = mix((ids * -0x61C8864F) ^ words[:, :1], FMIX32)  # (B, V)
    x = mix(x ^ words[:, 1:], FMIX32)
    uniform = (x & 0x7FFFFFFF).float().mul_(2**-31)  # in [0, 1], with full precision near 0
    # exclude 0, with which any token would be sampled, and 1, with which none could be
    return uniform.clamp_(2**-32, 1 - 2**-24).neg_().log1p_().neg_()


def splitmix64(seed: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Output number `counter` (from 0) of SplitMix64 (Steele et al. 2014), element-wise, int64."""
    # the factor is 2**64 / golden ratio, as int64; integers wrap around
    return mix(seed + (counter + 1) * -0x61C8864680B583EB, SPLITMIX64)


def mix(x: torch.Tensor, rounds: tuple[tuple[int, int | None], ...]) -> torch.Tensor:
    """x ^ (x >> shift), with x as unsigned, times a factor, round by round; element-wise."""
    for shift, factor in rounds:
        mask = 2 ** (8 * x.element_size() - shift) - 1
        x = (x >> shift).bitwise_and_(mask).bitwise_xor_(x)
        if factor is not None:
            x.mul_(factor)
    return x
