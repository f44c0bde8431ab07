from collections import Counter

import pytest
import torch
from conftest import TINY, user_error

from model import GPT, GPTConfig
from sampling import decode_generation, generate, sample, tokenize_batch_input
from tokenizer import EOT_TOKEN, encode

PROMPTS = ["The quick brown fox", "Hello", "It was the best of times, it was the worst of times"]


def sharp_model(config: GPTConfig = TINY, seed: int = 0) -> GPT:
    """Weights large enough that the likeliest token leads by far more than rounding."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(20)
    return model


def alone(model, prompt: str, temperature: float, max_steps: int, seed: int = 0) -> list[int]:
    output, masks = generate(model, *tokenize_batch_input([prompt]), temperature, max_steps,
                             seed=seed)
    return output[0][masks[0].bool()].tolist()


def rows_of(output, masks) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(output, masks, strict=True)]


def test_prompts_are_right_padded_with_0():
    input_ids, masks = tokenize_batch_input(PROMPTS)
    lengths = [len(encode(prompt)) for prompt in PROMPTS]
    assert input_ids.shape == masks.shape == (3, max(lengths)) and input_ids.dtype == torch.int64
    for ids, mask, length, prompt in zip(input_ids, masks, lengths, PROMPTS, strict=True):
        assert ids.tolist() == encode(prompt) + [0] * (max(lengths) - length)
        assert mask.tolist() == [1] * length + [0] * (max(lengths) - length)


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


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_is_the_same_alone_and_in_any_batch(temperature):
    model = sharp_model()
    expected = [alone(model, prompt, temperature, 12) for prompt in PROMPTS]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        batch = tokenize_batch_input([PROMPTS[i] for i in order])
        assert rows_of(*generate(model, *batch, temperature, 12)) == [expected[i] for i in order]


def test_the_ids_in_padded_places_do_not_matter():
    model = sharp_model()
    input_ids, masks = tokenize_batch_input(PROMPTS)
    expected = rows_of(*generate(model, input_ids, masks, 0.0, 12))
    for pad in (EOT_TOKEN, 11):
        padded = torch.where(masks.bool(), input_ids, pad)
        assert rows_of(*generate(model, padded, masks, 0.0, 12)) == expected
    wider = torch.cat([masks, torch.zeros(3, 4, dtype=torch.long)], 1)  # columns of padding only
    ids = torch.cat([input_ids, torch.full((3, 4), 7)], 1)
    assert rows_of(*generate(model, ids, wider, 0.0, 12)) == expected


def test_greedy_is_the_argmax_of_full_forwards():
    """Against a run without cache, batch or padding: one whole forward per token."""
    model = sharp_model()
    for prompt in PROMPTS:
        ids = encode(prompt)
        for _ in range(12):
            with torch.no_grad():
                top = model(torch.tensor([ids]))[0][0, -1].topk(2)
            assert top.values[0] - top.values[1] > 1e-3
            ids.append(int(top.indices[0]))
        assert alone(model, prompt, 0.0, 12) == ids


def test_greedy_is_hugging_faces(tmp_path):
    from transformers import GPT2LMHeadModel

    from checkpoint import save_checkpoint
    model = sharp_model()
    theirs = GPT2LMHeadModel.from_pretrained(save_checkpoint(tmp_path, 0, model)).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([encode(prompt)])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12, pad_token_id=EOT_TOKEN)
        assert alone(model, prompt, 0.0, 12) == expected[0].tolist()


def test_seeds():
    model = sharp_model()
    first = alone(model, PROMPTS[0], 1.0, 12, seed=1)
    assert alone(model, PROMPTS[0], 1.0, 12, seed=1) == first
    assert alone(model, PROMPTS[0], 1.0, 12, seed=2) != first
    assert alone(model, PROMPTS[0], 1.0, 4, seed=1) == first[: len(encode(PROMPTS[0])) + 4]
    state = torch.get_rng_state()
    twice = rows_of(*generate(model, *tokenize_batch_input([PROMPTS[0]] * 2), 1.0, 12, seed=1))
    assert twice[0] == first and twice[1] != first  # the same prompt twice: two samples
    assert torch.equal(torch.get_rng_state(), state)


class Scripted(GPT):
    """Emits a fixed sequence of tokens per row, whatever it reads."""

    def __init__(self, script: list[list[int]], config: GPTConfig = TINY):
        super().__init__(config)
        self.script, self.calls = torch.tensor(script), 0
        self.lm_head = Head(self, self.lm_head.weight)


class Head(torch.nn.Module):
    def __init__(self, model: Scripted, weight: torch.nn.Parameter):
        super().__init__()
        self.owner, self.weight = [model], weight

    def forward(self, x):
        model = self.owner[0]
        wanted = model.script[:, model.calls]
        model.calls += 1
        logits = torch.zeros(len(wanted), model.config.vocab_size)
        return logits.scatter(1, wanted[:, None], 100.0)


def test_rows_stop_at_end_of_text_each_on_its_own():
    model = Scripted([[5, EOT_TOKEN, 6, 6, 6, 6], [7, 8, 9, EOT_TOKEN, 6, 6], [EOT_TOKEN] * 6])
    input_ids, masks = tokenize_batch_input(["a", "b c", "d"])
    output, output_masks = generate(model, input_ids, masks, 1.0, 6)
    new = [row[int(mask.sum()) :] for row, mask in zip(rows_of(output, output_masks), masks,
                                                       strict=True)]
    assert new == [[5, EOT_TOKEN], [7, 8, 9, EOT_TOKEN], [EOT_TOKEN]]
    assert model.calls == 4  # nobody waits for max_steps
    answers = decode_generation(output, output_masks, prompt_masks=masks)
    assert answers == ["&", "()*", ""]
    assert decode_generation(output, output_masks) == ["a&", "b c()*", "d"]


def test_max_steps_and_the_context_end_a_row():
    model = Scripted([[5] * 40, [6] * 40])
    batch = tokenize_batch_input(["a", " b" * 29])
    output, masks = generate(model, *batch, 0.0, 3)
    assert masks.sum(1).tolist() == [4, 32]  # the second row is full: 32 is the context
    assert model.calls == 3
    model = Scripted([[5] * 40, [6] * 40])
    output, masks = generate(model, *batch, 0.0, 1000)
    assert masks.sum(1).tolist() == [32, 32] and output.shape == (2, 32)
    output, masks = generate(model, *batch, 0.0, 0)
    assert torch.equal(output, batch[0]) and torch.equal(masks, batch[1])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e-30, 1e30])
def test_any_temperature_gives_real_tokens(temperature):
    logits = torch.randn(4, 50304, generator=torch.Generator().manual_seed(0)) * 30
    logits[:, 50257:] = 1e4  # a padded vocabulary whose padding is likeliest of all
    for uniform in (0.0, 0.5, 1 - 2**-24, 1.0):
        token = sample(logits, temperature, torch.full((4,), uniform))
        assert token.shape == (4,) and token.min() >= 0 and token.max() < 50257
        if temperature in (0.0, 1e-30):
            assert torch.equal(token, logits[:, :50257].argmax(-1))


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((1, 6), -torch.inf)
    logits[0, [1, 3]] = 0.0
    for uniform, token in [(0.0, 1), (0.49, 1), (0.51, 3), (1 - 2**-24, 3), (1.0, 3)]:
        assert sample(logits, 1.0, torch.tensor([uniform])).item() == token


def test_samples_follow_the_softmax():
    """Chi-square over 6 tokens: 5 degrees of freedom, 20.5 is passed once in a thousand times."""
    torch.manual_seed(0)
    logits, n = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5]), 20_000
    drawn = sample(logits.expand(n, 6), 0.8, torch.rand(n))
    expected = (logits / 0.8).softmax(0) * n
    counts = Counter(drawn.tolist())
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(6))
    assert chi_square < 20.5


def test_generated_tokens_follow_the_softmax():
    """The streams of many rows together: one prompt, many draws of its next token."""
    config = GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    model = sharp_model(config, seed=3)
    with torch.no_grad():
        model.lm_head.weight[5:].zero_()
        model.lm_head.weight[:5].normal_(std=4)
        probs = model(torch.tensor([[15496]]))[0][0, -1].softmax(0)
    batch = torch.full((4000, 1), 15496)
    output, _ = generate(model, batch, torch.ones_like(batch), 1.0, 1)
    counts = torch.bincount(output[:, 1].clamp(max=5), minlength=6)
    expected = torch.cat([probs[:5], probs[5:].sum()[None]]) * 4000
    kept = expected > 5
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 20.5


# ------------------------------------------------------------------------------- bad input


def test_bad_prompts_and_settings():
    model = sharp_model()
    assert "no prompt" in user_error(tokenize_batch_input, [])
    assert "prompt 2 of 3 is empty" in user_error(tokenize_batch_input, ["a", "", "b"])
    batch = tokenize_batch_input(["a", " b" * 32])
    message = user_error(generate, model, *batch, 1.0, 5)
    assert "prompt 2 of 2 has 32 tokens" in message and "context is 32" in message
    ids, masks = tokenize_batch_input(["a b c", "d"])
    assert "temperature" in user_error(generate, model, ids, masks, -0.1, 5)
    assert "temperature" in user_error(generate, model, ids, masks, float("nan"), 5)
    assert "max_steps" in user_error(generate, model, ids, masks, 1.0, -1)
    assert "(2, 2)" in user_error(generate, model, ids, masks[:, :2], 1.0, 5)
    left_padded = masks.flip(1)
    assert "ones" in user_error(generate, model, ids, left_padded, 1.0, 5)
    assert "ones" in user_error(generate, model, ids, torch.zeros_like(masks), 1.0, 5)


def test_a_model_that_diverged_is_refused(tiny_model):
    with torch.no_grad():
        tiny_model.transformer.ln_f.weight[0] = float("nan")
    message = user_error(generate, tiny_model, *tokenize_batch_input(["a"]), 1.0, 3)
    assert "not finite" in message


def test_more_steps_than_the_context_holds_are_no_burden(tiny_model):
    ids, masks = tokenize_batch_input(["a b c", "a"])
    output = generate(tiny_model, ids, masks, 1.0, 10**17)[0]
    assert output.size(1) == TINY.block_size
    assert torch.equal(output, generate(tiny_model, ids, masks, 1.0, 40)[0])
