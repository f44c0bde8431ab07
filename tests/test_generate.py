import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY, user_error
from helpers.generation import LONG, PROMPTS, WAYS, ragged, rows_of, sample, sharp_model

import inference
from inference import (
    Continuation,
    decode_generation,
    finish_reasons,
    generate,
    logprobs,
    tokenize_batch_input,
)
from minigpt2.tokenizer import EOT_TEXT, EOT_TOKEN, N_VOCAB, encode
from model import GPT, GPTConfig


def alone(model, prompt: str, max_steps: int, **options) -> list[int]:
    return rows_of(*sample(model, *tokenize_batch_input([prompt]), max_steps, **options))[0]


def test_prompts_are_right_padded_with_0():
    input_ids, masks = tokenize_batch_input(PROMPTS)
    lengths = [len(encode(prompt)) for prompt in PROMPTS]
    assert input_ids.shape == masks.shape == (3, max(lengths)) and input_ids.dtype == torch.int64
    for ids, mask, length, prompt in zip(input_ids, masks, lengths, PROMPTS, strict=True):
        assert ids.tolist() == encode(prompt) + [0] * (max(lengths) - length)
        assert mask.tolist() == [1] * length + [0] * (max(lengths) - length)


def test_end_of_text_written_in_a_prompt_is_text():
    ids, masks = tokenize_batch_input([f"a{EOT_TEXT}"])
    assert EOT_TOKEN not in ids and masks.sum() == ids.size(1) == 8


def test_output_has_the_layout_of_the_input():
    input_ids, masks = tokenize_batch_input(PROMPTS)
    output, output_masks = generate(sharp_model(), input_ids, masks, 1.0, 9)
    assert output.shape == output_masks.shape and output.dtype == output_masks.dtype == torch.int64
    for i in range(3):
        length, prompt_length = int(output_masks[i].sum()), int(masks[i].sum())
        assert output_masks[i].tolist() == [1] * length + [0] * (output.size(1) - length)
        assert output[i, length:].eq(0).all()
        assert output[i, :prompt_length].tolist() == encode(PROMPTS[i])
        assert prompt_length < length <= prompt_length + 9
    assert output_masks[:, -1].any()  # no column of nothing but padding


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_row_is_the_same_alone_and_in_any_batch(way):
    model = sharp_model()
    expected = [alone(model, prompt, 12, **way) for prompt in PROMPTS]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        batch = tokenize_batch_input([PROMPTS[i] for i in order])
        assert rows_of(*sample(model, *batch, 12, **way)) == [expected[i] for i in order]


def random_cases() -> list[tuple[list[int], int]]:
    """(lengths of the prompts, max_steps): 1 to 16 rows of 1 to 1,023 tokens, the shortest and the
    longest among them."""
    chance = random.Random(6)
    cases = [([1], 40), ([1023], 5), ([1, 1023, 500, 1000], 30)]
    for rows in (2, 5, 11, 16):
        cases.append(([chance.randint(1, 1023) for _ in range(rows)], chance.randint(1, 12)))
    cases.append(([chance.randint(1, 40) for _ in range(16)], 60))
    return cases


