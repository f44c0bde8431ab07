"""What runs on a GPU, run on fake CUDA tensors: on every machine, a tensor left on the CPU fails a
test, and so does a place where the host would wait for the GPU."""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers.common import CPU_LAUNCH, TINY
from helpers.fake_cuda import backward, fake_cuda
from helpers.generation import LONG, SAMPLING_OPTIONS
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorDeviceMismatchError

import inference
from dpo import DPOConfig, collate_pairs, figure_sums
from finetune import collate
from inference import DecodingBatch, KVCache
from minigpt2.benchmarks import score_batch
from minigpt2.distributed import autocast
from minigpt2.kernels import prepare_to_sample
from minigpt2.loss import IGNORE_INDEX
from minigpt2.optimizer import make_optimizer, set_lr
from minigpt2.preferences import Pair
from minigpt2.resume import CheckpointWriter
from minigpt2.sampling import SamplingParams
from model import GPT, GPTConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [[([1, 2, 3], [4, 5, 50256])], [([6], [50256])]]  # of fine-tuning


@pytest.fixture
def device(monkeypatch):
    with fake_cuda(monkeypatch) as device:
        yield device


def new_model(device: torch.device, config: GPTConfig = TINY) -> GPT:
    with device:
        return GPT(config)


def new_optimizer(model: GPT, muon: bool) -> torch.optim.Optimizer:
    return make_optimizer(model, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                          kind="muon" if muon else "adamw", muon_lr=1e-3)


def train_step(model: GPT, optimizer: torch.optim.Optimizer, dtype: torch.dtype, inputs, targets):
    """A step of trainer.py and finetune.py, up to where it reports to the host."""
    device = model.lm_head.weight.device
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    loss_sum = torch.zeros((), device=device)
    set_lr(optimizer, 1e-4)
    for _ in range(2):
        with autocast(device, dtype):
            _, loss = model(inputs, targets, reduction="sum", return_logits=False)
        loss = loss / 100
        backward(scaler.scale(loss))
        loss_sum += loss.detach()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss_sum, grad_norm


@pytest.mark.parametrize("dtype, recompute, muon", [
    (torch.float32, False, False), (torch.bfloat16, True, True), (torch.float16, False, False)])
def test_a_training_step_stays_on_the_gpu(device, dtype, recompute, muon):
    model = new_model(device)
    model.checkpoint_activations = recompute
    optimizer = new_optimizer(model, muon)
    inputs = torch.zeros(2, 32, dtype=torch.int64, device=device)
    loss, grad_norm = train_step(model, optimizer, dtype, inputs, inputs)
    assert loss.device == grad_norm.device == device and loss.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert {value.device for value in state if value.dim()} == {device}


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_loss_of_fine_tuning_does_not_wait_for_the_gpu(device, dtype):
    """Selecting the rows with a target would: the host has to know how many there are."""
    model = new_model(device)
    inputs, targets = (tensor.to(device) for tensor in collate(ROWS, 3, 16))
    loss, _ = train_step(model, new_optimizer(model, False), dtype, inputs, targets)
    assert loss.device == device
    with pytest.raises(DynamicOutputShapeException):  # this is how such a place fails
        inputs[targets != IGNORE_INDEX]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_pairs", [0, 2])  # of a rank without pairs, and of others
def test_the_loss_of_dpo_does_not_wait_for_the_gpu(device, dtype, num_pairs, monkeypatch):
    monkeypatch.setattr("dpo.to_device", torch.Tensor.to)  # pinned memory cannot be fake
    model = new_model(device)
    pairs = [Pair(str(i), "", "", [1] * i, [2] * i, [3, 4]) for i in (1, 2)][:num_pairs]
    inputs, targets = (tensor.to(device) for tensor in collate_pairs(pairs, 32, CPU_LAUNCH.device))
    with autocast(device, dtype):
        _, losses = model(inputs, targets, reduction="none", return_logits=False)
    logprobs = -losses.sum(1)[: 2 * num_pairs].view(-1, 2)
    figures = figure_sums(logprobs, pairs, {"1": [-1.0, -2.0], "2": [-1.0, -2.0]}, DPOConfig())
    backward(figures[0])
    assert figures.device == device and figures.dtype == torch.float32
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_validation_stays_on_the_gpu(device, dtype):
    idx = torch.zeros(2, 32, dtype=torch.int64, device=device)
    with autocast(device, dtype):
        _, loss = new_model(device)(idx, idx, reduction="sum", return_logits=False)
    assert (loss.device, loss.dtype) == (device, torch.float32)


@pytest.mark.parametrize("gradients", [False, True])
@torch.no_grad()
def test_log_probabilities_come_from_float32_logits(device, gradients, monkeypatch):
    """Also of a policy in training, but not the loss of pre-training, whose gradients are made in
    the forward pass."""
    def mm(a, b, real=torch.mm, **options):
        if b.size(1) >= TINY.vocab_size:  # the logits
            seen.append(options.get("out_dtype"))
        return real(a, b, **options)

    seen = []
    monkeypatch.setattr(torch, "mm", mm)
    idx, model = torch.zeros(2, 32, dtype=torch.int64, device=device), new_model(device)
    with autocast(device, torch.bfloat16), torch.set_grad_enabled(gradients):
        model(idx, idx, reduction="none", return_logits=False)
        assert seen == [torch.float32]
        model(idx, idx, reduction="sum", return_logits=False)
    assert seen == [torch.float32, None if gradients else torch.float32]
    seen.clear()
    score_batch(model, [([1, 2, 3], 1)], device, torch.bfloat16)
    assert seen == [torch.float32]


