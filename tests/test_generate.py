"""`generate`, batches and log-probabilities against Hugging Face and against simpler code."""

import dataclasses
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY, user_error
from helpers.generation import (
    LONG,
    PROMPTS,
    SAMPLING_OPTIONS,
    SMALL_VOCAB,
    generate_simply,
    random_batch,
    rows_of,
    run_generate,
    sharp_model,
)

import inference
from dataloader import pad_rows
from inference import (
    DecodingBatch,
    decode_generation,
    generate,
    logprobs,
    respond,
    tokenize_batch_input,
)
from minigpt2.tokenizer import EOT_TEXT, EOT_TOKEN, N_VOCAB, encode
from model import GPT, GPTConfig


def generate_alone(model, prompt: str, max_steps: int, **options) -> list[int]:
    """The token ids of a batch of one."""
    return rows_of(*run_generate(model, *tokenize_batch_input([prompt]), max_steps, **options))[0]


def test_prompts_are_right_padded_with_0():
    input_ids, masks = tokenize_batch_input(PROMPTS)
    lengths = [len(encode(prompt)) for prompt in PROMPTS]
    assert input_ids.shape == masks.shape == (3, max(lengths)) and input_ids.dtype == torch.int64
    for ids, mask, length, prompt in zip(input_ids, masks, lengths, PROMPTS, strict=True):
        assert ids.tolist() == encode(prompt) + [0] * (max(lengths) - length)
        assert mask.tolist() == [1] * length + [0] * (max(lengths) - length)


def test_an_empty_prompt_leaves_no_mark_in_the_text():
    """It is <|endoftext|>, which is no text."""
    output, masks = generate(sharp_model(), *tokenize_batch_input(["", "A"]), 1.0, 4, seed=0)
    texts = decode_generation(output, masks)
    assert output[0, 0] == EOT_TOKEN and all(EOT_TEXT not in text for text in texts)
    assert texts[1].startswith("A") and all(texts)


def test_endoftext_in_a_prompt_is_plain_text():
    ids, masks = tokenize_batch_input([f"a{EOT_TEXT}"])
    assert EOT_TOKEN not in ids and masks.sum() == ids.size(1) == 8


def test_output_is_right_padded_like_the_input():
    input_ids, masks = tokenize_batch_input(PROMPTS)
    output, output_masks = generate(sharp_model(), input_ids, masks, 1.0, 9)
    assert output.shape == output_masks.shape and output.dtype == output_masks.dtype == torch.int64
    for i in range(3):
        length, prompt_length = int(output_masks[i].sum()), int(masks[i].sum())
        assert output_masks[i].tolist() == [1] * length + [0] * (output.size(1) - length)
        assert output[i, length:].eq(0).all()
        assert output[i, :prompt_length].tolist() == encode(PROMPTS[i])
        assert prompt_length < length <= prompt_length + 9
    assert output_masks[:, -1].any()  # no column of only padding


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(options):
    model = sharp_model()
    expected = [generate_alone(model, prompt, 12, **options) for prompt in PROMPTS]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        batch = tokenize_batch_input([PROMPTS[i] for i in order])
        rows = rows_of(*run_generate(model, *batch, 12, **options))
        assert rows == [expected[i] for i in order]


def random_cases() -> list:
    """(vocab_size, prompt lengths, max_steps): 1 to 16 rows of 1 to 1,023 tokens, including the
    shortest and the longest."""
    rng = random.Random(6)
    cases = [(50257, [1, 40, 9], 12), (512, [1], 40), (512, [1023], 5),
             (512, [1, 1023, 500, 1000], 30)]
    for rows in (2, 5, 11, 16):
        lengths = [rng.randint(1, 1023) for _ in range(rows)]
        cases.append((512, lengths, rng.randint(1, 12)))
    lengths = [rng.randint(1, 40) for _ in range(16)]
    return [*cases, pytest.param(512, lengths, 60, marks=pytest.mark.slow)]


@pytest.mark.parametrize("vocab_size, lengths, max_steps", random_cases(),
                         ids=lambda x: str(x)[:24])
