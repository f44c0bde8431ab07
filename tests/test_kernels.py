"""Packed weights against plain layers."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from helpers.common import ROOT, user_error
from helpers.generation import PROMPTS, SAMPLING_OPTIONS, rows_of, run_generate, sharp_model

from inference import generate, logprobs, tokenize_batch_input
from minigpt2 import kernels
from minigpt2.kernels import Int8Linear, PackedLinear, can_pack, prepare_to_sample
from minigpt2.tokenizer import N_VOCAB
from model import GPT, GPTConfig

needs_int8 = pytest.mark.skipif(not can_pack(torch.int8), reason="the CPU has no exact int8")
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


def plain_and_prepared(dtype: torch.dtype) -> tuple[GPT, GPT, torch.Tensor]:
    """A model, a copy prepared to sample in `dtype`, and ids (2, 20) for both."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=64)).eval()
    return plain, prepare_to_sample(copy.deepcopy(plain), dtype), torch.randint(0, 50257, (2, 20))


@needs_bfloat16
def test_bfloat16_is_used_in_the_blocks_only():
    plain, model, ids = plain_and_prepared(torch.bfloat16)
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
    assert "no float16 sampling" in user_error(prepare_to_sample, sharp_model(), torch.float16)


@needs_int8
def test_int8_linear_is_the_product_of_quantized_weights_and_rows():
    """Exactly: the sums are those of integers; the scales are of each output and each row."""
    torch.manual_seed(0)
    for inputs, outputs, bias in ((768, 2304, True), (33, 77, True), (64, 999, False)):
        linear = nn.Linear(inputs, outputs, bias=bias)
        x = torch.randn(5, 1, inputs) * torch.tensor([1e-4, 1, 1, 0, 1e4])[:, None, None]
        weight, rows = linear.weight.detach(), x[:, 0]
        scales = [matrix.abs().amax(1, keepdim=True) / 127 for matrix in (weight, rows)]
        w, r = ((matrix / scale.clamp(min=1e-30)).round().double()
                for matrix, scale in zip((weight, rows), scales, strict=True))
        exact = (r @ w.T) * scales[1] * scales[0].T + (linear.bias.detach() if bias else 0)
        got = Int8Linear(linear)(x)
        assert got.shape == (5, 1, outputs) and got.dtype == torch.float32
        torch.testing.assert_close(got[:, 0].double(), exact.double(), rtol=1e-5, atol=1e-5)
        error = (got - linear(x)).norm(dim=-1) / linear(x).norm(dim=-1).clamp(min=1e-9)
        assert error[1:3].max() < 0.02  # of a row of ordinary size


@needs_int8
@pytest.mark.parametrize("isa", ["ALL", "AVX512_CORE_VNNI"])
def test_int8_products_have_a_fast_kernel(isa):
    """Not oneDNN's reference, a thousand times slower, which is all there is without AMX for
    products of signed inputs. "AVX512_CORE_VNNI" hides AMX."""
    code = ("import torch; from minigpt2.kernels import Int8Linear; "
            "Int8Linear(torch.nn.Linear(64, 128))(torch.ones(3, 64))")
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True, env={
        **os.environ, "ONEDNN_VERBOSE": "1", "ONEDNN_MAX_CPU_ISA": isa}, capture_output=True).stdout
    products = [line for line in lines.splitlines() if ",exec," in line and "3x64:64x128" in line]
    assert products and not any("ref" in line for line in products), products


@needs_int8
def test_an_int8_row_does_not_depend_on_the_batch():
    """Its products are equal bit by bit, whatever the number of rows: integers add up exactly."""
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(768, 3072)), torch.randn(40, 768)
    for count in (1, 3, 17, 40):
        assert torch.equal(layer(x[:count]), layer(x)[:count])


@needs_int8
@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_an_int8_model_samples_batch_invariantly_and_scores_what_it_samples(options):
    model = prepare_to_sample(sharp_model(GPTConfig(64, N_VOCAB + 47, 2, 2, 32)), torch.int8)
    assert prepare_to_sample(model, torch.int8) is model
    rows = rows_of(*run_generate(model, *tokenize_batch_input(PROMPTS), 12, **options))
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = run_generate(model, *tokenize_batch_input([prompt]), 12, **options)
        assert rows_of(*alone) == [row]
    ids, masks = tokenize_batch_input(PROMPTS)
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    assert logits.shape[-1] == N_VOCAB
    expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs(model, ids, masks), expected * masks[:, 1:])
    torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:], return_logits=False)[1], loss)


@needs_int8
def test_int8_is_close_to_float32():
    plain, model, ids = plain_and_prepared(torch.int8)
    with torch.no_grad():
        error = (model(ids)[0] - plain(ids)[0]).norm() / plain(ids)[0].norm()
    assert 1e-4 < error < 0.02
    with pytest.raises(ValueError, match="already prepared in torch"):
        prepare_to_sample(model)


def test_int8_where_products_overflow_or_on_a_gpu_is_refused(monkeypatch):
    """As on a processor that adds pairs of products in 16 bits."""
    exact = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: exact(self, x) - 1)
    assert "no int8 sampling on this cpu" in user_error(
        prepare_to_sample, sharp_model(), torch.int8)
    model = GPT(GPTConfig(8, 64, 1, 1, 8)).to("meta")
    assert "no int8 sampling on this meta" in user_error(
        prepare_to_sample, model, torch.int8)
