import math

import pytest
import torch
import torch.nn.functional as F
from helpers.common import TINY
from helpers.memory import saved_bytes

from inference import KVCache
from minigpt2.loss import IGNORE_INDEX, LinearCrossEntropy
from model import GPT, PRESETS, GPTConfig

SMALL = GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


def small_model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SMALL)


def random_batch(batch: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL.vocab_size, (batch, 13), generator=generator)
    return tokens[:, :-1], tokens[:, 1:].clone()


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def assert_same_gradients(got, expected, tolerance=1e-6):
    for name, grad in expected.items():
        scale = grad.abs().max().clamp(min=1e-8)
        assert (got[name] - grad).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("preset, count", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080),
    ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts_match_openai(preset, count):
    with torch.device("meta"):
        assert GPT(PRESETS[preset]).num_parameters() == count


def test_defaults_match_the_paper():
    assert GPTConfig() == GPTConfig(1024, 50257, 12, 12, 768)


@pytest.mark.parametrize("field, value", [("n_head", 5), ("n_layer", 0), ("block_size", 1.5)])
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        GPTConfig(**{"n_embd": 64, field: value})


def test_initialization_std_of_every_kind_of_parameter():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=8, n_head=4, n_embd=256))
    scaled = 0.02 / math.sqrt(2 * 8)  # the earlier repo computed this, then used 0.02
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif p.dim() == 1:
            assert p.eq(1).all(), name
        else:
            expected = scaled if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.05, name
            assert abs(p.mean().item()) < 0.05 * expected, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_loss_is_that_of_a_uniform_guess():
    model = small_model()
    _, loss = model(*random_batch(8))
    assert abs(loss.item() - math.log(SMALL.vocab_size)) < 0.1


def test_logits_and_loss_shapes():
    model = small_model()
    inputs, targets = random_batch(3)
    logits, loss = model(inputs, targets)
    assert logits.shape == (3, 12, SMALL.vocab_size) and loss.shape == ()
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.allclose(loss, expected, atol=1e-6)
    logits, loss = model(inputs)
    assert logits.shape == (3, 12, SMALL.vocab_size) and loss is None


def test_no_token_sees_a_later_one():
    model = small_model()
    inputs, _ = random_batch(2)
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SMALL.vocab_size
    before, after = model(inputs)[0], model(changed)[0]
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def test_sequence_past_block_size_is_refused():
    with pytest.raises(ValueError, match="25 tokens, block_size is 24"):
        small_model()(torch.zeros(1, 25, dtype=torch.long))


def weighted(loss: torch.Tensor) -> torch.Tensor:
    """A loss (), or losses (B, T) each with another factor, as one number."""
    return (loss * torch.linspace(-1, 2, loss.numel()).view(loss.shape)).sum()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("device", ["CPU", "GPU"])  # how it is computed there
@pytest.mark.parametrize("rows, softmax_rows", [(1, 16), (5, 2), (512, 16), (512, 1)])
def test_chunked_loss_equals_the_plain_loss(reduction, rows, softmax_rows, device, monkeypatch):
    monkeypatch.setattr("minigpt2.loss.on_cpu", lambda _: device == "CPU")
    monkeypatch.setattr(f"minigpt2.loss.LOSS_ROWS_{device}", rows)
    monkeypatch.setattr(f"minigpt2.loss.SOFTMAX_ROWS_{device}", softmax_rows)
    model = small_model()
    inputs, targets = random_batch(4)
    targets[0] = IGNORE_INDEX
    targets[2, ::3] = IGNORE_INDEX
    _, plain = model(inputs, targets, reduction=reduction)
    weighted(plain).backward()
    expected = gradients(model)
    logits, loss = model(inputs, targets, reduction=reduction, return_logits=False)
    weighted(loss).backward()
    assert logits is None and loss.shape == plain.shape
    assert torch.allclose(loss, plain, rtol=1e-6, atol=1e-6 if reduction == "none" else 0)
    assert_same_gradients(gradients(model), expected, 1e-5)
    with torch.no_grad():  # evaluation computes no gradients, and the same loss
        _, again = model(inputs, targets, reduction=reduction, return_logits=False)
    assert torch.allclose(again, plain, rtol=1e-6, atol=1e-6 if reduction == "none" else 0)
    assert reduction != "none" or torch.equal(again, loss)  # a DPO reference is the policy at first


