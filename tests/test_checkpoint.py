"""Checkpoints: Hugging Face format in both directions, crashes, damage, and what is rejected."""

import errno
import json
import math
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.common import ROOT, TINY, assert_user_error, run_script, script_env, user_error
from helpers.hub_server import serve
from safetensors.torch import load_file, save_file

from minigpt2.checkpoint import (
    GELU_NAMES,
    clean_up,
    find_checkpoint,
    list_checkpoints,
    load_model,
    load_training_state,
    read_prompt_template,
    save_checkpoint,
    to_gpt2_layout,
)
from minigpt2.files import sync, write_json
from minigpt2.kernels import prepare_to_sample
from minigpt2.tokenizer import ALPACA, encode, vocabulary_path
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


def random_model(config: GPTConfig = SMALL, seed: int = 0) -> GPT:
    """All parameters are random, biases and LayerNorms too, so that a mix-up changes the output."""
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3 if p.dim() == 1 else 0.1)
    return model


def hugging_face_model(config: GPTConfig = SMALL, seed: int = 0):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(
        n_positions=config.block_size, vocab_size=config.vocab_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3 if p.dim() == 1 else 0.1)
    return model


def tokens(config: GPTConfig = SMALL) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(1))


def same_parameters(a: GPT, b: GPT) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ------------------------------------------------------------------ Hugging Face format


@pytest.mark.slow
def test_logits_match_hugging_face(tmp_path):
    theirs = hugging_face_model()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_model(tmp_path / "hf")
    with torch.no_grad():
        difference = (ours(tokens())[0] - theirs(tokens()).logits).abs().max()
    assert difference < 1e-4 and ours.config == SMALL and not ours.training


@pytest.mark.slow
def test_hugging_face_loads_our_checkpoint(tmp_path):
    from transformers import AutoTokenizer, GPT2LMHeadModel
    ours = random_model(TINY)
    folder = save_checkpoint(tmp_path, 3, ours, prompt_template=ALPACA)
    theirs, report = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # no missing and no unexpected tensors
    with torch.no_grad():
        difference = (ours(tokens(TINY))[0] - theirs.eval()(tokens(TINY)).logits).abs().max()
    assert difference < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello <b> wörld\n\n  x"
    assert tokenizer.encode(text) == encode(text)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == theirs.config.eos_token_id == 50256
    theirs.save_pretrained(tmp_path / "again")  # round trip through transformers
    tokenizer.save_pretrained(tmp_path / "again")
    assert same_parameters(load_model(tmp_path / "again"), ours)
    assert read_prompt_template(tmp_path / "again") == ALPACA
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "again")
    assert "'[PAD]' has id 50257" in user_error(load_model, tmp_path / "again")