def test_random_batches_match_hugging_face_and_single_rows_without_a_cache(vocab_size, lengths,
                                                                           max_steps):
    from transformers import GPT2Config, GPT2LMHeadModel

    from minigpt2.checkpoint import to_gpt2_layout
    config = dataclasses.replace(LONG, vocab_size=vocab_size)
    model = sharp_model(config, seed=len(lengths) + 1)
    reference = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=1024, n_embd=16,
                                           n_layer=2, n_head=2)).eval()
    reference.load_state_dict(to_gpt2_layout(model), strict=False)
    ids, masks = random_batch(lengths, max_steps, vocab_size - 1)
    greedy = rows_of(*generate(model, ids, masks, 0.0, max_steps))
    sampled = rows_of(*generate(model, ids, masks, 1.0, max_steps, top_p=0.95, seed=3))
    for i, length in enumerate(lengths):
        prompt = ids[i : i + 1, :length]
        ones = torch.ones_like(prompt)
        expected = reference.generate(prompt, attention_mask=ones, do_sample=False, pad_token_id=0,
                                      max_new_tokens=min(max_steps, 1024 - length))[0].tolist()
        assert greedy[i] == expected
        with torch.no_grad():  # no ties within rounding, which would make the comparison random
            top = model(torch.tensor([expected]))[0][0, length - 1 : -1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4
        row = prompt[0].tolist()
        assert generate_simply(model, row, max_steps, temperature=0.0) == expected
        assert generate_simply(model, row, max_steps, temperature=1.0, top_p=0.95,
                               seed=3) == sampled[i]


def test_ids_in_padding_do_not_matter():
    model = sharp_model()
    input_ids, masks = tokenize_batch_input(PROMPTS)
    expected = rows_of(*generate(model, input_ids, masks, 0.0, 12))
    for pad in (EOT_TOKEN, 11, -100, 2**40):
        padded = torch.where(masks.bool(), input_ids, pad)
        assert rows_of(*generate(model, padded, masks, 0.0, 12)) == expected
    wider = torch.cat([masks, torch.zeros(3, 4, dtype=torch.long)], 1)  # columns of only padding
    ids = torch.cat([input_ids, torch.full((3, 4), 7)], 1)
    assert rows_of(*generate(model, ids, wider, 0.0, 12)) == expected


@pytest.mark.parametrize("penalty", [0.8, 1.3, 3.0])
def test_the_repetition_penalty_matches_hugging_face(penalty, tmp_path):
    from transformers import GPT2LMHeadModel

    from minigpt2.checkpoint import save_checkpoint
    model = sharp_model()
    reference = GPT2LMHeadModel.from_pretrained(save_checkpoint(tmp_path, 0, model)).eval()
    got = rows_of(*generate(model, *tokenize_batch_input(PROMPTS), 0.0, 12,
                            repetition_penalty=penalty))
    for prompt, row in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([encode(prompt)])
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                      max_new_tokens=12, pad_token_id=EOT_TOKEN,
                                      repetition_penalty=penalty)
        assert row == expected[0].tolist()


def test_generated_tokens_follow_the_softmax():
    """4,000 rows with one prompt and different seeds: chi-square over 5 tokens and all others."""
    config = GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=1, n_embd=8)
    model = sharp_model(config, seed=3)
    with torch.no_grad():
        model.lm_head.weight[5:].zero_()
        model.lm_head.weight[:5].normal_(std=4)
        probs = model(torch.tensor([[21]]))[0][0, -1].softmax(0)
    batch, counts = torch.full((500, 1), 21), torch.zeros(6, dtype=torch.long)
    for seed in range(0, 4000, 500):
        output, _ = generate(model, batch, torch.ones_like(batch), 1.0, 1, seed=seed)
        counts += torch.bincount(output[:, 1].clamp(max=5), minlength=6)
    expected = torch.cat([probs[:5], probs[5:].sum()[None]]) * 4000
    kept = expected > 5
    assert kept.sum() >= 3
    # 20.5 is the 0.999 quantile for 5 degrees of freedom
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5