def decoding_batch(device, dtype: torch.dtype, options: dict) -> DecodingBatch:
    """Three prompts of up to 100 tokens, two of them equal, before 50 new tokens each."""
    model = prepare_to_sample(new_model(device, LONG), dtype)
    ids = torch.zeros(3, 151, dtype=torch.int64, device=device)
    keys = torch.zeros(3, dtype=torch.int64, device=device)
    prompts = [(0,) * 40, (0,) * 100, (0,) * 40]
    return DecodingBatch(model, SamplingParams(**options), prompts, ids, 50, keys)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, options", [
    *((torch.bfloat16, options) for options in SAMPLING_OPTIONS),
    *((dtype, SAMPLING_OPTIONS[2]) for dtype in (torch.float32, torch.float16))], ids=str)
@torch.no_grad()
def test_prefill_and_sampling_stay_on_the_gpu(device, dtype, options):
    """The first token, 32 more over two spans of the cache, a row dropped in between; the host
    waits for none of them."""
    batch = decoding_batch(device, dtype, options)
    batch.decode_several()
    batch.keep_rows(torch.tensor([0, 2], device=device))
    batch.decode_several()
    assert batch.longest == 132 and batch.logits.shape == (2, 50257)
    assert batch.logits.dtype == torch.float32
    assert {value.device for value in vars(batch).values()
            if isinstance(value, torch.Tensor)} == {device}


@torch.no_grad()
def test_prompts_of_all_lengths_have_few_shapes(device, monkeypatch):
    """Prefill pads them to multiples of 64, up to the context, and returns what was asked for."""
    shapes = set()
    model = types.SimpleNamespace(config=GPTConfig(block_size=1000), hidden_states=lambda ids, _: (
        shapes.add(ids.size(1)), ids[:, :, None])[1])
    for length in (*range(1, 1000, 7), 64, 65, 960, 961, 1000):
        ids = torch.zeros(2, length, dtype=torch.int64, device=device)
        assert inference.hidden_states(model, ids).shape == (2, length, 1)
    assert shapes == {*range(64, 1000, 64), 1000} and len(shapes) == 16
    shapes.clear()
    inference.hidden_states(model, torch.zeros(2, 5, dtype=torch.int64))
    inference.hidden_states(model, torch.zeros(2, 1001, dtype=torch.int64, device=device))
    assert shapes == {5, 1001}  # a CPU needs no padding; too long is for the model to refuse


def test_only_a_compiled_step_may_use_cudnn(device, monkeypatch):
    """Eager training with and without recomputation, prefill and decoding may not."""
    allowed, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **options: (
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled()), attend(*args, **options))[1])
    model, idx = new_model(device), torch.zeros(2, 32, dtype=torch.int64, device=device)
    for model.checkpoint_activations in (False, True):
        train_step(model, new_optimizer(model, False), torch.bfloat16, idx, idx)
    with torch.no_grad():
        decoding_batch(device, torch.bfloat16, SAMPLING_OPTIONS[0]).decode_several()
    assert len(allowed) > 32 and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # other code of this process is not affected
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    allowed.clear()
    model(idx, idx, return_logits=False)
    assert allowed == [True, True]


def test_a_checkpoint_is_staged_in_host_memory(device, tmp_path):
    model = new_model(device)
    optimizer = new_optimizer(model, True)
    idx = torch.zeros(2, 32, dtype=torch.int64, device=device)
    train_step(model, optimizer, torch.bfloat16, idx, idx)
    writer = CheckpointWriter(tmp_path, CPU_LAUNCH, {}, keep_last=1, saved_step=None)
    for _ in range(2):  # the second time into the same buffers
        weights = writer.copy(dict(model.named_parameters()), "model")
        moments = writer.copy(optimizer.state_dict(), "state")["state"]
    copies = [*weights.values(), *(value for state in moments.values() for value in state.values())]
    assert len(copies) > 40 and {copy.device.type for copy in copies} == {"cpu"}


@torch.no_grad()
def test_a_tensor_left_on_the_cpu_is_found(device, monkeypatch):
    idx = torch.zeros(2, 32, dtype=torch.int64, device=device)
    model, arange = new_model(device), torch.arange
    batch = decoding_batch(device, torch.float32, SAMPLING_OPTIONS[0])
    monkeypatch.setattr(torch, "arange", lambda *ends, device, **options: arange(*ends, **options))
    for attempt in (lambda: model(idx), lambda: KVCache(TINY, 2, 32, device, torch.float32).locate(
            idx[:, :1]), lambda: decoding_batch(device, torch.float32, SAMPLING_OPTIONS[1])):
        with pytest.raises(FakeTensorDeviceMismatchError):
            attempt()
    batch.cache.slots = batch.cache.slots.cpu()
    with pytest.raises(FakeTensorDeviceMismatchError):
        batch.decode_several()