@pytest.mark.parametrize("lengths, max_steps", random_cases(), ids=lambda x: str(x)[:24])
def test_random_batches_are_hugging_faces_and_our_own_without_batch_or_cache(lengths, max_steps):
    from transformers import GPT2Config, GPT2LMHeadModel

    from minigpt2.checkpoint import to_gpt2_layout
    model = sharp_model(LONG, seed=len(lengths))
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=1024, n_embd=16, n_layer=2, n_head=2)).eval()
    theirs.load_state_dict(to_gpt2_layout(model), strict=False)
    ids, masks = ragged(lengths, seed=max_steps)
    output, output_masks = generate(model, ids, masks, 0.0, max_steps)
    sampled = rows_of(*generate(model, ids, masks, 1.0, max_steps, top_p=0.95, seed=3))
    for i, length in enumerate(lengths):
        prompt = ids[i : i + 1, :length]
        ones = torch.ones_like(prompt)
        expected = theirs.generate(prompt, attention_mask=ones, do_sample=False, pad_token_id=0,
                                   max_new_tokens=min(max_steps, 1024 - length))[0].tolist()
        row = output[i][output_masks[i].bool()]
        assert row.tolist() == expected
        with torch.no_grad():  # the comparison means something: no ties within rounding
            top = model(row[None])[0][0, length - 1 : -1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4
        bare = generate(model, prompt, ones, 0.0, max_steps, use_cache=False)
        assert bare[0][0].tolist() == expected
        bare = generate(model, prompt, ones, 1.0, max_steps, top_p=0.95, seed=3, use_cache=False)
        assert bare[0][0].tolist() == sampled[i]


def test_the_ids_in_padded_places_do_not_matter():
    model = sharp_model()
    input_ids, masks = tokenize_batch_input(PROMPTS)
    expected = rows_of(*generate(model, input_ids, masks, 0.0, 12))
    for pad in (EOT_TOKEN, 11, -100, 2**40):
        padded = torch.where(masks.bool(), input_ids, pad)
        assert rows_of(*generate(model, padded, masks, 0.0, 12)) == expected
    wider = torch.cat([masks, torch.zeros(3, 4, dtype=torch.long)], 1)  # columns of padding only
    ids = torch.cat([input_ids, torch.full((3, 4), 7)], 1)
    assert rows_of(*generate(model, ids, wider, 0.0, 12)) == expected


@pytest.mark.parametrize("penalty", [0.8, 1.3, 3.0])
def test_a_repetition_penalty_is_hugging_faces(penalty, tmp_path):
    from transformers import GPT2LMHeadModel

    from minigpt2.checkpoint import save_checkpoint
    model = sharp_model()
    theirs = GPT2LMHeadModel.from_pretrained(save_checkpoint(tmp_path, 0, model)).eval()
    got = rows_of(*generate(model, *tokenize_batch_input(PROMPTS), 0.0, 12,
                            repetition_penalty=penalty))
    for prompt, row in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([encode(prompt)])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12, pad_token_id=EOT_TOKEN,
                                   repetition_penalty=penalty)
        assert row == expected[0].tolist()


def test_generated_tokens_follow_the_softmax():
    """The streams of many rows together: one prompt, many draws of its next token, chi-square over
    5 tokens and the rest."""
    config = GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    model = sharp_model(config, seed=3)
    with torch.no_grad():
        model.lm_head.weight[5:].zero_()
        model.lm_head.weight[:5].normal_(std=4)
        probs = model(torch.tensor([[15496]]))[0][0, -1].softmax(0)
    batch, counts = torch.full((500, 1), 15496), torch.zeros(6, dtype=torch.long)
    for seed in range(0, 4000, 500):
        output, _ = generate(model, batch, torch.ones_like(batch), 1.0, 1, seed=seed)
        counts += torch.bincount(output[:, 1].clamp(max=5), minlength=6)
    expected = torch.cat([probs[:5], probs[5:].sum()[None]]) * 4000
    kept = expected > 5
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5


def test_a_padded_vocabulary_is_not_sampled():
    """Ids that the tokenizer does not have, likeliest of all."""
    wide = sharp_model(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    model = sharp_model()
    with torch.no_grad():
        for ours, theirs in zip(wide.parameters(), model.parameters(), strict=True):
            ours[: len(theirs)] = theirs
        wide.transformer.wte.weight[50257:] = 50 * wide.transformer.wte.weight[:47].sign()
    batch = tokenize_batch_input(PROMPTS)
    with torch.no_grad():
        assert wide(batch[0])[0].argmax(-1).min() >= N_VOCAB
    for way in WAYS:
        assert rows_of(*sample(wide, *batch, 12, **way)) == rows_of(
            *sample(model, *batch, 12, **way))
    torch.testing.assert_close(logprobs(wide, *batch), logprobs(model, *batch))
    foreign = batch[0].clone()
    foreign[0, 0] = N_VOCAB  # the model has it, the tokenizer has not
    for call in (logprobs, lambda *batch: generate(*batch, 1.0, 3)):
        assert "50257" in user_error(call, wide, foreign, batch[1])


# ------------------------------------------------------------------------------- seeds


def test_seeds():
    model = sharp_model()
    first = alone(model, PROMPTS[0], 12, temperature=1.0, seed=1)
    second = alone(model, PROMPTS[0], 12, temperature=1.0, seed=2)
    assert alone(model, PROMPTS[0], 12, temperature=1.0, seed=1) == first != second
    assert alone(model, PROMPTS[0], 4, temperature=1.0, seed=1) == first[
        : len(encode(PROMPTS[0])) + 4]
    state = torch.get_rng_state()
    batch = tokenize_batch_input([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=1))
    assert [rows[0], rows[2]] == [first, second]  # given again: the next seed
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=[2, 0, 1]))
    assert [rows[0], rows[2]] == [second, first]
    for same in (np.int64(1), list(np.array([1, 1, 2])), (1, 1, 2)):
        rows = rows_of(*generate(model, *batch, 1.0, 12, seed=same))
        assert [rows[0], rows[2]] == [first, second]
    assert torch.equal(torch.get_rng_state(), state)
    rows = rows_of(*generate(model, *batch, 1.0, 12, seed=1 + 2**32))
    assert rows[0] not in (first, second)  # no bit of a seed is lost
    for seed in (-1, [1, 2], [1, 2, -3], [], 0.5, [0.5, 1, 2], "123", b"123", 2**64, None,
                 torch.tensor([1, 2, 3]), np.zeros((30, 30), int)):
        assert "seed" in user_error(generate, model, *batch, 1.0, 12, seed=seed)