def test_a_padded_vocabulary_is_not_sampled():
    """Even if ids beyond the tokenizer's have the largest logits."""
    wide = sharp_model(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    model = sharp_model()
    with torch.no_grad():
        for padded, p in zip(wide.parameters(), model.parameters(), strict=True):
            padded[: len(p)] = p
        wide.transformer.wte.weight[50257:] = 50 * wide.transformer.wte.weight[:47].sign()
    batch = tokenize_batch_input(PROMPTS)
    with torch.no_grad():
        assert wide(batch[0])[0].argmax(-1).min() >= N_VOCAB
    for options in SAMPLING_OPTIONS:
        expected = rows_of(*run_generate(model, *batch, 12, **options))
        assert rows_of(*run_generate(wide, *batch, 12, **options)) == expected
    torch.testing.assert_close(logprobs(wide, *batch), logprobs(model, *batch))
    foreign = batch[0].clone()
    foreign[0, 0] = N_VOCAB  # an id of the model, not of the tokenizer
    for call in (logprobs, lambda *batch: generate(*batch, 1.0, 3)):
        assert "50257" in user_error(call, wide, foreign, batch[1])


# ------------------------------------------------------------------------------- seeds


def test_seeds():
    model = sharp_model()
    first = generate_alone(model, PROMPTS[0], 12, temperature=1.0, seed=1)
    second = generate_alone(model, PROMPTS[0], 12, temperature=1.0, seed=2)
    assert generate_alone(model, PROMPTS[0], 12, temperature=1.0, seed=1) == first != second
    assert generate_alone(model, PROMPTS[0], 4, temperature=1.0, seed=1) == first[
        : len(encode(PROMPTS[0])) + 4]
    state = torch.get_rng_state()
    batch = tokenize_batch_input([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=1))
    assert [rows[0], rows[2]] == [first, second]  # a repeated prompt gets the next seed
    assert all(map(torch.equal, generate(model, *batch, 1.0, 12, seed=range(3)),
                   generate(model, *batch, 1.0, 12, seed=[0, 1, 2])))
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=[2, 0, 1]))
    assert [rows[0], rows[2]] == [second, first]
    for same in (np.int64(1), list(np.array([1, 1, 2])), (1, 1, 2)):
        rows = rows_of(*generate(model, *batch, 1.0, 12, seed=same))
        assert [rows[0], rows[2]] == [first, second]
    assert torch.equal(torch.get_rng_state(), state)
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=1 + 2**32))
    assert rows[0] not in (first, second)  # seeds have 64 bits
    for seed in (-1, [1, 2], [1, 2, -3], [], 0.5, [0.5, 1, 2], "123", b"123", 2**64, None,
                 torch.tensor([1, 2, 3]), np.zeros((30, 30), int)):
        assert "seed" in user_error(generate, model, *batch, 1.0, 12, seed=seed)


def test_streams_differ_between_prompts_seeds_and_positions(tiny_model):
    """With equal logits, the noise alone selects the tokens."""
    with torch.no_grad():
        tiny_model.transformer.wte.weight.zero_()
    ids = torch.tensor([[1], [2], [1]])
    rows = rows_of(*generate(tiny_model, ids, torch.ones_like(ids), 1.0, 30, seed=[0, 0, 1]))
    tokens = [token for row in rows for token in row[1:]]
    assert len(tokens) == 90 and len(set(tokens)) > 85


@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_copies_of_a_prompt_are_prefilled_once(options, monkeypatch):
    """Prompts in any order, of unequal length, one the beginning of another; every row equals the
    row sampled alone."""
    model = sharp_model(SMALL_VOCAB, seed=1)
    prompts = [[7, 8, 9], [5], [7, 8], list(range(40, 80)), [7, 8, 0]]
    batch = [prompts[i] for i in (0, 1, 0, 3, 2, 1, 4, 3, 0, 4, 1, 3)]
    prefilled, forward = [], GPT.hidden_states

    def counted(self, idx, cache=None, positions=None):
        if positions is None:
            prefilled.append(len(idx))
        return forward(self, idx, cache, positions)

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "hidden_states", counted)
        rows = rows_of(*run_generate(model, *pad_rows(batch), 25, seed=list(range(12)), **options))
    assert prefilled == [5]
    assert rows == [generate_simply(model, prompt, 25, seed=seed, **options)
                    for seed, prompt in enumerate(batch)]
    assert len(set(map(tuple, rows))) == (12 if options["temperature"] else 5)


def test_the_repetition_penalty_ignores_padding(tiny_model):
    """PAD_TOKEN has the largest logit and is not penalized before it is generated."""
    batch = tokenize_batch_input(["a b c d e f", "a"])
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight.zero_()
        tiny_model.transformer.ln_f.bias.fill_(1.0)
        tiny_model.transformer.wte.weight.zero_()
        tiny_model.transformer.wte.weight[:2] = torch.tensor([[0.02], [0.015]])
    rows = rows_of(*generate(tiny_model, *batch, 0.0, 2, repetition_penalty=2.0))
    assert [row[-2:] for row in rows] == [[0, 1], [0, 1]]


