"""Prompt templates: their texts, files of one's own, what a checkpoint stores, Hugging Face's
`apply_chat_template`, and that every script uses the template of its checkpoint."""

import json

import pytest
import torch
from helpers.common import CPU_LAUNCH, main_error, user_error, write_rows

import dpo
import finetune
import inference
import judge
import reward
import rlhf
from chat import Conversation
from dataloader import load_prompts, read_rows, split_examples, text_turns, token_ids
from minigpt2.checkpoint import read_prompt_template, save_checkpoint, shared_template
from minigpt2.config import run_main
from minigpt2.distributed import Launch
from minigpt2.preferences import make_pairs
from minigpt2.rewards import RewardModel
from minigpt2.run import run_training
from minigpt2.tokenizer import (
    ALPACA,
    TEMPLATES,
    decode,
    encode,
    encode_example,
    format_prompt,
    load_template,
)
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=8)
OWN = "{% Wörld \U0001f30d 100% \\n \"quoted\" 'x' {{ } {# \t:\n{instruction}[[\n<{input}>]] {\n"
QUESTION, CHATML = TEMPLATES["question"], TEMPLATES["chatml"]


def new_model(model_class=GPT) -> GPT:
    torch.manual_seed(0)
    return model_class(SIZES)


def template_file(tmp_path, text: str) -> str:
    (tmp_path / "template.txt").write_bytes(text.encode())
    return str(tmp_path / "template.txt")


# ------------------------------------------------------------------------------------- texts


def test_the_templates_by_hand():
    assert format_prompt("Hi?") == format_prompt("Hi?", "", ALPACA)
    assert format_prompt("Hi?", "", QUESTION) == "Question: Hi?\nAnswer:\n"
    assert format_prompt("Hi?", "a b", QUESTION) == "Question: Hi?\na b\nAnswer:\n"
    assert format_prompt("Hi?", "", CHATML) == (
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n")
    assert format_prompt("Hi?", "a", CHATML) == (
        "<|im_start|>user\nHi?\n\na<|im_end|>\n<|im_start|>assistant\n")
    assert all(load_template(name) == text for name, text in TEMPLATES.items())


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_texts_in_a_prompt_are_never_read_as_placeholders(template):
    hostile = "{input} [[x]] \\1 {instruction} \\g<0>"
    assert format_prompt(hostile, "", template).count(hostile) == 1
    assert format_prompt("?", hostile, template).count(hostile) == 1


def test_a_file_is_a_template(tmp_path):
    path = template_file(tmp_path, "\ufeff" + OWN.replace("\n", "\r\n"))
    assert load_template(path) == OWN
    assert format_prompt("Q", "", OWN).endswith("\t:\nQ {\n")
    assert format_prompt("Q", "I", OWN).endswith("\t:\nQ\n<I> {\n")


def test_without_a_place_for_the_input_it_follows_the_instruction(tmp_path):
    template = load_template(template_file(tmp_path, "Q: {instruction}\nA:"))
    assert format_prompt("x", "", template) == "Q: x\nA:"
    assert format_prompt("x", "y", template) == "Q: x\n\ny\nA:"


@pytest.mark.parametrize("text, words", [
    ("Answer:", "[]"), ("{input}", "['input']"), ("{instruction} {instruction}", "'instruction', "),
    ("{instruction} {input} {input}", "at most once"), ("{instruction} {question}", "'question'"),
    ("[[{instruction}]] {input}", "not in [[ ]]"), ("[[ {instruction}", "in pairs"),
    ("{instruction} ]] [[", "in pairs"), ("{instruction} [[ [[ ]]", "in pairs"),
    ("{instruction}<|endoftext|>", "<|endoftext|>")])
def test_a_bad_file_is_an_error_of_one_line(text, words, tmp_path):
    path = template_file(tmp_path, text)
    message = user_error(load_template, path)
    assert f"--template {path}" in message and words in message


def test_what_is_no_file_of_text_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    assert f"{', '.join(TEMPLATES)} or a text file" in user_error(load_template, "alpaka")
    (tmp_path / "x").write_bytes(b"\xff\xfe{instruction}")
    for path in (tmp_path / "x", tmp_path):
        assert "text file in UTF-8" in user_error(load_template, str(path))
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    base = save_checkpoint(tmp_path / "base", 1, new_model())
    assert "--template qa:" in main_error(
        lambda: run_training(finetune.FinetuneConfig, finetune.train, ""),
        ["--checkpoint", base, "--data", rows, "--out-dir", tmp_path / "out", "--template", "qa",
         "--device", "cpu"], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- checkpoints


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "SHA256SUMS").unlink(missing_ok=True)


@pytest.mark.parametrize("template", [*TEMPLATES.values(), OWN], ids=[*TEMPLATES, "own"])
def test_a_checkpoint_stores_the_text(template, tmp_path):
    folder = save_checkpoint(tmp_path, 1, new_model(), prompt_template=template)
    assert read_prompt_template(tmp_path) == read_prompt_template(folder) == template
    stored = json.loads((folder / "config.json").read_text())["prompt_template"]
    assert stored["text"] == template and len(stored["sha256"]) == 64


@pytest.mark.parametrize("stored", [
    "alpaca", "", 7, [], {}, {"text": QUESTION}, {"text": QUESTION, "sha256": "0" * 64},
    {"text": 1, "sha256": 1}, {"text": "\ud800", "sha256": "x"}])
def test_an_unknown_or_damaged_template_is_refused(stored, tmp_path, monkeypatch, capsys):
    folder = save_checkpoint(tmp_path, 1, new_model(), prompt_template=QUESTION)
    whole = json.loads((folder / "config.json").read_text())["prompt_template"]
    if isinstance(stored, dict) and "sha256" in stored:
        assert set(stored) == set(whole)
    edit_config(folder, prompt_template=stored)
    message = main_error(inference.main, ["--checkpoint", folder, "Hi", "--device", "cpu"],
                         monkeypatch, capsys)
    assert str(folder) in message and "unknown or damaged: use another checkpoint" in message
    edit_config(folder, prompt_template=whole)
    assert read_prompt_template(folder) == QUESTION


def test_an_edited_text_is_refused(tmp_path):
    folder = save_checkpoint(tmp_path, 1, new_model(), prompt_template=QUESTION)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("Question: ", "Query: "))
    assert "was edited" in user_error(read_prompt_template, folder)
    (folder / "SHA256SUMS").unlink()
    assert "unknown or damaged" in user_error(read_prompt_template, folder)