def test_stored_tensors_have_gpt2_layout(tmp_path):
    folder = save_checkpoint(tmp_path, 0, random_model())
    stored = load_file(folder / "model.safetensors")
    assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)  # (in, out)
    assert stored["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert stored["transformer.wte.weight"].shape == (101, 32)  # no padding
    assert "lm_head.weight" not in stored and len(stored) == 2 + 3 * 12 + 2
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # same permissions


def test_bfloat16_weights_load_as_float32(tmp_path):
    model = random_model()
    folder = save_checkpoint(tmp_path, 0, model)
    edit_weights(folder, lambda stored: stored.update(
        {name: tensor.bfloat16() for name, tensor in stored.items()}))
    (folder / "SHA256SUMS").unlink()
    loaded = load_model(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same_parameters(loaded, model.bfloat16().float())


@pytest.mark.parametrize("rename", [
    lambda name: "_orig_mod." + name, lambda name: "module." + name,
    lambda name: "module._orig_mod." + name,
    lambda name: name.removeprefix("transformer.")])  # OpenAI's own files on the hub
def test_prefixes_and_extra_tensors_of_other_writers(tmp_path, rename):
    model = random_model()
    folder = save_checkpoint(tmp_path, 0, model)
    stored = {rename(name): tensor for name, tensor in to_gpt2_layout(model).items()}
    stored[rename("transformer.h.0.attn.bias")] = torch.ones(1, 1, 24, 24)  # a causal mask
    stored[rename("lm_head.weight")] = model.lm_head.weight.detach().clone()
    save_file(stored, folder / "model.safetensors")
    (folder / "SHA256SUMS").unlink()  # other writers have none
    assert same_parameters(load_model(folder), model)


@pytest.mark.slow
def test_sharded_weights(tmp_path):
    theirs = hugging_face_model()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        assert (load_model(tmp_path)(tokens())[0] - theirs(tokens()).logits).abs().max() < 1e-4


def test_the_index_decides_which_files_are_read(saved):
    stored = load_file(saved / "model.safetensors")
    half = len(stored) // 2
    for i, names in enumerate((list(stored)[:half], list(stored)[half:]), 1):
        save_file({name: stored[name] for name in names}, saved / f"part-{i}.safetensors")
    stale = {name: torch.zeros_like(tensor) for name, tensor in stored.items()}
    save_file(stale, saved / "model-00001-of-00007.safetensors")
    (saved / "model.safetensors").unlink()
    assert "model.safetensors.index.json" in user_error(load_model, saved)
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {
        name: f"part-{1 + (i >= half)}.safetensors" for i, name in enumerate(stored)}}))
    assert same_parameters(load_model(saved), random_model())
    (saved / "part-2.safetensors").unlink()
    assert "part-2.safetensors" in user_error(load_model, saved)
    for content in ("{", "[]"):
        index.write_text(content)
        assert "index.json" in user_error(load_model, saved)
    for content in ("{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(content)
        assert str(saved) in user_error(load_model, saved)


@pytest.mark.slow
def test_hub_name(tmp_path):
    """Downloads with the real client from a local server that serves openai-community/gpt2."""
    model = random_model()
    folder = save_checkpoint(tmp_path / "made", 0, model)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["pytorch_model.bin"] = b"must not be downloaded"
    script = tmp_path / "load.py"
    script.write_text(
        "from minigpt2.checkpoint import find_checkpoint, load_model\n"
        "from minigpt2.config import run_main\n"
        "print(find_checkpoint('openai-community/gpt2'))\n"
        "print(float(load_model('openai-community/gpt2').lm_head.weight.sum()))\n"
        "run_main(lambda: load_model('openai-community/gpt3'))\n")
    with serve({"models/openai-community/gpt2": files}) as (environment, _):
        environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        result = run_script(script, env=environment, check=False)
    assert_user_error(result, "openai-community/gpt3", "hub")
    downloaded, total = result.stdout.split()
    assert float(total) == model.lm_head.weight.sum().item()
    assert sorted(os.listdir(downloaded)) == [
        "config.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]


# ----------------------------------------------------------------------------- folders


def test_find_checkpoint(tmp_path):
    models = {step: random_model(seed=step) for step in (2, 10, 1_000_000)}
    for step, model in models.items():
        save_checkpoint(tmp_path, step, model)
    assert (tmp_path / "latest").readlink() == Path("step_1000000")  # relative
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step_000002", "step_000010", "step_1000000"]
    for name in (tmp_path, tmp_path / "latest", tmp_path / "step_1000000", str(tmp_path)):
        assert find_checkpoint(name) == tmp_path / "step_1000000"
    assert same_parameters(load_model(tmp_path / "step_000002"), models[2])
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").write_text("step_000010\n")  # as written by earlier versions
    assert same_parameters(load_model(tmp_path / "latest"), models[10])


def test_transformers_opens_latest_and_best_also_after_a_move(tmp_path):
    """Also through a path of another process, and after the folder was moved or copied."""
    from transformers import GPT2LMHeadModel
    out = tmp_path / "out"
    for step in (1, 2):
        save_checkpoint(out, step, random_model(seed=step), best_step=1)
    out.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", symlinks=True)
    shutil.copytree(tmp_path / "moved", tmp_path / "followed")  # latest and best are folders there
    for folder in ("moved", "copied", "followed"):
        for name, step in (("best", 1), ("latest", 2)):
            path = tmp_path / folder / name
            theirs = GPT2LMHeadModel.from_pretrained(path)
            ours = random_model(seed=step)
            assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)
            assert same_parameters(load_model(path), ours)
    save_checkpoint(tmp_path / "followed", 3, random_model(seed=3), best_step=3)
    assert sorted(p.name for p in (tmp_path / "followed").iterdir()) == [
        "best", "latest", "step_000001", "step_000002", "step_000003"]
    assert (tmp_path / "followed" / "best").readlink() == Path("step_000003")


def test_pointers_without_symlinks_are_files(tmp_path, monkeypatch):
    def refused(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    save_checkpoint(tmp_path, 1, random_model(seed=1))
    monkeypatch.setattr(Path, "symlink_to", refused)
    save_checkpoint(tmp_path, 2, random_model(seed=2))
    assert (tmp_path / "latest").read_text() == "step_000002\n"
    assert find_checkpoint(tmp_path / "latest") == tmp_path / "step_000002"
    monkeypatch.undo()
    save_checkpoint(tmp_path, 3, random_model(seed=3))
    assert (tmp_path / "latest").readlink() == Path("step_000003")


def test_a_pointer_changes_at_once_and_survives_a_kill(tmp_path, monkeypatch):
    """Until the rename, `latest` is the old one; what a kill leaves is replaced by the next save.
    A reader gets a folder that stays, not the link that a run in progress changes."""
    class Killed(BaseException):
        pass

    def killed(source, target):
        if Path(target).name == "latest":
            raise Killed
        real(source, target)

    real = os.replace
    save_checkpoint(tmp_path, 1, random_model(seed=1))
    with monkeypatch.context() as patch:
        patch.setattr("minigpt2.checkpoint.os.replace", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, random_model(seed=2))
    assert (tmp_path / "latest").readlink() == Path("step_000001")
    assert find_checkpoint(tmp_path / "latest") == tmp_path / "step_000001"
    save_checkpoint(tmp_path, 3, random_model(seed=3))
    assert (tmp_path / "latest").readlink() == Path("step_000003")
    assert not list(tmp_path.glob(".*"))


def test_keep_last(tmp_path):
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, random_model(), keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_000004", "step_000005"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, random_model(seed=1), training_state={"step": 1})
    save_checkpoint(tmp_path, 1, random_model(seed=2))
    assert same_parameters(load_model(tmp_path), random_model(seed=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]


def test_kill_during_deletion_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(path, ignore_errors):
        if path.name == ".step_000001.old.tmp":
            (path / "model.safetensors").unlink()
            raise Killed

    for step in (1, 2):
        save_checkpoint(tmp_path, step, random_model(seed=step))
    with monkeypatch.context() as patch:
        patch.setattr("minigpt2.checkpoint.shutil.rmtree", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 3, random_model(seed=3), keep_last=1)
    assert list_checkpoints(tmp_path)
    for path in list_checkpoints(tmp_path):
        load_model(path)
    save_checkpoint(tmp_path, 4, random_model(), keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000004"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_kill_while_a_step_is_saved_again_leaves_it_intact(tmp_path, monkeypatch, number):
    """Before the old one is renamed, before the new one is, and before `latest` is written."""
    class Killed(BaseException):
        pass

    calls, real = [], os.replace

    def killed(source, target):
        calls.append(source)
        if len(calls) >= number:  # a killed process renames nothing more
            raise Killed
        real(source, target)

    save_checkpoint(tmp_path, 7, random_model(seed=0))
    with monkeypatch.context() as patch:
        patch.setattr("minigpt2.checkpoint.os.replace", killed)
        patch.setattr("minigpt2.checkpoint.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 7, random_model(seed=1))
    clean_up(tmp_path)
    assert not list(tmp_path.glob(".*.replaced"))
    expected = random_model(seed=int(number == 3)).lm_head.weight
    assert torch.equal(load_model(tmp_path / "step_000007").lm_head.weight, expected)
    save_checkpoint(tmp_path, 8, random_model(), keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000008"]


def test_saving_another_step_keeps_one_whose_replacement_was_interrupted(tmp_path):
    save_checkpoint(tmp_path, 7, random_model(seed=0))
    (tmp_path / "step_000007").rename(tmp_path / ".step_000007.replaced")
    save_checkpoint(tmp_path, 8, random_model())
    assert torch.equal(load_model(tmp_path / "step_000007").lm_head.weight,
                       random_model(seed=0).lm_head.weight)


def test_files_are_flushed_before_the_rename(tmp_path, monkeypatch):
    events, real_fsync, real_replace = [], os.fsync, os.replace

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def replace(source, target):
        events.append(f"-> {target}")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    folder = save_checkpoint(tmp_path, 1, random_model(), training_state={"step": 1})
    renamed = events.index(f"-> {folder}")
    written = {os.path.basename(event) for event in events[:renamed]}
    assert {path.name for path in folder.iterdir()} <= written
    assert events[-2:] == [f"-> {tmp_path / 'latest'}", str(tmp_path)]


def test_training_state_round_trip(tmp_path):
    state = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.randn(3)}},
                                      "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]}}
    folder = save_checkpoint(tmp_path, 7, random_model(), training_state=state)
    loaded = load_training_state(folder)
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"],
                       state["optimizer"]["state"][0]["exp_avg"])
    assert loaded["step"] == 7 and loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)


def test_prompt_template_is_stored(tmp_path):
    base = save_checkpoint(tmp_path / "base", 1, random_model())
    tuned = save_checkpoint(tmp_path / "tuned", 1, random_model(), prompt_template=ALPACA)
    assert read_prompt_template(base) is None and read_prompt_template(tuned) == ALPACA
    edit_config(tuned, prompt_template="chatml")
    assert "was edited" in user_error(read_prompt_template, tuned)
    (tuned / "SHA256SUMS").unlink()
    assert "chatml" in user_error(read_prompt_template, tuned)


# -------------------------------------------------------------- kill -9 and full disks

SAVE_FOREVER = f"""
import sys, pathlib
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_checkpoint import SMALL, random_model
from minigpt2.checkpoint import save_checkpoint
step = 0
while True:
    step += 1
    save_checkpoint(pathlib.Path(sys.argv[1]), step, random_model(seed=step),
                    training_state={{"step": step}}, keep_last=3)
    print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("after, delay", [(1, 0.0), (2, 0.003), (3, 0.011), (5, 0.02)])
def test_kill_during_save_leaves_only_complete_checkpoints(tmp_path, after, delay):
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, env=script_env())
    for _ in range(after):
        process.stdout.readline()
    try:
        process.wait(delay)  # somewhere inside the next save
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    found = list_checkpoints(tmp_path)
    assert found
    for folder in found:
        step = int(folder.name.removeprefix("step_"))
        assert same_parameters(load_model(folder), random_model(seed=step))
        assert load_training_state(folder)["step"] == step
    assert find_checkpoint(tmp_path / "latest") in found
    save_checkpoint(tmp_path, 10_000, random_model(seed=7))  # a later run can save
    assert same_parameters(load_model(tmp_path / "latest"), random_model(seed=7))


@pytest.mark.parametrize("limit", [500, 50_000, 900_000, 2_000_000])
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, limit):
    """A file size limit stands in for the disk: config, weights, vocabulary or state do not fit."""
    save_checkpoint(tmp_path, 1, random_model(seed=1))
    state = {"x": torch.zeros(1_000_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = user_error(save_checkpoint, tmp_path, 2, random_model(), training_state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step_000002" in message and "disk" in message
    assert find_checkpoint(tmp_path / "latest") == tmp_path / "step_000001"
    assert same_parameters(load_model(tmp_path), random_model(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_000001"]


# ------------------------------------------------------- damaged and unusable checkpoints


def edit_config(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint without checksums, which would report every edit first."""
    folder = save_checkpoint(tmp_path, 1, random_model(), training_state={"step": 1})
    (folder / "SHA256SUMS").unlink()
    return folder


def edit_weights(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


def test_missing_tensor(saved):
    edit_weights(saved, lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"))
    message = user_error(load_model, saved)
    assert "transformer.h.1.mlp.c_fc.bias" in message and str(saved) in message


def test_tensor_with_three_dimensions(saved):
    name = "transformer.h.0.attn.c_attn.weight"
    edit_weights(saved, lambda t: t.update({name: torch.zeros(2, 3, 4)}))
    assert "[2, 3, 4]" in user_error(load_model, saved)


def test_tensor_with_wrong_shape(saved):
    edit_weights(saved, lambda t: t.update({"transformer.wpe.weight": torch.zeros(16, 32)}))
    message = user_error(load_model, saved)
    assert "transformer.wpe.weight" in message and "[16, 32]" in message and "[24, 32]" in message


def test_unknown_tensor(saved):
    edit_weights(saved, lambda t: t.update({"transformer.h.9.ln_1.bias": torch.zeros(32)}))
    assert "transformer.h.9.ln_1.bias" in user_error(load_model, saved)


def test_untied_head(saved):
    edit_weights(saved, lambda t: t.update({"lm_head.weight": torch.zeros(101, 32)}))
    assert "tied" in user_error(load_model, saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.ln_2.bias"])
def test_non_finite_weights_are_named(saved, name, value):
    edit_weights(saved, lambda t: (t[name].view(-1)[3:4].fill_(value),
                                   t.update({"lm_head.weight": t["transformer.wte.weight"] + 0})))
    message = user_error(load_model, saved)
    assert name in message and "NaN or infinite" in message and "tied" not in message


def test_truncated_or_missing_weights_file(saved):
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:size])
        assert "model.safetensors" in user_error(load_model, saved)
    weights.unlink()
    assert "model.safetensors" in user_error(load_model, saved)


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "llama"}, "model_type"), ({"activation_function": "relu"}, "relu"),
    ({"n_layer": ...}, "n_layer"), ({"n_head": 5}, "n_head"), ({"n_inner": 77}, "n_inner"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"vocab_size": "many"}, "vocab_size"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")])
def test_config_that_is_not_gpt2(saved, changes, word):
    edit_config(saved, **changes)
    message = user_error(load_model, saved)
    assert word in message and "config.json" in message


def test_a_device_is_written_and_not_replaced(tmp_path, monkeypatch, capfd):
    """As root, a rename would replace /dev/stdout itself, here a link to a regular file."""
    monkeypatch.setattr("os.replace", None)
    write_json(Path("/dev/stdout"), [1])
    assert capfd.readouterr().out == "[\n 1\n]\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, [1])
    assert os.read(reader, 100) == b"[\n 1\n]\n" and not pipe.is_file()
    os.close(reader)


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    """Such as the shared folders of virtual machines; a file that cannot be flushed is an error."""
    def fsync(descriptor, real=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refuse_files:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    refuse_files = False
    monkeypatch.setattr("os.fsync", fsync)
    write_json(tmp_path / "a.json", [1, math.nan, {"b": -math.inf}])
    assert json.loads((tmp_path / "a.json").read_text()) == [1, None, {"b": None}]  # NaN is no JSON
    sync(tmp_path)
    refuse_files = True
    for call in (lambda: sync(tmp_path / "a.json"), lambda: write_json(tmp_path / "b.json", [1])):
        with pytest.raises(OSError, match="Invalid argument"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_of_the_hubs_xet_client_is_one_line(tmp_path, monkeypatch):
    def snapshot_download(*arguments, **options):
        raise RuntimeError("Data processing error: connection reset")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert "provide it (Data processing error: connection reset)" in user_error(
        load_model, "gpt2")


def test_paths_that_are_not_checkpoints(tmp_path, saved):
    assert "is no folder here" in user_error(load_model, tmp_path / "a" / "b" / "none")
    (tmp_path / "empty").mkdir()
    assert "config.json" in user_error(load_model, tmp_path / "empty")
    assert "is not a checkpoint" in user_error(load_model, saved / "model.safetensors")
    for name in ("step_000009", "nonsense", "x" * 9999, "\x80"):
        (saved.parent / "latest").unlink()
        (saved.parent / "latest").write_text(name, encoding="latin-1")
        assert "does not exist" in user_error(load_model, saved.parent / "latest")
    (saved.parent / "latest").unlink()
    (saved.parent / "latest").symlink_to("step_000009")
    assert "step_000009 does not exist" in user_error(load_model, saved.parent / "latest")
    for text in ("{", "[]", "\x80", "[" * 99999):
        (saved / "config.json").write_text(text, encoding="latin-1")
        assert "config.json" in user_error(load_model, saved)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast",
                                  "gelu_accurate"])
def test_other_names_of_gelu(saved, name):
    edit_config(saved, activation_function=name)
    assert same_parameters(load_model(saved), random_model())


@pytest.mark.slow
def test_the_names_of_gelu_are_those_of_transformers():
    from transformers.activations import ACT2FN
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    equal = {name for name in ACT2FN if "gelu" in name
             and torch.allclose(ACT2FN[name](x), expected, atol=1e-9)}
    assert equal == set(GELU_NAMES)


# ----------------------------------------------------------------------- other tokenizers


def vocabulary() -> dict[str, int]:
    return json.loads(vocabulary_path("vocab.json").read_text(encoding="utf-8"))


def tokenizer_json(vocab: dict[str, int], added: dict[str, int], **changes) -> str:
    """The parts of the `tokenizers` library's file that decide the ids."""
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False}
    return json.dumps({
        "model": {"vocab": vocab, "merges": []}, "normalizer": None, "pre_tokenizer": pre_tokenizer,
        "added_tokens": [{"content": token, "id": i} for token, i in added.items()]} | changes)