def test_streams_differ_by_prompt_and_from_token_to_token(tiny_model):
    """With a model to which all tokens are the same, a row is its noise."""
    with torch.no_grad():
        tiny_model.transformer.wte.weight.zero_()
    ids = torch.tensor([[1], [2], [1]])
    rows = rows_of(*generate(tiny_model, ids, torch.ones_like(ids), 1.0, 30, seed=[0, 0, 1]))
    tokens = [token for row in rows for token in row[1:]]
    assert len(tokens) == 90 and len(set(tokens)) > 85


def test_without_a_cache_there_is_none(tiny_model, monkeypatch):
    monkeypatch.setattr(inference, "KVCache", None)
    batch = tokenize_batch_input(PROMPTS)
    assert generate(tiny_model, *batch, 1.0, 5, use_cache=False)[0].size(1) > batch[0].size(1)
    with pytest.raises(TypeError):
        generate(tiny_model, *batch, 1.0, 5)


def test_padding_is_not_seen(tiny_model):
    """A repetition penalty is for what the row has: with PAD_TOKEN's logit the only one."""
    batch = tokenize_batch_input(["a b c d e f", "a"])
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight.zero_()
        tiny_model.transformer.ln_f.bias.fill_(1.0)
        tiny_model.transformer.wte.weight.zero_()
        tiny_model.transformer.wte.weight[:2] = torch.tensor([[0.02], [0.015]])
    rows = rows_of(*generate(tiny_model, *batch, 0.0, 2, repetition_penalty=2.0))
    assert [row[-2:] for row in rows] == [[0, 1], [0, 1]]


# ------------------------------------------------------------------------------- ends of rows


class Chain(GPT):
    """Follows every token by the one that a table names, whatever came before; notes the number of
    rows of every pass."""

    def __init__(self, *rows: list[int], config: GPTConfig = TINY):
        super().__init__(config)
        self.lm_head, self.rows = Following(config.vocab_size, rows), []

    def hidden_states(self, idx, cache=None, positions=None):
        self.rows.append(len(idx))
        return idx[..., None]


class Following(torch.nn.Module):
    def __init__(self, vocab_size: int, rows: tuple[list[int], ...]):
        super().__init__()
        self.vocab_size = vocab_size
        self.table = {a: b for row in rows for a, b in zip(row, row[1:], strict=False)}

    def forward(self, x):
        wanted = torch.tensor([[self.table.get(int(token), int(token))] for token in x[:, 0]])
        return torch.zeros(len(x), self.vocab_size).scatter(1, wanted, 100.0)