@pytest.mark.parametrize("vocab_size", [11, 128, 131])  # padded to 128, 128 and 256
@pytest.mark.parametrize("scale", [1.0, 1e3])  # of probabilities that are 0 and 1 in float32, too
def test_a_padded_head_gives_the_same_loss(vocab_size, scale):
    torch.manual_seed(0)
    x = (scale * torch.randn(6, 8)).requires_grad_()
    weight = torch.randn(vocab_size, 8, requires_grad=True)
    targets = torch.randint(0, vocab_size, (6,))
    expected = F.cross_entropy(x @ weight.t(), targets, reduction="sum")
    expected.backward()
    wanted = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    loss = LinearCrossEntropy.apply(x, weight, targets, True)
    loss.backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert torch.allclose(x.grad, wanted[0], atol=1e-5)
    assert torch.allclose(weight.grad, wanted[1], atol=1e-5 * scale)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_batch_without_targets_has_loss_0_and_finite_gradients(on_cpu, monkeypatch):
    monkeypatch.setattr("minigpt2.loss.on_cpu", lambda _: on_cpu)
    model = small_model()
    inputs, targets = random_batch(2)
    targets[:] = IGNORE_INDEX
    for return_logits in (True, False):
        _, loss = model(inputs, targets, return_logits=return_logits)
        loss.backward()
        assert loss.item() == 0
        assert all(grad.eq(0).all() for grad in gradients(model).values())


@pytest.mark.parametrize("splits", [[16], [8, 8], [3, 13], [1] * 16])
def test_any_split_of_a_global_batch_gives_the_same_gradient(splits):
    """Summed losses over the number of valid targets of all rows, never a mean of means."""
    model = small_model()
    inputs, targets = random_batch(16)
    for row in range(16):
        targets[row, : row % 11] = IGNORE_INDEX  # rows with very different numbers of targets
    count = (targets != IGNORE_INDEX).sum()
    (model(inputs, targets)[1]).backward()
    expected = gradients(model)
    for rows, row_targets in zip(inputs.split(splits), targets.split(splits), strict=True):
        _, loss = model(rows, row_targets, reduction="sum", return_logits=False)
        (loss / count).backward()
    assert_same_gradients(gradients(model), expected, 1e-5)


def test_bf16_autocast_stays_close_to_fp32():
    model = small_model()
    inputs, targets = random_batch(4)
    _, exact = model(inputs, targets)
    exact.backward()
    expected = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        _, loss = model(inputs, targets, return_logits=False)
    loss.backward()
    got = gradients(model)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02
    for name, grad in expected.items():
        assert got[name].dtype == torch.float32
        assert F.cosine_similarity(got[name].flatten(), grad.flatten(), dim=0) > 0.99, name


def test_cached_decoding_equals_a_full_forward_pass():
    model = small_model().eval()
    lengths = torch.tensor([3, 9, 6])
    full, _ = random_batch(3)  # (3, 12)
    cache = KVCache(SMALL, 3, 12, "cpu", torch.float32)
    prompt = full[:, :9].clone()
    prompt[torch.arange(9) >= lengths[:, None]] = 77  # whatever a pad is, no real token sees it
    with torch.no_grad():
        expected = model(full)[0]
        hidden = model.hidden_states(prompt, cache)
        rows = torch.arange(3)
        got = model.lm_head(hidden[rows, lengths - 1])
        assert torch.allclose(got, expected[rows, lengths - 1], atol=1e-5)
        for step in range(3):  # each row continues over its own padding
            at = lengths + step
            hidden = model.hidden_states(full[rows, at][:, None], cache, at[:, None])
            assert torch.allclose(model.lm_head(hidden[:, 0]), expected[rows, at], atol=1e-5)