# ------------------------------------------------------------------------------- ends of rows


class ChainModel(GPT):
    """Predicts the next token from the last one alone, by a table made of chains of ids; other
    tokens repeat. Records the number of rows of each forward pass."""

    def __init__(self, *chains: list[int], config: GPTConfig = TINY):
        super().__init__(config)
        self.lm_head, self.batch_sizes = ChainHead(config.vocab_size, chains), []

    def hidden_states(self, idx, cache=None, positions=None):
        self.batch_sizes.append(len(idx))
        return idx[..., None]


class ChainHead(torch.nn.Module):
    def __init__(self, vocab_size: int, chains: tuple[list[int], ...]):
        super().__init__()
        self.vocab_size = vocab_size
        self.table = {a: b for chain in chains for a, b in zip(chain, chain[1:], strict=False)}

    def forward(self, x):
        wanted = torch.tensor([[self.table.get(int(token), int(token))] for token in x[:, 0]])
        return torch.zeros(len(x), self.vocab_size).scatter(1, wanted, 100.0)


def finish_reasons(model, batch, max_steps: int) -> list[str]:
    return [response.finish_reason for response in
            respond(model, rows_of(*batch), max_steps, temperature=0.0)]


def test_each_row_stops_at_its_own_endoftext():
    a, c, d = (encode(prompt)[-1] for prompt in ("a", "b c", "d"))
    model = ChainModel([a, 5, EOT_TOKEN], [c, 7, 8, 9, EOT_TOKEN], [d, EOT_TOKEN])
    input_ids, masks = tokenize_batch_input(["a", "b c", "d"])
    output, output_masks = generate(model, input_ids, masks, 1.0, 6)
    new = [row[int(mask.sum()) :] for row, mask in zip(rows_of(output, output_masks), masks,
                                                       strict=True)]
    assert new == [[5, EOT_TOKEN], [7, 8, 9, EOT_TOKEN], [EOT_TOKEN]]
    # stops before max_steps, and drops finished rows once they are at least half
    assert model.batch_sizes == [3, 3, 1, 1]
    responses = decode_generation(output, output_masks, prompt_masks=masks)
    assert responses == ["&", "()*", ""]
    assert decode_generation(output, output_masks) == ["a&", "b c()*", "d"]
    assert finish_reasons(model, (input_ids, masks), 6) == ["stop"] * 3


@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_dropping_finished_rows_does_not_change_the_others(options, monkeypatch):
    """With a real model and cache, rows of unequal length that finish at different times: one of
    the generated ids stands in for <|endoftext|>."""
    model = sharp_model(SMALL_VOCAB, seed=1)
    lengths = [3, 40, 9, 1, 25, 17]
    ids, masks = random_batch(lengths, 2, 511)
    full = [row[length:] for row, length in
            zip(rows_of(*run_generate(model, ids, masks, 30, **options)), lengths, strict=True)]
    end = next(token for i, token in enumerate(full[1]) if i >= 7 and token not in full[1][:i]
               and any(token not in row for row in full))
    monkeypatch.setattr(inference, "EOT_TOKEN", end)
    kept = []
    keep_rows = DecodingBatch.keep_rows
    monkeypatch.setattr(DecodingBatch, "keep_rows", lambda self, rows: (
        keep_rows(self, rows), kept.append(len(rows))))
    # half of the batch is one row, which finishes early, repeated
    ids, masks = torch.cat([ids[[1] * 6], ids]), torch.cat([masks[[1] * 6], masks])
    output = run_generate(model, ids, masks, 30, seed=[0] * 12, **options)
    new = [row[int(mask.sum()) :] for row, mask in zip(rows_of(*output), masks, strict=True)]
    expected = [row[: row.index(end) + 1] if end in row else row for row in full]
    assert new == [expected[1]] * 6 + expected and max(map(len, new)) == 30
    assert kept and kept[0] <= 6


def test_one_of_two_rows_continues_alone():
    a, b = (encode(prompt)[-1] for prompt in ("a", "b"))
    model = ChainModel([a, EOT_TOKEN], [b, 5, 6, EOT_TOKEN])
    generate(model, *tokenize_batch_input(["a", "b"]), 0.0, 9)
    assert model.batch_sizes == [2, 1, 1]