def test_gpt2_tokenizer_files_of_other_writers(saved):
    (saved / "vocab.json").write_text(json.dumps(vocabulary(), indent=1))
    merges = vocabulary_path("merges.txt").read_text(encoding="utf-8")
    (saved / "merges.txt").write_text(merges.rstrip("\n"), encoding="utf-8")
    (saved / "added_tokens.json").write_text('{"<|endoftext|>": 50256}')
    (saved / "tokenizer.json").write_text(
        tokenizer_json(vocabulary(), {"<|endoftext|>": 50256}), encoding="utf-8")
    (saved / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False,
        "added_tokens_decoder": {"50256": {"content": "<|endoftext|>"}}}))
    assert same_parameters(load_model(saved), random_model())
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
                 "tokenizer.json"):  # none is required
        (saved / name).unlink()
        load_model(saved)


def swapped() -> dict[str, int]:
    """As many tokens as GPT-2's, two of them with each other's id."""
    return vocabulary() | {"hello": vocabulary()["world"], "world": vocabulary()["hello"]}


@pytest.mark.parametrize("name, content, words", [
    ("vocab.json", lambda: json.dumps(swapped()), "'world' has id 31373, not 6894"),
    ("vocab.json", lambda: json.dumps({"a": 0}), "'a' has id 0"),
    ("vocab.json", lambda: "[]", "cannot be read"), ("vocab.json", lambda: "{", "cannot be read"),
    ("added_tokens.json", lambda: '{"[PAD]": 50257}', "'[PAD]' has id 50257, not None"),
    ("tokenizer.json", lambda: tokenizer_json(swapped(), {}), "'world' has id 31373"),
    ("tokenizer.json", lambda: tokenizer_json(vocabulary(), {"<|im_start|>": 50257}), "im_start"),
    ("tokenizer.json", lambda: tokenizer_json(vocabulary(), {"<|endoftext|>": 0}), "has id 0"),
    ("tokenizer.json", lambda: tokenizer_json(vocabulary(), {}, pre_tokenizer={
        "add_prefix_space": True}), "add_prefix_space is set"),
    ("tokenizer.json", lambda: "{}", "cannot be read"),
    ("tokenizer_config.json", lambda: '{"add_prefix_space": true}', "add_prefix_space is set")])