def test_rows_stop_at_end_of_text_each_on_its_own():
    a, c, d = (encode(prompt)[-1] for prompt in ("a", "b c", "d"))
    model = Chain([a, 5, EOT_TOKEN], [c, 7, 8, 9, EOT_TOKEN], [d, EOT_TOKEN])
    input_ids, masks = tokenize_batch_input(["a", "b c", "d"])
    output, output_masks = generate(model, input_ids, masks, 1.0, 6)
    new = [row[int(mask.sum()) :] for row, mask in zip(rows_of(output, output_masks), masks,
                                                       strict=True)]
    assert new == [[5, EOT_TOKEN], [7, 8, 9, EOT_TOKEN], [EOT_TOKEN]]
    assert finish_reasons(output, output_masks, masks, 6) == ["stop"] * 3
    # nobody waits for max_steps, and once half of the rows have finished they cost nothing
    assert model.rows == [3, 3, 1, 1]
    answers = decode_generation(output, output_masks, prompt_masks=masks)
    assert answers == ["&", "()*", ""]
    assert decode_generation(output, output_masks) == ["a&", "b c()*", "d"]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_that_are_let_go_leave_the_others_as_they_were(way, monkeypatch):
    """Rows of unequal length that end at different times, of a real model with a real cache: with
    what a few of its tokens are called taken as the end."""
    model = sharp_model(LONG, seed=1)
    lengths = [3, 40, 9, 1, 25, 17]
    ids, masks = ragged(lengths, seed=2)
    free = [row[length:] for row, length in zip(rows_of(*sample(model, ids, masks, 30, **way)),
                                                lengths, strict=True)]
    monkeypatch.setattr(inference, "EOT_TOKEN", free[1][7])
    kept = []
    keep = Continuation.keep
    monkeypatch.setattr(Continuation, "keep", lambda self, rows: (
        keep(self, rows), kept.append(len(rows))))
    # most are one row, which ends early, again and again
    ids, masks = torch.cat([ids[[1] * 6], ids]), torch.cat([masks[[1] * 6], masks])
    new = [row[int(mask.sum()) :] for row, mask in zip(
        rows_of(*sample(model, ids, masks, 30, seed=[0] * 12, **way)), masks, strict=True)]
    cut = [row[: row.index(free[1][7]) + 1] if free[1][7] in row else row for row in free]
    assert new == [cut[1]] * 6 + cut and max(map(len, new)) == 30
    assert kept and kept[0] <= 6


def test_one_of_two_rows_goes_on_alone():
    a, b = (encode(prompt)[-1] for prompt in ("a", "b"))
    model = Chain([a, EOT_TOKEN], [b, 5, 6, EOT_TOKEN])
    generate(model, *tokenize_batch_input(["a", "b"]), 0.0, 9)
    assert model.rows == [2, 1, 1]


def test_max_steps_and_the_context_end_a_row():
    model = Chain()
    batch = tokenize_batch_input(["a", " b" * 29])
    output, masks = generate(model, *batch, 0.0, 3)
    assert masks.sum(1).tolist() == [4, 32]  # the second row is full: 32 is the context
    assert len(model.rows) == 3
    assert finish_reasons(output, masks, batch[1], 3) == ["length", "length"]  # nothing was cut
    output, masks = generate(model, *batch, 0.0, 4)
    assert masks.sum(1).tolist() == [5, 32]
    assert finish_reasons(output, masks, batch[1], 4) == ["length", "context"]
    output, masks = generate(model, *batch, 0.0, 1000)
    assert masks.sum(1).tolist() == [32, 32] and output.shape == (2, 32)
    assert finish_reasons(output, masks, batch[1], 1000) == ["context", "context"]
    output, masks = generate(model, *batch, 0.0, 0)
    assert torch.equal(output, batch[0]) and torch.equal(masks, batch[1])
    assert finish_reasons(output, masks, batch[1], 0) == ["length", "length"]


def test_more_steps_than_the_context_holds_are_no_burden(tiny_model):
    ids, masks = tokenize_batch_input(["a b c", "a"])
    output = generate(tiny_model, ids, masks, 1.0, 10**30)[0]
    assert output.size(1) == TINY.block_size
    assert torch.equal(output, generate(tiny_model, ids, masks, 1.0, 40)[0])


# ------------------------------------------------------------------------------- streaming


def test_tokens_are_told_as_they_come():
    a, c, d = (encode(prompt)[-1] for prompt in ("a", "b c", "d"))
    model = Chain([a, 5, EOT_TOKEN], [c, 7, 8, 9, EOT_TOKEN], [d, EOT_TOKEN])
    batch, told = tokenize_batch_input(["a", "b c", "d"]), []
    generate(model, *batch, 1.0, 6, on_tokens=lambda row, tokens: told.append((row, tokens)))
    assert told == [(0, [5]), (1, [7]), (2, [EOT_TOKEN]), (0, [EOT_TOKEN]), (1, [8]), (1, [9]),
                    (1, [EOT_TOKEN])]