def test_max_steps_and_the_context_end_a_row():
    model = ChainModel()
    batch = tokenize_batch_input(["a", " b" * 29])
    output, masks = generate(model, *batch, 0.0, 3)
    assert masks.sum(1).tolist() == [4, 32]  # the second row fills the context of 32
    assert len(model.batch_sizes) == 3
    assert finish_reasons(model, batch, 3) == ["length", "length"]  # not cut
    output, masks = generate(model, *batch, 0.0, 4)
    assert masks.sum(1).tolist() == [5, 32]
    assert finish_reasons(model, batch, 4) == ["length", "context"]
    output, masks = generate(model, *batch, 0.0, 1000)
    assert masks.sum(1).tolist() == [32, 32] and output.shape == (2, 32)
    assert finish_reasons(model, batch, 1000) == ["context", "context"]
    output, masks = generate(model, *batch, 0.0, 0)
    assert torch.equal(output, batch[0]) and torch.equal(masks, batch[1])
    assert finish_reasons(model, batch, 0) == ["length", "length"]


def test_max_steps_may_exceed_the_context(tiny_model):
    ids, masks = tokenize_batch_input(["a b c", "a"])
    output = generate(tiny_model, ids, masks, 1.0, 10**30)[0]
    assert output.size(1) == TINY.block_size
    assert torch.equal(output, generate(tiny_model, ids, masks, 1.0, 40)[0])


# ------------------------------------------------------------------------------- streaming


def test_on_tokens_receives_tokens_as_they_come():
    a, c, d = (encode(prompt)[-1] for prompt in ("a", "b c", "d"))
    model = ChainModel([a, 5, EOT_TOKEN], [c, 7, 8, 9, EOT_TOKEN], [d, EOT_TOKEN])
    batch, reported = tokenize_batch_input(["a", "b c", "d"]), []
    generate(model, *batch, 1.0, 6, on_tokens=lambda row, tokens: reported.append((row, tokens)))
    assert reported == [(0, [5]), (1, [7]), (2, [EOT_TOKEN]), (0, [EOT_TOKEN]), (1, [8]), (1, [9]),
                    (1, [EOT_TOKEN])]


def test_an_exception_in_on_tokens_stops_generation(tiny_model):
    reported = []

    def interrupt(row: int, tokens: list[int]) -> None:
        reported.extend(tokens)
        if len(reported) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model, *tokenize_batch_input(["a"]), 1.0, 20, on_tokens=interrupt)
    assert reported == generate_alone(tiny_model, "a", 3, temperature=1.0)[1:]


# ------------------------------------------------------------------------------- GPU schedule