def test_another_tokenizer_is_refused(saved, name, content, words):
    """Its checkpoint was sampled with GPT-2's ids, and saved again with GPT-2's files."""
    (saved / name).write_text(content(), encoding="utf-8")
    message = user_error(load_model, saved)
    assert name in message and words in message


# ------------------------------------------------------------------- nanoGPT and llm.c


def nanogpt_file(path, model: GPT, prefix: str, bias: bool) -> None:
    """Writes what nanoGPT's train.py writes."""
    weights = {prefix + name: tensor.detach() for name, tensor in model.state_dict().items()
               if bias or not name.endswith(".bias")}
    weights[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24)  # old versions
    sizes = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 101}
    torch.save({"model": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
                "model_args": sizes | {"bias": bias, "dropout": 0.0}, "iter_num": 5,
                "best_val_loss": torch.tensor(3.0), "config": {"dataset": "openwebtext"}}, path)


@pytest.mark.slow
@pytest.mark.parametrize("prefix, bias", [("", True), ("_orig_mod.", False)])
def test_nanogpt_is_converted_as_the_docs_show(tmp_path, monkeypatch, prefix, bias):
    monkeypatch.chdir(tmp_path)
    model = random_model()
    nanogpt_file(tmp_path / "ckpt.pt", model, prefix, bias)
    if not bias:
        for name, parameter in model.named_parameters():
            parameter.data *= not name.endswith(".bias")
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        assert "nanoGPT" in user_error(load_model, path) and "docs/formats.md" in user_error(
            load_model, path)
    docs = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    script = tmp_path / "convert.py"
    script.write_text(docs.split("```python\n")[1].split("```")[0])
    run_script(script, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    assert same_parameters(load_model(tmp_path / "out" / "nanogpt"), model)


def test_llmc_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "gpt2_124M.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(2000))
    for path in (tmp_path, tmp_path / "gpt2_124M.bin"):
        assert "docs/formats.md" in user_error(load_model, path)


class RunsCode:
    def __reduce__(self):
        return (os.system, ("touch code_was_run",))


def test_pickle_that_runs_code_is_rejected(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = saved / "training_state.pt"
    torch.save({"step": 1, "optimizer": RunsCode()}, state)
    assert "holds code, which is never run" in user_error(load_training_state, saved)
    state.write_bytes(pickle.dumps(RunsCode()))
    assert "training_state.pt" in user_error(load_training_state, saved)
    assert not (tmp_path / "code_was_run").exists()
    for content in (b"", b"half a file"):
        state.write_bytes(content)
        assert "training_state.pt" in user_error(load_training_state, saved)
    state.unlink()
    assert "training_state.pt" in user_error(load_training_state, saved)


def test_packed_model_cannot_be_saved(tmp_path, tiny_model):
    prepare_to_sample(tiny_model)
    with pytest.raises(ValueError, match="prepare_to_sample"):
        save_checkpoint(tmp_path, 1, tiny_model)
    assert list(tmp_path.iterdir()) == []
