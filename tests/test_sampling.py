"""Sampling against Hugging Face's processors, and the random numbers against their definition."""

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
    FMIX32,
    SamplingParams,
    exponential_noise,
    mix,
    sample,
    seen_tokens,
    splitmix64,
    stream_keys,
    token_weights,
)
from minigpt2.tokenizer import N_VOCAB

MODEL_DISTRIBUTION = SamplingParams(1.0)
ROWS = 16  # per call: the noise of this many full vocabularies fits a CPU's cache


def weak_keys(n: int, start: int = 0) -> torch.Tensor:
    """n consecutive small integers, which a weak mixer would not turn into independent streams."""
    return torch.arange(start, start + n)


def token_ids(size: int) -> torch.Tensor:
    return torch.arange(size, dtype=torch.int32)


def count_samples(logits: torch.Tensor, params: SamplingParams, n: int, seen=None) -> torch.Tensor:
    """How often each token is sampled in n draws from one row of logits: the first draw of n / 2
    streams, and the first n / 2 draws of one stream."""
    keys = torch.cat([weak_keys(n // 2), torch.full((n - n // 2,), 77)])
    counter = torch.cat([torch.zeros(n // 2, dtype=torch.long), torch.arange(n - n // 2)])
    seen = None if seen is None else seen.expand(n, -1)
    tokens = sample(logits.expand(n, -1), params, keys, counter, seen)
    return torch.bincount(tokens, minlength=logits.numel())


def chi_square_z(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The chi-square statistic of counts, in standard deviations above its mean. Tokens expected
    less than five times are pooled."""
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


@pytest.mark.parametrize("params", [
    SamplingParams(1.0), SamplingParams(0.7), SamplingParams(2.5), SamplingParams(1.0, top_k=7),
    SamplingParams(1.0, top_p=0.8),
    SamplingParams(0.8, top_k=20, top_p=0.9), SamplingParams(1.3, repetition_penalty=1.7),
    SamplingParams(0.9, 15, 0.85, 0.6), SamplingParams(1.0, 8, 0.7), SamplingParams(1e6, 5)],
    ids=str)
@pytest.mark.parametrize("spread", [2.0, 0.2])
def test_samples_follow_hugging_faces_distribution(params, spread):
    """Chi-square over 40 tokens, with fixed streams: the result is deterministic."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, generator=generator) * spread
    ids = torch.tensor([[3, 5, 5, 11, 30]])
    seen = torch.zeros(1, 40, dtype=torch.bool).index_fill(1, ids[0], True)
    reference = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(params.repetition_penalty),
        TemperatureLogitsWarper(params.temperature), TopKLogitsWarper(params.top_k or 40),
        TopPLogitsWarper(params.top_p)])
    probs = reference(ids, logits[None].clone())[0].softmax(0)
    counts = count_samples(logits, params, 40_000, seen)
    assert counts[probs == 0].sum() == 0
    assert chi_square_z(counts, probs) < 3.5


@pytest.mark.slow
def test_samples_follow_a_distribution_over_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(N_VOCAB, generator=generator) * 3
    counts = torch.zeros(N_VOCAB, dtype=torch.long)
    for start in range(0, 4000, ROWS):
        tokens = sample(logits.expand(ROWS, -1), MODEL_DISTRIBUTION, weak_keys(ROWS, start),
                        torch.tensor(start % 7))
        counts += torch.bincount(tokens, minlength=N_VOCAB)
    assert chi_square_z(counts, logits.softmax(0)) < 3.5


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-30, 1e-300, 1e30])
def test_extreme_temperatures(temperature):
    logits = torch.randn(4, 50304, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 50257:] = 1e4  # the padding of a padded vocabulary is most likely
    for counter in range(20):
        token = sample(logits, SamplingParams(temperature), weak_keys(4), torch.tensor(counter))
        assert token.shape == (4,) and token.min() >= 0 and token.max() < 50257
        if temperature < 1e-20:
            assert torch.equal(token, logits[:, :50257].argmax(-1))


def test_tokens_of_probability_zero_are_never_sampled():
    logits = torch.full((6,), -torch.inf)
    logits[[1, 3]] = 0.0
    counts = count_samples(logits, MODEL_DISTRIBUTION, 4000)
    assert counts[1] + counts[3] == 4000 and min(counts[1], counts[3]) > 1800


def test_top_k_and_top_p_at_their_limits():
    def kept(logits: list[float], **options) -> list[int]:
        weights = token_weights(torch.tensor([logits]), SamplingParams(1.0, **options))
        assert weights.max() == 1
        return weights.nonzero()[:, 1].tolist()

    logits = [0.0, 2.0, 1.0, 2.0, -1.0]
    for top_k in (0, 5, 6, 10**9):
        assert kept(logits, top_k=top_k) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=1) == [1, 3]  # a tie: both
    assert kept(logits, top_k=3) == [1, 2, 3]
    assert kept(logits, top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.0) == [1, 3]
    one = [5.0, 1.0, 0.0]
    assert kept(one, top_p=0.0) == [0] and kept(one, top_p=0.9999) == [0, 1, 2]
    equal = [0.0] * 4  # two of them are exactly 0.5, but ties stay together
    assert kept(equal, top_p=0.5) == [0, 1, 2, 3]
    # 1 and then 16 x 2^-4: exactly a half, up to the rounding of exp
    halves = [0.0, *[-4 * math.log(2)] * 16]
    assert kept(halves, top_p=0.49) == [0] and kept(halves, top_p=0.51) == list(range(17))


def test_an_extreme_penalty_does_not_overflow():
    logits = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    seen = torch.tensor([[False, True, False, True]])
    for penalty, token in ((1e-40, 1), (1e38, 2)):
        for counter in range(5):
            assert sample(logits, SamplingParams(1.0, repetition_penalty=penalty), weak_keys(1),
                          torch.tensor([counter]), seen).item() == token


def test_seen_tokens_exclude_padding():
    seen = seen_tokens(torch.tensor([[3, 3, 1], [2, 0, 0]]), torch.tensor([3, 1]), 5)
    assert seen.tolist() == [[False, True, False, True, False], [False, False, True, False, False]]


@pytest.mark.parametrize("changes, words", [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"), ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 1.5}, "top_p is 1.5"), ({"top_p": -0.5}, "top_p"),
    ({"top_p": float("nan")}, "top_p"), ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"repetition_penalty": float("nan")}, "repetition_penalty"),
    ({"repetition_penalty": float("inf")}, "finite"), ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_k": float("inf")}, "top_k"), ({"temperature": "1"}, "temperature is '1'"),
    ({"top_p": None}, "top_p is None")])
