"""Packed weights against plain layers."""

import copy

import pytest
import torch
import torch.nn as nn
from helpers.common import user_error
from helpers.generation import PROMPTS, SAMPLING_OPTIONS, rows_of, run_generate, sharp_model

from inference import generate, logprobs, tokenize_batch_input
from minigpt2 import kernels
from minigpt2.kernels import PackedLinear, can_pack, prepare_to_sample
from model import GPT, GPTConfig

needs_bfloat16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="the CPU has no bfloat16")


@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 2e-6), pytest.param(torch.bfloat16, 1e-2, marks=needs_bfloat16)])
@pytest.mark.skipif(not can_pack(), reason="PyTorch has no oneDNN")
def test_packed_linear_matches_linear(dtype, tolerance):
    """For any number of rows, odd sizes, with and without bias, to the precision of the dtype."""
    torch.manual_seed(0)
    for inputs, outputs, bias in ((768, 2304, True), (33, 77, True), (64, 50257, False)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        packed = PackedLinear(linear, dtype)
        for shape in ((1, inputs), (3, 1, inputs), (8, inputs), (2, 100, inputs)):
            x = torch.randn(shape)
            exact = copy.deepcopy(linear).double()(x.double())
            got = packed(x)
            assert got.dtype == dtype and got.shape == exact.shape
            assert (got - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_a_prepared_model_generates_the_same_tokens(options):
    model, batch = sharp_model(), tokenize_batch_input(PROMPTS)
    expected = rows_of(*run_generate(model, *batch, 12, **options))
    with torch.no_grad():
        scores = logprobs(model, *batch)
    assert prepare_to_sample(model) is model is prepare_to_sample(model)  # twice is fine
    assert rows_of(*run_generate(model, *batch, 12, **options)) == expected
    with torch.no_grad():
        torch.testing.assert_close(logprobs(model, *batch), scores, atol=1e-4, rtol=1e-5)


@needs_bfloat16
def test_bfloat16_is_used_in_the_blocks_only():
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64)).eval()
    model = prepare_to_sample(copy.deepcopy(plain), torch.bfloat16)
    ids = torch.randint(0, 50257, (2, 20))
    with torch.no_grad():
        logits, expected = model(ids)[0], plain(ids)[0]
    assert model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    assert logits.dtype == model.lm_head.weight.dtype == torch.float32
    assert 1e-5 < (logits - expected).norm() / expected.norm() < 1e-2
    output, _ = generate(model, ids, torch.ones_like(ids), 1.0, 8)
    assert output.shape == (2, 28)
    ones = torch.ones_like(ids)
    torch.testing.assert_close(logprobs(model, ids, ones), logprobs(plain, ids, ones).detach(),
                               atol=0.05, rtol=0)
    assert logprobs(model, ids[:, :1], ones[:, :1]).shape == (2, 0)


def test_a_model_is_prepared_once_from_any_dtype():
    batch = tokenize_batch_input(PROMPTS)
    model = prepare_to_sample(sharp_model().bfloat16())
    assert generate(model, *batch, 0.0, 3)[0].shape[0] == 3
    if can_pack(torch.bfloat16):
        with pytest.raises(ValueError, match="already prepared in torch"):
            prepare_to_sample(model, torch.bfloat16)


def test_a_prepared_model_cannot_be_trained():
    model = prepare_to_sample(sharp_model())
    ids = torch.randint(0, 50257, (2, 8))
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(ids, ids)[1].backward()


def test_without_onednn_the_layers_are_not_packed(monkeypatch):
    monkeypatch.setattr(kernels, "can_pack", lambda dtype=None: False)
    model = sharp_model()
    assert type(prepare_to_sample(model).lm_head) is nn.Linear
    assert "bfloat16" in user_error(prepare_to_sample, model, torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32


def test_an_unsupported_dtype_is_refused():
    assert "sampling in float16" in user_error(prepare_to_sample, sharp_model(), torch.float16)
