"""What only a GPU can show. Skipped without one."""

import dataclasses

import pytest
import torch
from conftest import CPU_LAUNCH, TINY
from test_sampling import PROMPTS, sharp_model
from test_trainer import losses, tiny

from distributed import Launch
from sampling import generate, tokenize_batch_input
from trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def gpu_launch() -> Launch:
    return dataclasses.replace(CPU_LAUNCH, device=torch.device("cuda", 0))


@pytest.mark.parametrize("changes, tolerance", [
    ({"dtype": "float32", "compile": False}, 1e-3), ({"dtype": "float32", "compile": True}, 1e-3),
    ({"dtype": "bfloat16", "compile": False}, 0.05), ({"dtype": "bfloat16", "compile": True}, 0.05),
    ({"dtype": "float16", "compile": False}, 0.05), ({"dtype": "float16", "compile": True}, 0.05)])
def test_ten_updates_are_those_of_the_cpu(corpus, tmp_path, changes, tolerance):
    train(tiny(corpus, tmp_path / "cpu"), CPU_LAUNCH)
    train(tiny(corpus, tmp_path / "gpu", device="cuda", **changes), gpu_launch())
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), abs=tolerance)


def test_the_training_loss_needs_no_fp32_copy_of_all_logits():
    torch.manual_seed(0)
    model = sharp_model(TINY).cuda().train()
    idx = torch.randint(0, 50257, (512, 32), device="cuda")  # 16,384 rows: 3.3 GB of fp32 logits
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        _, loss = model(idx, idx, return_logits=False)
    loss.backward()
    assert torch.cuda.max_memory_allocated() < 2.5e9


def test_greedy_text_is_that_of_the_cpu():
    model = sharp_model()
    expected = generate(model, *tokenize_batch_input(PROMPTS), 0.0, 12)
    got = generate(model.cuda(), *tokenize_batch_input(PROMPTS), 0.0, 12)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