class FakeGraphs:
    """Simulates the GPU schedule and CUDA graphs on a CPU: a capture records a step without running
    it, and a replay runs it on the recorded tensors, which must still be the ones in use."""

    def __init__(self, monkeypatch):
        self.spans, self.batch_sizes, self.replays, self.warmups = [], [], 0, 0
        self.capturing = None
        step = DecodingBatch.step
        graphs = self

        class Graph:
            def replay(self):
                assert addresses(self.batch) == self.addresses
                step(self.batch)
                graphs.replays += 1

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            self.capturing = graph
            yield
            self.capturing = None

        def step_or_record(batch: DecodingBatch) -> None:
            if self.capturing is None:
                self.warmups += 1
                step(batch)
                return
            assert self.warmups, "captured without a warm-up"
            self.capturing.batch, self.capturing.addresses = batch, addresses(batch)
            self.spans.append(batch.cache.span)
            self.batch_sizes.append(len(batch.row))
            self.warmups = 0

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr("minigpt2.kernels.capture_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(DecodingBatch, "step", step_or_record)
        monkeypatch.setattr(inference, "on_gpu", lambda device: True)


def addresses(batch: DecodingBatch) -> list:
    """The memory that a step of the batch reads and writes, and the cache's span."""
    tensors = [value for owner in (batch, batch.cache) for value in vars(owner).values()
               if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 13
    return [batch.cache.span, *(tensor.data_ptr() for tensor in tensors)]


@pytest.mark.parametrize("with_endings", [False, True])
@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_the_gpu_schedule_generates_the_same_tokens(options, with_endings, monkeypatch):
    """Graphs, syncs every 16 steps and a span that grows by 128. One row fills the context; with
    endings, rows also finish early and are dropped."""
    model = sharp_model(dataclasses.replace(SMALL_VOCAB, block_size=340), seed=1)
    lengths = [3, 100, 40, 200]
    ids, masks = random_batch(lengths, 5, 511)
    full = rows_of(*run_generate(model, ids, masks, 150, **options))
    if with_endings:
        new, others = full[3][200:], full[0][3:] + full[1][100:] + full[2][40:]
        end = next(token for i, token in enumerate(new)
                   if i >= 20 and token not in new[:i] and token not in others)
        monkeypatch.setattr(inference, "EOT_TOKEN", end)
        ids, masks = torch.cat([ids, ids[[3] * 5]]), torch.cat([masks, masks[[3] * 5]])
    reported, options = [], options | {"seed": [0] * len(ids)}
    expected = rows_of(*run_generate(model, ids, masks, 150, **options))
    graphs = FakeGraphs(monkeypatch)
    got = rows_of(*run_generate(model, ids, masks, 150, **options,
                                on_tokens=lambda row, tokens: reported.append((row, tokens))))
    assert got == expected
    for row, length in enumerate(masks.sum(1).tolist()):
        assert sum((tokens for r, tokens in reported if r == row), []) == expected[row][length:]
    assert max(len(tokens) for _, tokens in reported) == 16
    assert graphs.spans[0] == 256 and set(graphs.spans) <= {256, 384, 128}
    assert graphs.replays > (5 if with_endings else 140)
    assert graphs.batch_sizes[0] == len(ids)
    assert (len(set(graphs.batch_sizes)) > 1) == with_endings


def test_non_finite_logits_between_two_syncs_are_found(monkeypatch):
    model = sharp_model(SMALL_VOCAB, seed=1)
    batch = random_batch([3, 10], 5, 511)
    FakeGraphs(monkeypatch)
    passes = []

    def nan_in_pass_5(module, inputs, logits):
        passes.append(1)
        return logits * float("nan") if len(passes) == 5 else logits

    model.lm_head.register_forward_hook(nan_in_pass_5)
    assert "not finite" in user_error(generate, model, *batch, 1.0, 100)


def test_short_generations_use_no_graphs(monkeypatch):
    model = sharp_model(SMALL_VOCAB, seed=1)
    batch = random_batch([3, 10], 5, 511)
    expected = rows_of(*generate(model, *batch, 1.0, 63))
    graphs = FakeGraphs(monkeypatch)
    assert rows_of(*generate(model, *batch, 1.0, 63)) == expected and graphs.replays == 0
    assert len(rows_of(*generate(model, *batch, 1.0, 64))) == 2 and graphs.replays > 50


# ------------------------------------------------------------------------------- scoring


def test_logprobs_and_their_gradients_match_a_log_softmax(monkeypatch):
    monkeypatch.setattr("minigpt2.loss.LOSS_ROWS_CPU", 5)  # several parts
    model = sharp_model().train()
    ids, masks = random_batch([9, 1, 14], seed=0)
    upstream = torch.randn(3, ids.size(1) - 1)
    scores = logprobs(model, ids, masks)
    assert scores.shape == (3, ids.size(1) - 1) and scores.dtype == torch.float32
    (scores * upstream).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    full = model(ids)[0][:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = full * masks[:, 1:]
    (expected * upstream).sum().backward()
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    for ours, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, atol=1e-4 * p.grad.abs().max(), rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(logprobs(model, ids, masks), expected.detach())
        _, loss = model(ids[:1, :8], ids[:1, 1:9])
    assert -scores[0, :8].mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_logprobs_do_not_depend_on_padding():
    model = sharp_model()
    ids, masks = random_batch([9, 1, 14], seed=0)
    with torch.no_grad():
        scores = logprobs(model, ids, masks)
        for pad in (5, -100, 2**40):
            other = logprobs(model, torch.where(masks.bool(), ids, pad), masks)
            assert torch.equal(scores, other) and scores[1].eq(0).all()
        assert torch.equal(logprobs(model, ids.int(), masks.bool()), scores)
        assert logprobs(model, ids[:, :1], masks[:, :1]).shape == (3, 0)
        wide = logprobs(model, F.pad(ids, (0, 60), value=3), F.pad(masks, (0, 60)))
        assert torch.equal(wide, F.pad(scores, (0, 60)))  # padding beyond the context
        row = logprobs(model, ids[:1, :9], masks[:1, :9])
    torch.testing.assert_close(scores[:1, :8], row)
    assert scores[0, 8:].eq(0).all()
    assert "ones" in user_error(logprobs, model, ids, masks.flip(1))


# ------------------------------------------------------------------------------- bad input


def test_invalid_prompts_and_settings():
    model = sharp_model()
    assert "no prompt" in user_error(tokenize_batch_input, [])
    ids, masks = tokenize_batch_input(["a b", ""])  # an empty prompt is <|endoftext|>
    assert rows_of(ids, masks) == [encode("a b"), [EOT_TOKEN]]
    batch = tokenize_batch_input(["a", " b" * 32])
    message = user_error(generate, model, *batch, 1.0, 5)
    assert "prompt 2 of 2 has 32 tokens" in message and "context is 32" in message
    assert generate(model, *batch, 1.0, 0)[1].sum(1).tolist() == [1, 32]  # no room is needed
    assert "33 tokens" in user_error(generate, model, *tokenize_batch_input([" b" * 33]), 1.0, 0)
    ids, masks = tokenize_batch_input(["a b c", "d"])
    assert "temperature" in user_error(generate, model, ids, masks, -0.1, 5)
    assert "top_k" in user_error(generate, model, ids, masks, 1.0, 5, top_k=-1)
    assert "max_steps" in user_error(generate, model, ids, masks, 1.0, -1)
    assert "(2, 2)" in user_error(generate, model, ids, masks[:, :2], 1.0, 5)
    assert "(0, 3)" in user_error(generate, model, ids[:0], masks[:0], 1.0, 5)
    left_padded = masks.flip(1)
    assert "ones" in user_error(generate, model, ids, left_padded, 1.0, 5)
    assert "ones" in user_error(generate, model, ids, torch.zeros_like(masks), 1.0, 5)
    for kind in (torch.float, torch.bool):
        assert "integers" in user_error(generate, model, ids.to(kind), masks, 1.0, 5)
    assert "integers" in user_error(logprobs, model, ids, masks.float())
    for mask in ([[2, 1, 1], [1, 1, 0]], [[-1, 3, 0], [1, 0, 0]], [[3, 0, 0], [1, 0, 0]]):
        assert "ones" in user_error(generate, model, ids, torch.tensor(mask), 1.0, 5)
    for steps in (5.0, None, float("nan")):
        assert "max_steps" in user_error(generate, model, ids, masks, 1.0, steps)
    small = GPT(GPTConfig(block_size=32, vocab_size=100, n_layer=1, n_head=1, n_embd=8))
    assert "0 to 99" in user_error(generate, small, ids, masks, 1.0, 5)
    assert "single string" in user_error(tokenize_batch_input, "abc")
    for wrong in (-1, 50257):
        foreign = ids.clone()
        foreign[0, 1] = wrong
        assert str(wrong) in user_error(generate, model, foreign, masks, 1.0, 5)


def test_other_integer_dtypes_and_bool_masks():
    model = sharp_model()
    ids, masks = tokenize_batch_input(PROMPTS)
    expected = generate(model, ids, masks, 0.0, 6)
    for other in ((ids.int(), masks), (ids, masks.bool()), (ids.short(), masks.int()),
                  (ids.to(torch.uint16), masks.to(torch.uint8))):
        for got, tensor in zip(generate(model, *other, 0.0, 6), expected, strict=True):
            assert torch.equal(got, tensor) and got.dtype == torch.int64


def test_non_finite_logits_are_refused(tiny_model):
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight[0] = float("nan")
    message = user_error(generate, tiny_model, *tokenize_batch_input(["a"]), 1.0, 3)
    assert "not finite" in message


def test_top_k_of_0_or_above_the_vocabulary_keeps_all(tiny_model):
    expected = generate_alone(tiny_model, "a", 8, temperature=1.0)
    for top_k in (0, 50257, 10**12):
        assert generate_alone(tiny_model, "a", 8, temperature=1.0, top_k=top_k) == expected
    greedy = generate_alone(tiny_model, "a", 8)
    assert generate_alone(tiny_model, "a", 8, temperature=1.0, top_k=1) == greedy


def test_summed_logprobs_are_the_summed_loss(tiny_model):
    ids, masks = tokenize_batch_input(PROMPTS)
    with torch.no_grad():
        logits, _ = tiny_model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.where(
            masks.bool(), ids, -100)[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        assert -logprobs(tiny_model, ids, masks).sum().item() == pytest.approx(loss.item(),
                                                                              rel=1e-5)
