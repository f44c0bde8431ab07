"""Chooses the next token of every row from its logits, with a random stream of the row's own.

A token is drawn as the winner of an exponential race: the largest of w_i / E_i, where w_i is the
weight of token i (its probability, unscaled) and E_i exponential noise, has the distribution of the
weights (the Gumbel-max trick without its logarithm; Maddison et al. 2014, "A* Sampling", 2.1).
Unlike the inversion of a distribution function, in which every token's border moves with the
rounding of all those before it, a race changes its winner only where the first two are equal to
rounding: a row draws the same tokens alone and in any batch, whose products round differently.

The noise is a function of (key of the row, number of the draw, token), computed on the device where
it is used, without a state: a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), from SplitMix64 (Steele et al. 2014), which turns key and draw into
two words, and MurmurHash3's finalizer, which mixes each of them with the token.
"""

import hashlib
import numbers
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minigpt2.config import UserError
from minigpt2.tokenizer import N_VOCAB

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
SPLITMIX_1, SPLITMIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # 0xBF58..., 0x94D0...
MURMUR_1, MURMUR_2 = -0x7A143595, -0x3D4D51CB  # 0x85EBCA6B and 0xC2B2AE35, as int32
GOLDEN_32 = -0x61C8864F  # 0x9E3779B1, as int32
SEEDS = 2**64


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen. 1 / 0 / 1 / 1 is the model's own distribution.

    temperature: 0 takes the likeliest token. top_k: only the k likeliest, 0 all of them (as does a
    k above the vocabulary). top_p: only the likeliest that together have probability p, at least
    one (Holtzman et al. 2019). repetition_penalty: divides the positive and multiplies the negative
    logits of tokens that the row already has (Keskar et al. 2019). Applied in the order penalty,
    temperature, k, p, as Hugging Face does; equal logits are kept or dropped together.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        for name, is_good, expected in (
                ("temperature", lambda x: x >= 0, "0 (the likeliest token) or above"),
                ("top_k", lambda x: x >= 0 and isinstance(x, numbers.Integral),
                 "a whole number, 0 (all tokens) or above"),
                ("top_p", lambda x: 0 <= x <= 1, "0 (the likeliest token) to 1 (all)"),
                ("repetition_penalty", lambda x: x > 0, "1 (none) or another number above 0")):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not (is_good(value) and value < float("inf")):
                raise UserError(f"{name} is {value!r:.60}, expected {expected}, and finite")


def choose(logits: torch.Tensor, choice: SamplingParams, keys: torch.Tensor, draw: torch.Tensor,
           seen: torch.Tensor | None = None) -> torch.Tensor:
    """One token a row (B,) from logits (B, V). `keys` (B,) int64 name the rows' streams, `draw`
    (B,) int64 says which draw of its stream is a row's next. `seen` (B, V') marks the tokens that
    are penalized. Ids that the tokenizer does not have (a padded vocabulary) are never chosen."""
    logits = logits[:, :N_VOCAB].float()  # (B, V')
    if seen is not None:
        penalized = torch.where(logits > 0, logits / choice.repetition_penalty,
                                logits * choice.repetition_penalty)
        largest = torch.finfo(torch.float32).max
        logits = torch.where(seen, penalized.clamp(-largest, largest), logits)
    if choice.temperature == 0:
        return logits.argmax(-1)
    weights = weights_of(keep_top_k(logits, choice.top_k), choice.temperature)
    weights = keep_top_p(weights, choice.top_p)
    return (weights / exponential_noise(keys, draw, weights.size(1))).argmax(-1)


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The logits (B, V), -inf for all but the k largest of a row and what equals the last of
    them."""
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return logits


def weights_of(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The probabilities (B, V) of logits (B, V), scaled so that the largest is 1: no temperature,
    however small, overflows."""
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # a smaller one would be 0
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()


def keep_top_p(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The weights (B, V), 0 for the least of a row that have at most 1 - p of their sum
    together."""
    if top_p < 1:
        ascending = sort_rows(weights)  # (B, V)
        below = ascending.cumsum(-1)
        dropped = (below <= (1 - top_p) * below[:, -1:]).sum(-1, keepdim=True)  # (B, 1)
        dropped = dropped.clamp(max=weights.size(-1) - 1)  # never all
        weights = weights * (weights >= ascending.gather(-1, dropped))
    return weights


def sort_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of x (B, V) in ascending order. On a CPU by NumPy, 15 times as fast as PyTorch."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values


def row_seeds(prompts: Sequence[Hashable], seed: int | Sequence[int]) -> list[int]:
    """The seed of every row: its own where there is one for each; else `seed`, plus the number of
    times that the row's prompt came before. Raises UserError."""
    if isinstance(seed, list | tuple):
        seeds = list(seed)
    else:
        seeds, before = [seed] * len(prompts), Counter()
        for i, prompt in enumerate(prompts if isinstance(seed, numbers.Integral) else ()):
            seeds[i] += before[prompt]
            before[prompt] += 1
    if len(seeds) != len(prompts) or not all(
            isinstance(one, numbers.Integral) and 0 <= one < SEEDS for one in seeds):
        shown = " ".join(repr(seed)[:60].split())
        raise UserError(f"seed is {shown}, expected a whole number of at least 0 and below 2^64, "
                        "or a list with one for every row")
    return list(map(int, seeds))


def stream_keys(prompts: Sequence[tuple[int, ...]], seeds: Sequence[int]) -> torch.Tensor:
    """Names of the rows' random streams (B,) int64: 64 bits of a hash of prompt and seed."""
    digests = [hashlib.sha256(repr((seed, prompt)).encode()).digest()
               for prompt, seed in zip(prompts, seeds, strict=True)]
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True) for digest in digests])


def exponential_noise(keys: torch.Tensor, draw: torch.Tensor, size: int) -> torch.Tensor:
    """Noise (B, size) float32, exponentially distributed with mean 1: a function of keys (B,) and
    draw (B,), both int64, and of the column."""
    words = splitmix64(keys, draw).view(torch.int32).view(-1, 2)  # (B, 2)
    x = torch.arange(size, device=keys.device, dtype=torch.int32) * GOLDEN_32  # (size,)
    x = murmur_finalizer(x ^ words[:, :1])  # (B, size)
    x = murmur_finalizer(x ^ words[:, 1:])
    uniform = (x & 0x7FFFFFFF).float().mul_(2**-31)  # in [0, 1], fine towards 0
    # neither 0, with which any token would win, nor 1, with which none could
    return uniform.clamp_(2**-32, 1 - 2**-24).neg_().log1p_().neg_()


def murmur_finalizer(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby) of every int32 of x."""
    x = shift_xor(x, 16).mul_(MURMUR_1)
    x = shift_xor(x, 13).mul_(MURMUR_2)
    return shift_xor(x, 16)


def splitmix64(seed: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The output number `draw`, from 0 on, of SplitMix64 started with `seed`; all (B,) int64."""
    z = seed + (draw + 1) * GOLDEN  # sums and products wrap
    z = shift_xor(z, 30) * SPLITMIX_1
    z = shift_xor(z, 27) * SPLITMIX_2
    return shift_xor(z, 31)


def shift_xor(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z ^ (z >> bits) of integers as if they were unsigned."""
    kept = 2 ** (8 * z.element_size() - bits) - 1
    return (z >> bits).bitwise_and_(kept).bitwise_xor_(z)
