"""Tests that need a GPU; skipped without one."""

import copy
import dataclasses

import pytest
import torch
from helpers.common import CPU_LAUNCH, TINY
from helpers.generation import (
    LONG,
    PROMPTS,
    SAMPLING_OPTIONS,
    random_batch,
    rows_of,
    run_generate,
    sharp_model,
)
from helpers.training import losses, tiny

import inference
from inference import generate, logprobs, tokenize_batch_input
from minigpt2.distributed import Launch
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import IGNORE_INDEX
from trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def gpu_launch() -> Launch:
    return dataclasses.replace(CPU_LAUNCH, device=torch.device("cuda", 0))


@pytest.mark.parametrize("changes, tolerance", [
    ({"dtype": "float32", "compile": False}, 1e-3), ({"dtype": "float32", "compile": True}, 1e-3),
    ({"dtype": "bfloat16", "compile": False}, 0.05), ({"dtype": "bfloat16", "compile": True}, 0.05),
    ({"dtype": "float16", "compile": False}, 0.05), ({"dtype": "float16", "compile": True}, 0.05)])
def test_ten_steps_match_the_cpu(corpus, tmp_path, changes, tolerance):
    train(tiny(corpus, tmp_path / "cpu"), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "gpu", device="cuda", **changes), gpu_launch())
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), abs=tolerance)


def test_the_training_loss_does_not_hold_all_logits_in_float32():
    torch.manual_seed(0)
    model = sharp_model(TINY).cuda().train()
    idx = torch.randint(0, 50257, (512, 32), device="cuda")  # 16,384 rows: 3.3 GB of fp32 logits
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        _, loss = model(idx, idx, return_logits=False)
    loss.backward()
    assert torch.cuda.max_memory_allocated() < 2.5e9


def test_the_eager_loss_matches_the_cpu_and_never_waits():
    """With ignored targets, in training and validation."""
    torch.manual_seed(0)
    model = sharp_model(TINY)
    on_gpu, idx = copy.deepcopy(model).cuda(), torch.randint(0, 50257, (4, 32))
    targets = idx.where(torch.rand(4, 32) < 0.5, IGNORE_INDEX)
    _, expected = model(idx, targets, reduction="sum", return_logits=False)
    batch = idx.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, loss = on_gpu(*batch, reduction="sum", return_logits=False)
        loss.backward()
        with torch.no_grad():
            _, validated = on_gpu(*batch, reduction="sum", return_logits=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert validated.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("device", range(max(torch.cuda.device_count(), 1)))
@pytest.mark.parametrize("max_steps", [12, 150])
@pytest.mark.parametrize("options", SAMPLING_OPTIONS, ids=str)
def test_generated_tokens_match_the_cpu(options, max_steps, device, monkeypatch):
    """Without and with graphs, over several spans of the cache, with rows that finish early."""
    model = sharp_model(LONG, seed=1)
    ids, masks = random_batch([3, 100, 40, 200], seed=5)
    full = rows_of(*run_generate(model, ids, masks, 150, **options))
    monkeypatch.setattr(inference, "EOT_TOKEN", full[3][200 + 20])
    batch = torch.cat([ids, ids[[3] * 5]]), torch.cat([masks, masks[[3] * 5]])
    on_gpu = copy.deepcopy(model).to(f"cuda:{device}")
    reported, options = [], options | {"seed": [0] * 9}
    expected = rows_of(*run_generate(model, *batch, max_steps, **options))
    got = run_generate(on_gpu, *batch, max_steps, **options,
                       on_tokens=lambda row, tokens: reported.append((row, tokens)))
    assert rows_of(*(tensor.cpu() for tensor in got)) == expected
    for row, length in enumerate(batch[1].sum(1).tolist()):
        assert sum((tokens for r, tokens in reported if r == row), []) == expected[row][length:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_prepared_model_has_float32_logits_close_to_the_cpu(dtype):
    model = sharp_model(LONG, seed=1)
    ids, masks = random_batch([3, 100, 40], seed=5)
    with torch.no_grad():
        expected = logprobs(model, ids, masks)
        prepared = prepare_to_sample(copy.deepcopy(model).cuda(), dtype)
        assert prepared(ids.cuda())[0].dtype == torch.float32
        got = logprobs(prepared, ids, masks).cpu()
    assert (got - expected).abs().mean() < (1e-4 if dtype == torch.float32 else 0.5)
    output, _ = generate(prepared, ids, masks, 1.0, 150)
    assert output.max() < 50257


def test_sampling_while_deterministic_algorithms_are_required():
    torch.use_deterministic_algorithms(True)
    try:
        model = sharp_model().cuda()
        generate(model, *tokenize_batch_input(PROMPTS), 1.0, 12, top_p=0.9)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