def test_invalid_settings_are_refused(changes, words):
    assert words in user_error(SamplingParams, **{"temperature": 1.0} | changes)


# ------------------------------------------------------------------------------- random numbers


def test_splitmix64_matches_the_reference():
    """The first outputs for seed 0 (Vigna's splitmix64.c)."""
    outputs = splitmix64(torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert [x % 2**64 for x in outputs.tolist()] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def fmix32_reference(h: int) -> int:
    """MurmurHash3's finalizer in plain Python."""
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_fmix32_matches_the_reference():
    values = [1, 2, -1, 123456789, -987654321]
    got = mix(torch.tensor(values, dtype=torch.int32), FMIX32)
    assert [x % 2**32 for x in got.tolist()] == [fmix32_reference(x % 2**32) for x in values]
    assert got[0].item() % 2**32 == 0x514E28B7  # from Appleby's MurmurHash3.cpp


def test_noise_matches_its_definition_in_plain_python():
    keys, counter, ids = [1, -5, 2**40], [0, 7, 123], [0, 1, 777, 50256]
    noise = exponential_noise(torch.tensor(keys), torch.tensor(counter),
                              torch.tensor(ids, dtype=torch.int32))
    words = splitmix64(torch.tensor(keys), torch.tensor(counter)).tolist()
    for row, word in enumerate(words):
        low, high = word % 2**32, (word >> 32) % 2**32
        for column, token in enumerate(ids):
            x = fmix32_reference(fmix32_reference(token * 0x9E3779B1 % 2**32 ^ low) ^ high)
            expected = -math.log1p(-(x % 2**31) / 2**31)
            assert noise[row, column].item() == pytest.approx(expected, rel=1e-5)


def test_keys_have_64_bits_of_prompt_and_seed():
    keys = stream_keys([(i,) for i in range(3000)] + [(7, 8)] * 3,
                       [1] * 3000 + [1, 1 + 2**32, 2**64 - 1])
    assert len(set(keys.tolist())) == len(keys) == 3003
    for half in keys.view(torch.int32).view(-1, 2).t():
        assert len(set(half.tolist())) > 2990
    noise = exponential_noise(torch.tensor([5, 5 + 2**32, 5 + 2**40]), torch.tensor(0),
                              token_ids(50))
    assert len({tuple(row) for row in noise.tolist()}) == 3


def test_noise_of_two_tokens_is_independent():
    """Neighbors at all powers of two, and pairs that a weaker mixer makes dependent: chi-square
    over 8 x 8 cells of 8,000 streams."""
    pairs = [(1000, 1000 + 2**i) for i in range(16)] + [
        (4180, 40396), (46038, 46809), (13940, 50156), (8340, 44556), (43238, 49609), (1, 2)]
    columns = sorted({token for pair in pairs for token in pair})
    keys = torch.cat([weak_keys(400, seed * 1_000_000) for seed in range(20)]) * 7919
    noise = exponential_noise(keys, torch.tensor(0), torch.tensor(columns, dtype=torch.int32))
    cells = ((1 - (-noise).exp()).clamp(0, 0.999999) * 8).long()  # (8,000, columns)
    column_of = {token: i for i, token in enumerate(columns)}
    for a, b in pairs:
        counts = torch.bincount(cells[:, column_of[a]] * 8 + cells[:, column_of[b]], minlength=64)
        assert chi_square_z(counts, torch.full((64,), 1 / 64)) < 3.7, (a, b)


def test_noise_depends_on_key_counter_and_token_alone():
    keys, counter = torch.tensor([5, -3, 5, 2**62]), torch.tensor([0, 4, 1, 0])
    noise = exponential_noise(keys, counter, token_ids(1000))
    flipped = exponential_noise(keys.flip(0), counter.flip(0), token_ids(1000).flip(0))
    assert torch.equal(flipped.flip(0, 1), noise)
    alone = exponential_noise(keys[1:2], torch.tensor(4), token_ids(N_VOCAB))
    assert torch.equal(alone[:, :1000], noise[1:2])
    assert len({tuple(row.tolist()) for row in noise}) == 4


def test_noise_is_exponential_and_its_neighbors_are_independent():
    """As uniform numbers: 64 equal bins over all, single rows and single columns; pairs of
    neighbors (tokens, counters, keys) in 32 x 32 bins."""
    for keys, counter in ((weak_keys(1000), torch.tensor(0)),
                          (torch.zeros(1000, dtype=torch.long), torch.arange(1000))):
        uniform = 1 - (-exponential_noise(keys, counter, token_ids(1000))).exp()
        even = torch.full((64,), 1 / 64)
        for part in (uniform, *uniform[::200], *uniform.t()[::200]):
            counts = torch.histc(part.flatten(), 64, 0, 1)
            assert chi_square_z(counts, even) < 3.7
        bins = (uniform * 32).long().clamp(max=31)
        for first, second in ((bins[:, :-1], bins[:, 1:]), (bins[:-1], bins[1:])):
            pairs = torch.bincount((first * 32 + second).flatten(), minlength=1024)
            assert chi_square_z(pairs, torch.full((1024,), 1 / 1024)) < 3.7


@pytest.mark.slow
def test_rounding_hardly_ever_changes_a_sample():
    """Products of another batch size change logits by 1e-6 of their size. That changes none of
    2,000 samples from a flat distribution; inverting the cumulative distribution changes some."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N_VOCAB, generator=generator) - 40
    changed_by_inversion = 0
    for seed in range(10):
        noisy = logits * (1 + 1e-6 * torch.randn(N_VOCAB, generator=generator))
        for start in range(0, 200, 20):
            keys = weak_keys(20, seed * 1_000_000 + start)
            tokens = [sample(x.expand(20, -1), MODEL_DISTRIBUTION, keys, torch.tensor(seed))
                      for x in (logits, noisy)]
            assert torch.equal(*tokens)
        points = torch.rand(200, generator=generator).double()
        boundaries = [x.double().softmax(0).cumsum(0) for x in (logits, noisy)]
        found = [torch.searchsorted(boundary, points) for boundary in boundaries]
        changed_by_inversion += (found[0] != found[1]).sum().item()
    assert changed_by_inversion >= 4