def test_a_compiled_step_equals_the_eager_one_and_evaluation_does_not_recompile():
    model = small_model()
    inputs, targets = random_batch(4)
    targets[1, :7] = IGNORE_INDEX
    model(inputs, targets)[1].backward()
    expected = gradients(model)
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    model.compile(backend=backend)
    assert "transformer.wte.weight" in model.state_dict()  # no _orig_mod prefix
    for _ in range(3):
        model(inputs, targets, return_logits=False)[1].backward()
        assert_same_gradients(gradients(model), expected, 1e-5)
        before = len(compilations)
        assert before > 0
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model(inputs[:, :5], targets[:, :5])
        assert len(compilations) == before


def test_log_probabilities_of_a_compiled_step_are_the_eager_ones():
    """Those that PPO compares with them are eager: logits rounded to bfloat16 would clip ratios."""
    model = small_model()
    with torch.no_grad():  # logits near -100, as GPT-2's are
        model.transformer.wte.weight[:, 0] = 1
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, -100
    inputs, targets = random_batch(4)

    def losses():
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs, targets, reduction="none", return_logits=False)[1]

    eager = losses()
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    assert torch.equal(losses(), eager)
    losses().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


@pytest.mark.parametrize("gradients", [False, True])
def test_float16_never_holds_all_logits(gradients, monkeypatch):
    """And its gradients are made where the loss scale is known, in the backward pass."""
    blocks, real = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **options: (
        blocks.append(len(a)), real(a, b, **options))[1])
    monkeypatch.setattr("minigpt2.loss.LOSS_ROWS_CPU", 16)
    model, scale = small_model(), 2.0**8
    inputs, targets = random_batch(4)
    with torch.autocast("cpu", torch.float16), torch.set_grad_enabled(gradients):
        loss = model(inputs, targets, reduction="sum", return_logits=False)[1]
    assert max(blocks) == 16 and loss.dtype == torch.float32
    expected = model(inputs, targets, reduction="sum")[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    if gradients:
        expected.backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        (loss * scale).backward()
        for name, p in model.named_parameters():
            assert (p.grad / scale - wanted[name]).norm() < 0.01 * wanted[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_activation_checkpointing_saves_memory_with_equal_gradients(backend, dtype):
    inputs, targets = random_batch(4)
    losses, found, saved = [], [], []
    for on in (False, True):
        model = small_model()
        assert not model.checkpoint_activations
        model.checkpoint_activations = on
        if backend:
            torch.compiler.reset()
            model.compile(backend=backend)

        def step(model=model):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return model(inputs, targets, return_logits=False)[1]

        saved.append(saved_bytes(model, step))
        loss = step()
        loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[0] == losses[1]
    assert_same_gradients(found[1], found[0], 1e-6)
    assert saved[1] < saved[0] / 2


def test_activation_checkpointing_is_off_in_decoding_and_evaluation(monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("checkpoint without gradients, or with a cache")

    model = small_model()
    model.checkpoint_activations = True
    inputs, _ = random_batch(2)
    monkeypatch.setattr("model.checkpoint", refused)
    with torch.no_grad():
        model(inputs)
    model.hidden_states(inputs, KVCache(SMALL, 2, 12, "cpu", torch.float32))
    with pytest.raises(AssertionError):
        model(inputs)


def test_tiny_config_matches_hugging_face():
    from transformers import GPT2Config, GPT2LMHeadModel

    reference = GPT2LMHeadModel(GPT2Config(
        n_positions=TINY.block_size, n_embd=TINY.n_embd, n_layer=TINY.n_layer, n_head=TINY.n_head))
    ours = {name for name, _ in GPT(TINY).named_parameters()}
    assert ours == {name for name, _ in reference.named_parameters()}