def test_an_interrupt_ends_it_at_once(tiny_model):
    told = []

    def interrupt(row: int, tokens: list[int]) -> None:
        told.extend(tokens)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny_model, *tokenize_batch_input(["a"]), 1.0, 20, on_tokens=interrupt)
    assert told == alone(tiny_model, "a", 3, temperature=1.0)[1:]


# ------------------------------------------------------------------------------- as on a GPU


class Graphs:
    """A stand-in for CUDA's: takes a step down instead of making it, and repeats it on the tensors
    that it was taken down with, which must still be those in use."""

    def __init__(self, monkeypatch):
        self.spans, self.rows, self.replays, self.eager = [], [], 0, 0
        self.step, start = Continuation.step, Continuation.__init__
        graphs = self

        class Graph:
            def replay(self):
                assert places(self.continuation) == self.places
                graphs.step(self.continuation)
                graphs.replays += 1

        @contextmanager
        def graph(new, stream, capture_error_mode):
            def take_down(rows: Continuation) -> None:
                assert self.eager, "nothing was warmed up"
                new.continuation, new.places = rows, places(rows)
                self.spans.append(rows.cache.span)
                self.rows.append(len(rows.row))
                self.eager = 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Continuation, "step", take_down)
                yield

        def eagerly(rows: Continuation) -> None:
            self.eager += 1
            self.step(rows)

        def starting(rows: Continuation, *arguments) -> None:
            monkeypatch.setattr(Continuation, "span_of", lambda rows, length: -(-length // 128)
                                * 128)
            start(rows, *arguments)
            rows.on_gpu, rows.uses_graphs = True, arguments[4] >= inference.GRAPH_STEPS

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(Continuation, "step", eagerly)
        monkeypatch.setattr(Continuation, "__init__", starting)


def places(rows: Continuation) -> list:
    tensors = [rows.row, rows.lengths, rows.prompt_lengths, rows.keys, rows.ends, rows.finished,
               rows.finite, rows.logits, rows.output_ids, rows.cache.k, rows.cache.v,
               rows.cache.rows, *([] if rows.seen is None else [rows.seen])]
    return [rows.cache.span, *(tensor.data_ptr() for tensor in tensors)]


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_schedule_of_a_gpu_gives_the_same(way, ending, monkeypatch):
    """Graphs, replayed between looks 16 steps apart, of a cache whose span grows by 128; with rows
    that end, and are let go, on the way."""
    model = sharp_model(LONG, seed=1)
    lengths = [3, 100, 40, 200]
    ids, masks = ragged(lengths, seed=5)
    free = rows_of(*sample(model, ids, masks, 150, **way))
    if ending:
        monkeypatch.setattr(inference, "EOT_TOKEN", free[3][200 + 20])
        ids, masks = torch.cat([ids, ids[[3] * 5]]), torch.cat([masks, masks[[3] * 5]])
    told, options = [], way | {"seed": [0] * len(ids)}
    expected = rows_of(*sample(model, ids, masks, 150, **options))
    graphs = Graphs(monkeypatch)
    got = rows_of(*sample(model, ids, masks, 150, **options,
                          on_tokens=lambda row, tokens: told.append((row, tokens))))
    assert got == expected
    for row, length in enumerate(masks.sum(1).tolist()):
        assert sum((tokens for r, tokens in told if r == row), []) == expected[row][length:]
    assert max(len(tokens) for _, tokens in told) == 16
    assert graphs.spans[0] == 256 and set(graphs.spans) <= {256, 384, 128}
    assert graphs.replays > (5 if ending else 140)
    assert graphs.rows[0] == len(ids) and (len(set(graphs.rows)) > 1) == ending


def test_logits_that_were_not_finite_between_two_looks(monkeypatch):
    model = sharp_model(LONG, seed=1)
    batch = ragged([3, 10], seed=5)
    Graphs(monkeypatch)
    passes = []

    def poisoned(module, inputs, logits):
        passes.append(1)
        return logits * float("nan") if len(passes) == 5 else logits

    model.lm_head.register_forward_hook(poisoned)
    assert "not finite" in user_error(generate, model, *batch, 1.0, 100)


def test_few_tokens_are_worth_no_graph(monkeypatch):
    model = sharp_model(LONG, seed=1)
    batch = ragged([3, 10], seed=5)
    expected = rows_of(*generate(model, *batch, 1.0, 63))
    graphs = Graphs(monkeypatch)
    assert rows_of(*generate(model, *batch, 1.0, 63)) == expected and graphs.replays == 0
    assert len(rows_of(*generate(model, *batch, 1.0, 64))) == 2 and graphs.replays > 50


# ------------------------------------------------------------------------------- scoring


def test_logprobs_are_those_of_a_softmax_and_their_gradients(monkeypatch):
    monkeypatch.setattr(inference, "LOSS_ROWS_CPU", 5)  # several blocks
    model = sharp_model().train()
    ids, masks = ragged([9, 1, 14], seed=0)
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


def test_logprobs_depend_on_no_padding():
    model = sharp_model()
    ids, masks = ragged([9, 1, 14], seed=0)
    with torch.no_grad():
        scores = logprobs(model, ids, masks)
        for pad in (5, -100, 2**40):
            other = logprobs(model, torch.where(masks.bool(), ids, pad), masks)
            assert torch.equal(scores, other) and scores[1].eq(0).all()
        assert torch.equal(logprobs(model, ids.int(), masks.bool()), scores)
        assert logprobs(model, ids[:, :1], masks[:, :1]).shape == (3, 0)
        wide = logprobs(model, F.pad(ids, (0, 60), value=3), F.pad(masks, (0, 60)))
        assert torch.equal(wide, F.pad(scores, (0, 60)))  # columns of padding beyond the context
        row = logprobs(model, ids[:1, :9], masks[:1, :9])
    torch.testing.assert_close(scores[:1, :8], row)
    assert scores[0, 8:].eq(0).all()
    assert "ones" in user_error(logprobs, model, ids, masks.flip(1))


# ------------------------------------------------------------------------------- bad input


def test_bad_prompts_and_settings():
    model = sharp_model()
    assert "no prompt" in user_error(tokenize_batch_input, [])
    assert "prompt 2 of 3 is empty" in user_error(tokenize_batch_input, ["a", "", "b"])
    batch = tokenize_batch_input(["a", " b" * 32])
    message = user_error(generate, model, *batch, 1.0, 5)
    assert "prompt 2 of 2 has 32 tokens" in message and "context is 32" in message
    assert generate(model, *batch, 1.0, 0)[1].sum(1).tolist() == [1, 32]  # nothing to add
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
    assert "one text" in user_error(tokenize_batch_input, "abc")
    for wrong in (-1, 50257):
        foreign = ids.clone()
        foreign[0, 1] = wrong
        assert str(wrong) in user_error(generate, model, foreign, masks, 1.0, 5)


def test_other_integers_and_masks_are_taken_as_they_are_meant():
    model = sharp_model()
    ids, masks = tokenize_batch_input(PROMPTS)
    expected = generate(model, ids, masks, 0.0, 6)
    for other in ((ids.int(), masks), (ids, masks.bool()), (ids.short(), masks.int()),
                  (ids.to(torch.uint16), masks.to(torch.uint8))):
        for ours, theirs in zip(generate(model, *other, 0.0, 6), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == torch.int64


def test_a_model_that_diverged_is_refused(tiny_model):
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight[0] = float("nan")
    message = user_error(generate, tiny_model, *tokenize_batch_input(["a"]), 1.0, 3)
    assert "not finite" in message


def test_top_k_of_0_or_above_the_vocabulary_keeps_all(tiny_model):
    expected = alone(tiny_model, "a", 8, temperature=1.0)
    for top_k in (0, 50257, 10**12):
        assert alone(tiny_model, "a", 8, temperature=1.0, top_k=top_k) == expected
    assert alone(tiny_model, "a", 8, temperature=1.0, top_k=1) == alone(tiny_model, "a", 8)


def test_the_mean_of_what_is_left_out(tiny_model):
    """A loss that an evaluation could use: the summed log-probabilities are the summed loss."""
    ids, masks = tokenize_batch_input(PROMPTS)
    with torch.no_grad():
        logits, _ = tiny_model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.where(
            masks.bool(), ids, -100)[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        assert -logprobs(tiny_model, ids, masks).sum().item() == pytest.approx(loss.item(),
                                                                              rel=1e-5)
