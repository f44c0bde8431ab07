"""Chooses the next token of every row from its logits, with a random stream of the row's own.

A token is drawn as the winner of an exponential race: the largest of w_i / E_i, where w_i is the
weight of token i (its probability, unscaled) and E_i exponential noise, has the distribution of the
weights (the Gumbel-max trick without its logarithm; Maddison et al. 2014, "A* Sampling", 2.1).
Unlike the inversion of a distribution function, in which every token's border moves with the
rounding of all those before it, a race changes its winner only where the first two are equal to
rounding: a row draws the same tokens alone and in any batch, whose products round differently.

The noise is a function of (key of the row, number of the draw, token), computed on the device where
it is used, without a state: a counter-based generator (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), from SplitMix64 (Steele et al. 2014) and MurmurHash3's finalizer.
"""

from dataclasses import dataclass

import numpy as np
import torch

from config import UserError
from tokenizer import N_VOCAB

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
SPLITMIX_1, SPLITMIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # 0xBF58..., 0x94D0...
MURMUR_1, MURMUR_2 = -0x7A143595, -0x3D4D51CB  # 0x85EBCA6B and 0xC2B2AE35, as int32
GOLDEN_32 = -0x61C8864F  # 0x9E3779B1, as int32


@dataclass(frozen=True)
class Choice:
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
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, expected 0 (the likeliest token) "
                            "or above")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, expected 0 (all tokens) or above")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected 0 (the likeliest token) to 1 (all)")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty is {self.repetition_penalty}, expected 1 (none) "
                            "or another number above 0")


def choose(logits: torch.Tensor, choice: Choice, keys: torch.Tensor, draw: torch.Tensor,
           seen: torch.Tensor | None = None) -> torch.Tensor:
    """One token a row (B,) from logits (B, V). `keys` (B,) int64 name the rows' streams, `draw`
    (B,) int64 says which draw of its stream is a row's next. `seen` (B, V') marks the tokens that
    are penalised. Ids that the tokenizer does not have (a padded vocabulary) are never chosen."""
    logits = logits[:, :N_VOCAB].float()  # (B, V')
    if seen is not None:
        penalised = torch.where(logits > 0, logits / choice.repetition_penalty,
                                logits * choice.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if choice.temperature == 0:
        return logits.argmax(-1)
    weights = keep_likely(weights_of(logits, choice.temperature), choice.top_k, choice.top_p)
    return (weights / exponential_noise(keys, draw, weights.size(1))).argmax(-1)


def weights_of(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The probabilities (B, V) of logits (B, V), scaled so that the largest is 1: no temperature,
    however small, overflows."""
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # a smaller one would be 0
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()


def keep_likely(weights: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The weights (B, V), 0 for all that neither top_k nor top_p keeps."""
    if 0 < top_k < weights.size(-1):
        weights = weights * (weights >= weights.topk(top_k).values[:, -1:])
    if top_p < 1:
        ascending = sort_rows(weights)  # (B, V)
        below = ascending.cumsum(-1)
        # from below, as many as have 1 - p together, but never all
        dropped = (below <= (1 - top_p) * below[:, -1:]).sum(-1, keepdim=True)  # (B, 1)
        dropped = dropped.clamp(max=weights.size(-1) - 1)
        weights = weights * (weights >= ascending.gather(-1, dropped))
    return weights


def sort_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of x (B, V) in ascending order. On a CPU by NumPy, 15 times as fast as PyTorch."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values


def exponential_noise(keys: torch.Tensor, draw: torch.Tensor, size: int) -> torch.Tensor:
    """Noise (B, size) float32, exponentially distributed with mean 1: a function of keys (B,) and
    draw (B,), both int64, and of the column."""
    words = splitmix64(keys, draw).view(torch.int32).view(-1, 2)  # (B, 2)
    x = torch.arange(size, device=keys.device, dtype=torch.int32) * GOLDEN_32  # (size,)
    x = x ^ words[:, :1]  # (B, size)
    x ^= x >> 16
    x *= MURMUR_1
    x ^= x >> 13
    x += words[:, 1:]
    x *= MURMUR_2
    x ^= x >> 16
    uniform = (x & 0x7FFFFFFF).float().mul_(2**-31)  # in [0, 1], fine towards 0
    # neither 0, with which any token would win, nor 1, with which none could
    return uniform.clamp_(2**-32, 1 - 2**-24).neg_().log1p_().neg_()


def splitmix64(seed: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The output number `draw`, from 0 on, of SplitMix64 started with `seed`; all (B,) int64."""
    z = seed + (draw + 1) * GOLDEN  # sums and products wrap
    z = shift_xor(z, 30) * SPLITMIX_1
    z = shift_xor(z, 27) * SPLITMIX_2
    return shift_xor(z, 31)


def shift_xor(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z ^ (z >> bits) of int64 as if it were unsigned."""
    return z ^ ((z >> bits) & (2 ** (64 - bits) - 1))