MESSAGES = [
    [{"role": "user", "content": "What is {input} [[x]] {{ y }}?"}],
    [{"role": "user", "content": "Add.", "input": "1 and\n2"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é?"},
     {"role": "assistant", "content": " Yes.\n"}, {"role": "user", "content": "Why?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "Q"},
     {"role": "assistant", "content": "A"}, {"role": "user", "content": "R", "input": "S"},
     {"role": "assistant", "content": "B"}]]


@pytest.mark.slow
@pytest.mark.parametrize("template", [*TEMPLATES.values(), OWN], ids=[*TEMPLATES, "own"])
def test_hugging_face_gives_the_same_prompts(template, tmp_path):
    from transformers import AutoTokenizer
    folder = save_checkpoint(tmp_path, 1, new_model(), prompt_template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for messages in MESSAGES:
        system = messages[0]["content"] + "\n\n" * bool(messages[0]["content"]) if (
            messages[0]["role"] == "system") else ""
        ours = ""
        for message in messages:
            if message["role"] == "user":
                ours += format_prompt(system + message["content"], message.get("input", ""),
                                      template)
                system = ""
            elif message["role"] == "assistant":
                ours += message["content"] + "<|endoftext|>"
        for one in (tokenizer, again):
            assert one.apply_chat_template(messages, tokenize=False) == ours
            assert one.apply_chat_template(messages, tokenize=False,
                                           add_generation_prompt=True) == ours
    ids = tokenizer.apply_chat_template(MESSAGES[1], return_dict=False)
    assert list(ids) == encode(format_prompt("Add.", "1 and\n2", template))


@pytest.mark.slow
@pytest.mark.parametrize("template", [ALPACA, CHATML], ids=["alpaca", "chatml"])
def test_hugging_face_gives_what_is_trained_on(template, tmp_path):
    """The rows of `messages` that finetune.py reads, system message included."""
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(
        save_checkpoint(tmp_path, 1, new_model(), prompt_template=template))
    answered = [[*messages, {"role": "assistant", "content": "So."}]
                for messages in (MESSAGES[0], MESSAGES[2])]
    turns = [text_turns({"messages": messages}, "row") for messages in answered]
    train, val, _ = split_examples(turns, 512, 0.5, template)
    found = {decode(token_ids(example)) for example in train + val}
    assert found == {tokenizer.apply_chat_template(messages, tokenize=False)
                     for messages in answered}


# ----------------------------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows, and two epochs of fine-tuning on them with a template of one's own."""
    folder = tmp_path_factory.mktemp("templates")
    save_checkpoint(folder / "base", 1, new_model())
    rows = [{"instruction": f"Say {n}.", "input": "now" * (n % 2), "output": str(n)}
            for n in range(8)]
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "pairs.jsonl", [{"instruction": row["instruction"], "input": row["input"],
                                         "chosen": "a", "rejected": "b"} for row in rows])
    template_file(folder, OWN)
    tune(folder, "own", template=str(folder / "template.txt"))
    save_checkpoint(folder / "reward", 1, new_model(RewardModel), prompt_template=OWN)
    save_checkpoint(folder / "other", 1, new_model(), prompt_template=CHATML)
    save_checkpoint(folder / "other_reward", 1, new_model(RewardModel), prompt_template=CHATML)
    return folder


def tune(folder, out: str, **changes):
    options = {"checkpoint": str(folder / "base"), "data": str(folder / "rows.jsonl"),
               "out_dir": str(folder / out), "epochs": 1, "batch_size": 4, "device": "cpu"}
    return finetune.train(finetune.FinetuneConfig(**options | changes), CPU_LAUNCH)


BEGIN = OWN.split("{instruction}")[0] + "Say "  # of every prompt


@pytest.fixture
def seen(monkeypatch) -> set[str]:
    """How the rows begin that models read: as long as BEGIN."""
    found, real = set(), GPT.hidden_states

    def hidden_states(self, idx, cache=None, positions=None):
        if positions is None:
            found.update(decode(row)[: len(BEGIN)] for row in idx.tolist() if any(row))
        return real(self, idx, cache, positions)

    monkeypatch.setattr(GPT, "hidden_states", hidden_states)
    return found


def test_fine_tuning_uses_the_template_and_stores_it(files, tmp_path, seen, capsys):
    tune(files, tmp_path / "out", template=str(files / "template.txt"))
    assert seen == {BEGIN} and read_prompt_template(tmp_path / "out") == OWN
    assert BEGIN in capsys.readouterr().out
    seen.clear()
    tune(files, tmp_path / "again", checkpoint=str(files / "own"))  # that of the checkpoint
    assert seen == {BEGIN} and read_prompt_template(tmp_path / "again") == OWN
    tune(files, tmp_path / "changed", checkpoint=str(files / "own"), template="question")
    assert read_prompt_template(tmp_path / "changed") == QUESTION
    tune(files, tmp_path / "default")
    assert read_prompt_template(tmp_path / "default") == ALPACA


def test_a_resumed_run_keeps_its_template(files, tmp_path):
    path = template_file(tmp_path, OWN)
    out = tmp_path / "out"
    tune(files, out, template=path)
    tune(files, out, template=path, resume=True)
    for other in (None, "question"):
        assert f"--template {path}, not {other}" in user_error(tune, files, out, template=other,
                                                               resume=True)
    template_file(tmp_path, OWN + "\n")
    assert "another --template" in user_error(tune, files, out, template=path, resume=True)


def test_sampling_uses_the_template_of_the_checkpoint(files, monkeypatch, capsys):
    for name, expected in (("own", format_prompt("Hi", "x", OWN)),
                           ("other", format_prompt("Hi", "x", CHATML))):
        monkeypatch.setattr("sys.argv", ["inference.py", "--checkpoint", str(files / name), "Hi",
                                         "--input", "x", "--json", "--device", "cpu"])
        with pytest.raises(SystemExit):
            run_main(inference.main)
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(encode(expected))
    _, _, template = inference.SamplingConfig(checkpoint=str(files / "own"), device="cpu").load()
    assert template == OWN
    [first] = Conversation(template, 512, 8).turns_with("Hi")
    assert first == encode(format_prompt("Hi", "", OWN))
    raw = inference.SamplingConfig(checkpoint=str(files / "own"), device="cpu", raw=True)
    assert raw.load()[2] is None


def options(files, tmp_path, **more) -> dict:
    return {"checkpoint": str(files / "own"), "out_dir": str(tmp_path / "out"), "epochs": 1,
            "batch_size": 4, "micro_batch_size": 4, "device": "cpu", **more}


def test_dpo_takes_the_template_over(files, tmp_path, seen):
    dpo.train(dpo.DPOConfig(**options(files, tmp_path, data=str(files / "pairs.jsonl"))),
              CPU_LAUNCH)
    assert seen == {BEGIN} and read_prompt_template(tmp_path / "out") == OWN


def test_the_reward_model_takes_the_template_over(files, tmp_path, seen):
    config = reward.RewardConfig(**options(files, tmp_path, data=str(files / "pairs.jsonl"),
                                           val_data=str(files / "pairs.jsonl"), max_tokens=2))
    reward.train(config, CPU_LAUNCH)
    assert seen == {BEGIN} and read_prompt_template(tmp_path / "out") == OWN


def test_policy_optimization_takes_the_template_over(files, tmp_path, seen):
    config = options(files, tmp_path, prompts=str(files / "rows.jsonl"), max_steps=1, group_size=2,
                     max_tokens=2, reward=str(files / "reward"))
    rlhf.train(rlhf.RLHFConfig(**config), CPU_LAUNCH)
    assert seen == {BEGIN} and read_prompt_template(tmp_path / "out") == OWN
    config |= {"reward": str(files / "other_reward"), "out_dir": str(tmp_path / "new")}
    message = user_error(rlhf.train, rlhf.RLHFConfig(**config), CPU_LAUNCH)
    assert "different prompt templates" in message and str(files / "other_reward") in message


@pytest.mark.parametrize("train, config_class, changes", [
    (finetune.train, finetune.FinetuneConfig, {"data": "rows.jsonl"}),
    (reward.train, reward.RewardConfig, {"data": "pairs.jsonl"}),
    (dpo.train, dpo.DPOConfig, {"data": "pairs.jsonl"}),
    (rlhf.train, rlhf.RLHFConfig, {"prompts": "rows.jsonl", "group_size": 2,
                                   "reward": "function:stops"})])
def test_ranks_with_different_templates_are_refused(files, tmp_path, train, config_class, changes,
                                                    monkeypatch):
    """On two nodes, the files of one --template, and checkpoints, may differ."""
    def gather(values, value):
        has_text = isinstance(value, dict) and value.get("template")  # not the flag's default
        values[:] = [value, value | {"template": "another"} if has_text else value]

    monkeypatch.setattr("minigpt2.distributed.dist.all_gather_object", gather)
    monkeypatch.chdir(files)
    config = config_class(**options(files, tmp_path, **changes))
    message = user_error(train, config, Launch(0, 2, torch.device("cpu")))
    assert message.startswith("template differs: ") and "'another' on rank 1" in message
    config = judge.JudgeConfig((str(files / "own"),), data="rows.jsonl", max_tokens=2)
    message = user_error(judge.judge, config, Launch(0, 2, torch.device("cpu")))
    assert message.startswith("template differs: ") and "'another' on rank 1" in message
    assert not (tmp_path / "out").exists()


def test_the_judge_uses_the_template_of_the_policies(files, tmp_path, seen, monkeypatch, capsys):
    argv = ["--data", files / "rows.jsonl", "--out-dir", tmp_path / "out", "--device", "cpu",
            "--val-fraction", "0.5", "--max-response", "2"]
    monkeypatch.setattr("sys.argv", ["judge.py", *map(str, [
        files / "base", files / "own", "--proxy", files / "reward", *argv])])
    judge.main()
    assert seen == {BEGIN}
    message = main_error(judge.main, [files / "own", files / "other", *argv], monkeypatch, capsys)
    assert "different prompt templates" in message
    message = main_error(judge.main, [files / "own", "--gold", files / "other_reward", *argv],
                         monkeypatch, capsys)
    assert "different prompt templates" in message


def test_the_shared_template(files):
    assert shared_template() == shared_template(files / "base") == ALPACA
    assert shared_template(files / "base", files / "own", files / "reward") == OWN
    assert "own and" in user_error(shared_template, files / "own", files / "base", files / "other")


def test_pairs_transcripts_and_prompts_are_in_the_template(files):
    rows = read_rows(files / "pairs.jsonl")
    pairs, _ = make_pairs(rows, 512, CHATML)
    assert [pair.prompt for pair in pairs] == [
        encode(format_prompt(row["instruction"], row["input"], CHATML)) for _, row in rows]
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    [pair], _ = make_pairs([("row", {"chosen": start + "d", "rejected": start + "e"})], 512, CHATML)
    assert pair.prompt == [token for part in encode_example("a", "", "b", CHATML) for token in part
                           ] + encode(format_prompt("c", "", CHATML))
    prompts, *_ = load_prompts(str(files / "rows.jsonl"), "--data", 512, 4, 0.0, CHATML)
    assert [prompt.ids for prompt in prompts] == [
        encode(format_prompt(prompt.instruction, prompt.input, CHATML)) for prompt in prompts]
