import math

import pytest
import torch
from helpers.common import user_error
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt2.sampling import (
    SamplingParams,
    choose,
    exponential_noise,
    keep_top_k,
    keep_top_p,
    murmur_finalizer,
    splitmix64,
    stream_keys,
    weights_of,
)

EVEN = SamplingParams(1.0)


def keys_of(n: int, seed: int = 0) -> torch.Tensor:
    """n different streams, whose keys are bad on purpose: small numbers in a row."""
    return torch.arange(seed * 1_000_000, seed * 1_000_000 + n)


def draw_many(logits: torch.Tensor, choice: SamplingParams, n: int, seen=None) -> torch.Tensor:
    """How often each token comes in n draws of one row: the first of n / 2 streams, and the first
    n / 2 of one stream."""
    keys = torch.cat([keys_of(n // 2), torch.full((n - n // 2,), 77)])
    draw = torch.cat([torch.zeros(n // 2, dtype=torch.long), torch.arange(n - n // 2)])
    seen = None if seen is None else seen.expand(n, -1)
    tokens = choose(logits.expand(n, -1), choice, keys, draw, seen)
    return torch.bincount(tokens, minlength=logits.numel())


def chi_square_z(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """By how many standard deviations the chi-square of counts exceeds its mean; tokens that are
    expected less than five times are counted together."""
    expected = probs * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert freedom > 0
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    return (chi_square - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("choice", [
    SamplingParams(1.0), SamplingParams(0.7), SamplingParams(2.5), SamplingParams(1.0, top_k=7),
    SamplingParams(1.0, top_p=0.8),
    SamplingParams(0.8, top_k=20, top_p=0.9), SamplingParams(1.3, repetition_penalty=1.7),
    SamplingParams(0.9, 15, 0.85, 0.6), SamplingParams(1.0, 8, 0.7), SamplingParams(1e6, 5)],
    ids=str)
@pytest.mark.parametrize("spread", [2.0, 0.2])
def test_draws_follow_the_distribution_that_hugging_face_makes(choice, spread):
    """Chi-square over 40 tokens. The streams are fixed, so that a pass is a pass."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, generator=generator) * spread
    ids = torch.tensor([[3, 5, 5, 11, 30]])
    seen = torch.zeros(1, 40, dtype=torch.bool).index_fill(1, ids[0], True)
    theirs = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(choice.repetition_penalty),
        TemperatureLogitsWarper(choice.temperature), TopKLogitsWarper(choice.top_k or 40),
        TopPLogitsWarper(choice.top_p)])
    probs = theirs(ids, logits[None].clone())[0].softmax(0)
    counts = draw_many(logits, choice, 40_000, seen)
    assert counts[probs == 0].sum() == 0
    assert chi_square_z(counts, probs) < 3.5


def test_a_distribution_over_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50257, generator=generator) * 3
    counts = torch.zeros(50257, dtype=torch.long)
    for seed in range(8):
        n = 500
        tokens = choose(logits.expand(n, -1), EVEN, keys_of(n, seed), torch.full((n,), seed))
        counts += torch.bincount(tokens, minlength=50257)
    assert chi_square_z(counts, logits.softmax(0)) < 3.5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-30, 1e-300, 1e30])
def test_any_temperature_gives_real_tokens(temperature):
    logits = torch.randn(4, 50304, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 50257:] = 1e4  # a padded vocabulary whose padding is likeliest of all
    for draw in range(20):
        token = choose(logits, SamplingParams(temperature), keys_of(4), torch.full((4,), draw))
        assert token.shape == (4,) and token.min() >= 0 and token.max() < 50257
        if temperature < 1e-20:
            assert torch.equal(token, logits[:, :50257].argmax(-1))


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((6,), -torch.inf)
    logits[[1, 3]] = 0.0
    counts = draw_many(logits, EVEN, 4000)
    assert counts[1] + counts[3] == 4000 and min(counts[1], counts[3]) > 1800


def test_top_k_and_top_p_at_their_ends():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0]])
    for top_k in (0, 5, 6, 10**9):
        assert keep_top_k(logits, top_k) is logits  # all
    assert keep_top_k(logits, 1).isfinite().nonzero()[:, 1].tolist() == [1, 3]  # equal: both
    assert keep_top_k(logits, 3).isfinite().nonzero()[:, 1].tolist() == [1, 2, 3]
    weights = weights_of(logits, 1.0)
    assert keep_top_p(weights, 1.0) is weights
    assert keep_top_p(weights, 0.0).nonzero()[:, 1].tolist() == [1, 3]
    one = weights_of(torch.tensor([[5.0, 1.0, 0.0]]), 1.0)
    assert keep_top_p(one, 0.0).nonzero()[:, 1].tolist() == [0]
    assert keep_top_p(one, 0.9999).nonzero()[:, 1].tolist() == [0, 1, 2]
    # exactly reached: 1/2 + 1/4 suffice for 0.75
    halves = torch.tensor([[0.5, 1.0, 0.25, 0.25]])
    assert keep_top_p(halves, 0.75).nonzero()[:, 1].tolist() == [0, 1]
    assert keep_top_p(halves, 0.76).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


def test_a_penalty_beyond_all_numbers_still_gives_a_token():
    logits = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    seen = torch.tensor([[False, True, False, True]])
    for penalty, token in ((1e-40, 1), (1e38, 2)):
        for draw in range(5):
            assert choose(logits, SamplingParams(1.0, repetition_penalty=penalty), keys_of(1),
                          torch.tensor([draw]), seen).item() == token


@pytest.mark.parametrize("changes, words", [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"), ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 1.5}, "top_p is 1.5"), ({"top_p": -0.5}, "top_p"),
    ({"top_p": float("nan")}, "top_p"), ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ({"repetition_penalty": float("inf")}, "finite"), ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_k": float("inf")}, "top_k"), ({"temperature": "1"}, "temperature is '1'"),
    ({"top_p": None}, "top_p is None")])
def test_settings_without_a_meaning_are_refused(changes, words):
    assert words in user_error(SamplingParams, **{"temperature": 1.0} | changes)


# ------------------------------------------------------------------------------- the noise


def test_splitmix64_is_the_published_one():
    """The first outputs for seed 0 (Vigna's splitmix64.c)."""
    outputs = splitmix64(torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert [x % 2**64 for x in outputs.tolist()] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def fmix32(h: int) -> int:
    """MurmurHash3's finalizer, by plain Python."""
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_the_finalizer_is_murmurs():
    values = [1, 2, -1, 123456789, -987654321]
    got = murmur_finalizer(torch.tensor(values, dtype=torch.int32))
    assert [x % 2**32 for x in got.tolist()] == [fmix32(x % 2**32) for x in values]
    assert got[0].item() % 2**32 == 0x514E28B7  # as Appleby's MurmurHash3.cpp gives


def test_noise_is_what_plain_python_makes_of_its_definition():
    keys, draw, columns = [1, -5, 2**40], [0, 7, 123], [0, 1, 777, 50256]
    noise = exponential_noise(torch.tensor(keys), torch.tensor(draw), 50257)
    words = splitmix64(torch.tensor(keys), torch.tensor(draw)).tolist()
    for row, word in enumerate(words):
        low, high = word % 2**32, (word >> 32) % 2**32
        for column in columns:
            x = fmix32(fmix32(column * 0x9E3779B1 % 2**32 ^ low) ^ high)
            expected = -math.log1p(-(x % 2**31) / 2**31)
            assert noise[row, column].item() == pytest.approx(expected, rel=1e-5)


def test_streams_have_64_bits():
    """Of prompt and seed, all of both."""
    keys = stream_keys([(i,) for i in range(3000)] + [(7, 8)] * 3,
                       [1] * 3000 + [1, 1 + 2**32, 2**64 - 1])
    assert len(set(keys.tolist())) == len(keys) == 3003
    for half in keys.view(torch.int32).view(-1, 2).t():
        assert len(set(half.tolist())) > 2990
    noise = exponential_noise(torch.tensor([5, 5 + 2**32, 5 + 2**40]), torch.zeros(3).long(), 50)
    assert len({tuple(row) for row in noise.tolist()}) == 3


def test_no_two_tokens_know_of_each_other():
    """Neighbours at all powers of two, and pairs that a weaker mixer ties together."""
    pairs = [(1000, 1000 + 2**i) for i in range(16)] + [
        (4180, 40396), (46038, 46809), (13940, 50156), (8340, 44556), (43238, 49609), (1, 2)]
    columns = sorted({column for pair in pairs for column in pair})
    where = {column: i for i, column in enumerate(columns)}
    found = []
    for seed in range(20):
        keys = keys_of(400, seed) * 7919
        noise = exponential_noise(keys, torch.zeros(400, dtype=torch.long), 50257)
        found.append((1 - (-noise[:, columns]).exp()).clamp(0, 0.999999))
    uniform = torch.cat(found)  # (8,000, columns)
    for a, b in pairs:
        cells = (uniform[:, where[a]] * 8).long() * 8 + (uniform[:, where[b]] * 8).long()
        counts = torch.bincount(cells, minlength=64)
        assert chi_square_z(counts, torch.full((64,), 1 / 64)) < 3.7, (a, b)


def test_noise_is_a_function_of_key_draw_and_column_alone():
    keys, draw = torch.tensor([5, -3, 5, 2**62]), torch.tensor([0, 4, 1, 0])
    noise = exponential_noise(keys, draw, 1000)
    assert torch.equal(exponential_noise(keys.flip(0), draw.flip(0), 1000).flip(0), noise)
    assert torch.equal(exponential_noise(keys[1:2], draw[1:2], 50257)[:, :1000], noise[1:2])
    assert len({tuple(row.tolist()) for row in noise}) == 4


def test_noise_is_exponential_and_its_neighbours_know_nothing_of_each_other():
    """As uniform numbers: 64 equal bins over all, single rows and single columns; pairs of
    neighbours (columns, draws, keys) in 32 x 32 bins."""
    for keys, draw in ((keys_of(1000), torch.zeros(1000, dtype=torch.long)),
                       (torch.zeros(1000, dtype=torch.long), torch.arange(1000))):
        uniform = 1 - (-exponential_noise(keys, draw, 1000)).exp()
        even = torch.full((64,), 1 / 64)
        for part in (uniform, *uniform[::200], *uniform.t()[::200]):
            counts = torch.histc(part.flatten(), 64, 0, 1)
            assert chi_square_z(counts, even) < 3.7
        bins = (uniform * 32).long().clamp(max=31)
        for first, second in ((bins[:, :-1], bins[:, 1:]), (bins[:-1], bins[1:])):
            pairs = torch.bincount((first * 32 + second).flatten(), minlength=1024)
            assert chi_square_z(pairs, torch.full((1024,), 1 / 1024)) < 3.7


def test_rounding_hardly_ever_changes_a_draw():
    """What a product of another batch size does to logits: 1e-6 of their size. Of 2,000 draws from
    a flat distribution none changes; inverting its distribution function would change several."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50257, generator=generator) - 40
    inverted = 0
    for seed in range(10):
        n = 200
        keys, draw = keys_of(n, seed), torch.full((n,), seed)
        noisy = logits * (1 + 1e-6 * torch.randn(50257, generator=generator))
        assert torch.equal(choose(logits.expand(n, -1), EVEN, keys, draw),
                           choose(noisy.expand(n, -1), EVEN, keys, draw))
        points = torch.rand(n, generator=generator).double()
        borders = [x.double().softmax(0).cumsum(0) for x in (logits, noisy)]
        found = [torch.searchsorted(border, points) for border in borders]
        inverted += (found[0] != found[1]).sum().item()
    assert inverted >= 4
