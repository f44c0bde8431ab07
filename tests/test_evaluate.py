"""Evaluation: the arithmetic by hand, scores against Hugging Face, any number of ranks."""

import json
import math
import shutil
import unittest.mock
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import (
    CPU_LAUNCH,
    STORIES,
    main_error,
    make_corpus,
    user_error,
    write_rows,
    write_shard,
)
from helpers.hub_server import run_module, serve
from helpers.ranks import NO_WAIT, Ranks

import evaluate
from dataloader import pad_rows, read_rows
from evaluate import EvaluateConfig, lambada, validation_figures
from inference import logprobs
from minigpt2.benchmarks import (
    Question,
    choice_figures,
    last_word_figures,
    make_questions,
    multiple_choice,
    question_figures,
    score,
)
from minigpt2.checkpoint import save_checkpoint
from minigpt2.distributed import Launch
from minigpt2.files import sha256_of
from minigpt2.rewards import RewardModel
from minigpt2.tokenizer import EOT_TOKEN, decode, encode
from model import GPT, GPTConfig

SIZES = GPTConfig(block_size=64, n_layer=2, n_head=2, n_embd=16)
PASSAGES = [{"text": f"She had {n} apples{' and pears' * n} and gave them to {name}"}
            for n in range(5) for name in ("John", "Maximiliana", "the\nking")]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(SIZES).eval()


def pairs_of(questions: list[Question]) -> list:
    return [pair for question in questions for pair in question.pairs]


# ------------------------------------------------------------------------------ by hand


def test_the_three_accuracies_by_hand():
    """Four choices: the sum, the mean per token and the mean per character prefer three of them."""
    question = Question([([1], [2] * n) for n in (1, 4, 8, 2)], label=0, characters=[2, 9, 16, 40])
    scores = torch.zeros(4, 3, dtype=torch.float64)
    scores[:, 0] = torch.tensor([-4.0, -6.0, -6.4, -5.0])
    # sum: choice 0 (-4); per token: -4, -1.5, -0.8, -2.5: choice 2;
    # per character: -2, -0.67, -0.4, -0.125: choice 3
    for label, name in ((0, "accuracy_summed"), (2, "accuracy_per_token"),
                        (3, "accuracy_per_character")):
        one = Question(question.pairs, label, question.characters)
        figures = choice_figures([one, question], torch.cat([scores, scores]))
        expected = {"accuracy_summed": 0.5, "accuracy_per_token": 0.0,
                    "accuracy_per_character": 0.0} | ({name: 0.5} if label else {name: 1.0})
        assert {key: figures[key] for key in expected} == expected
        assert figures["rows"] == 2
    assert figures["accuracy_summed_stderr"] == pytest.approx(math.sqrt(0.25 / 1))


def test_last_word_figures_by_hand():
    scores = torch.tensor([[-1.0, 1, 1], [-2.0, 0, 1], [-6.0, 0, 0]], dtype=torch.float64)
    figures = last_word_figures(scores)
    assert figures["accuracy_last_word"] == pytest.approx(1 / 3)
    assert figures["accuracy_last_token"] == pytest.approx(2 / 3)
    assert figures["perplexity_per_word"] == pytest.approx(math.exp(3))
    assert figures["accuracy_last_word_stderr"] == pytest.approx(
        np.std([1, 0, 0], ddof=1) / math.sqrt(3))


def test_a_model_that_overflows_has_no_accuracy(model):
    """The place of the largest NaN would be an answer."""
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.inf)
    for questions in ([multiple_choice(row) for row in STORIES], [lambada(PASSAGES[0])]):
        figures = question_figures(model, questions, CPU_LAUNCH, torch.float32)
        values = {name: value for name, value in figures.items() if name != "rows"}
        assert len(values) >= 3 and all(map(math.isnan, values.values())), figures


def test_continuations_carry_their_space():
    question = multiple_choice(STORIES[0])
    context, continuation = question.pairs[1]
    assert decode(context) == STORIES[0]["ctx"] and decode(continuation)[:5] == " ate "
    assert context + continuation == encode(STORIES[0]["ctx"] + " " + STORIES[0]["endings"][1])
    assert question.label == 0 and question.characters[1] == len("ate a fish and a loaf of bread.")
    (context, word), = lambada(PASSAGES[2]).pairs  # the last word is what follows the last space
    assert decode(word) == " the\nking" and decode(context).endswith("gave them to")
    for space in ("  ", "\n ", " "):  # all of it, as in the text
        assert lambada({"text": f"She{space}sat"}).pairs == [(encode("She"), encode(f"{space}sat"))]
    asked = multiple_choice({"context": "Q: 2+2?\nA:\n", "choices": ["4", "5"], "label": 0})
    assert decode(asked.pairs[0][0]) == "Q: 2+2?\nA:" and decode(asked.pairs[0][1]) == "\n4"
    sentences = multiple_choice({"context": "", "choices": ["It is.", "It are."], "label": 0})
    assert sentences.pairs[0] == ([EOT_TOKEN], encode("It is."))
    blanks = multiple_choice({"context": ["Ann hit Bob. Ann", "Ann hit Bob. Bob"], "label": 1,
                              "choices": ["cried."] * 2})
    assert [decode(context)[-3:] for context, _ in blanks.pairs] == ["Ann", "Bob"]


# --------------------------------------------------------------------- scores of the model


def test_scores_match_hugging_face_and_our_own_logprobs(model, tmp_path):
    from transformers import GPT2LMHeadModel
    reference = GPT2LMHeadModel.from_pretrained(save_checkpoint(tmp_path, 1, model)).eval()
    pairs = pairs_of([multiple_choice(row) for row in STORIES] + [lambada(row) for row in PASSAGES])
    scores = score(model, pairs, CPU_LAUNCH, torch.float32, batch_tokens=256)
    for (context, continuation), (total, greedy, last) in zip(pairs, scores.tolist(), strict=True):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(context) - 1 : -1]  # (continuation, V)
        target = torch.tensor(continuation)
        expected = logits.log_softmax(1)[torch.arange(len(target)), target].sum().item()
        assert total == pytest.approx(expected, abs=1e-4)
        hits = logits.argmax(1) == target
        assert (greedy, last) == (float(hits.all()), float(hits[-1]))
        ours = logprobs(model, *pad_rows([context + continuation]))[0, len(context) - 1 :].sum()
        assert total == pytest.approx(ours.item(), abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_do_not_depend_on_the_batch(model, batch_tokens):
    pairs = pairs_of([multiple_choice(row) for row in STORIES])
    scores = score(model, pairs, CPU_LAUNCH, torch.float32, batch_tokens=batch_tokens)
    alone = torch.cat([score(model, [pair], CPU_LAUNCH, torch.float32, batch_tokens=100)
                       for pair in pairs])
    assert torch.allclose(scores, alone, atol=1e-4)


def test_a_greedy_continuation_is_recognized(model):
    context, continuation = encode("The cat"), []
    for _ in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]))[0][0, -1]
        continuation.append(logits.argmax().item())
    wrong = [*continuation[:-1], (continuation[-1] + 1) % 100]
    middle = [continuation[0], (continuation[1] + 1) % 100]
    scores = score(model, [(context, continuation), (context, wrong), (context, middle)],
                   CPU_LAUNCH, torch.float32, batch_tokens=100)
    assert scores[:, 1].tolist() == [1, 0, 0] and scores[:2, 2].tolist() == [1, 0]


def test_a_long_context_is_cut_on_the_left(model):
    continuation, context = encode(" the end of it"), encode("word " * 200)
    scores = score(model, [(context, continuation)], CPU_LAUNCH, torch.float32, batch_tokens=100)
    kept = context[len(context) + len(continuation) - 65 :]  # 64 inputs, and the last target
    alone = score(model, [(kept, continuation)], CPU_LAUNCH, torch.float32, batch_tokens=100)
    assert torch.equal(scores, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_do_not_round_logits(model, tmp_path, dtype):
    """GPT-2's logits are near -100, where the values of bfloat16 are half a nat apart. A constant
    added to all of them leaves the probabilities as they are."""
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 1
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, -100
    pairs = pairs_of([multiple_choice(row) for row in STORIES])
    config = EvaluateConfig(data_dir=str(make_corpus(tmp_path / "data", [700, 500])))
    exact, rounded = ((score(model, pairs, CPU_LAUNCH, dtype)[:, 0],
                       validation_figures(model, config, CPU_LAUNCH, dtype)["loss"])
                      for dtype in (torch.float32, dtype))
    lengths = torch.tensor([len(continuation) for _, continuation in pairs])
    assert ((exact[0] - rounded[0]) / lengths).abs().max() < 2e-3
    assert rounded[1] == pytest.approx(exact[1], abs=1e-4)


# --------------------------------------------------------------------------- validation loss


def test_bits_per_byte_by_hand(tmp_path):
    """Equal logits: every token costs ln V nats. Documents of more and fewer bytes per token, one
    of them cut inside a character; <|endoftext|> is left out of both sums."""
    texts = ["Hello world, hello tokens. " * 5, "日本語の文 🙂", "x"]
    tokens = [i for text in texts for i in (EOT_TOKEN, *encode(text))]
    data = make_corpus(tmp_path / "data", [len(tokens) - 3, 500])
    write_shard(data / "shard_000000.npy", np.array(tokens[:-3], dtype=np.uint16))
    model = GPT(SIZES).eval()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    figures = validation_figures(model, EvaluateConfig(data_dir=str(data)), CPU_LAUNCH,
                                 torch.float32)
    targets = tokens[1:-3]
    text_tokens = [i for i in targets if i != EOT_TOKEN]
    from minigpt2.tokenizer import load_tokenizer
    num_bytes = len(load_tokenizer().decode_bytes(text_tokens))
    nats = math.log(50257)
    assert figures["loss"] == pytest.approx(nats) and figures["tokens"] == len(targets)
    assert figures["perplexity"] == pytest.approx(50257, rel=1e-4)
    assert figures["bytes"] == num_bytes
    assert figures["bits_per_byte"] == pytest.approx(
        nats * len(text_tokens) / math.log(2) / num_bytes)
    with torch.no_grad():  # a model that has diverged: exp of its loss is over the largest float
        model.transformer.wte.weight.normal_(std=1e4)
    assert math.isinf(validation_figures(model, EvaluateConfig(data_dir=str(data)), CPU_LAUNCH,
                                         torch.float32)["perplexity"])
    torch.nn.init.zeros_(model.transformer.wte.weight)
    fewer = EvaluateConfig(data_dir=str(data), eval_tokens=10)
    assert validation_figures(model, fewer, CPU_LAUNCH, torch.float32)["tokens"] == 10


def test_windows_are_as_long_as_the_context(model, tmp_path, monkeypatch):
    widths, real = set(), GPT.hidden_states
    monkeypatch.setattr(GPT, "hidden_states", lambda self, idx, *more: (
        widths.add(idx.size(1)), real(self, idx, *more))[1])
    data = str(make_corpus(tmp_path / "data", [700, 500]))
    validation_figures(model, EvaluateConfig(data_dir=data), CPU_LAUNCH, torch.float32)
    assert widths == {SIZES.block_size}


def test_padded_ids_are_no_part_of_any_figure(model, files):
    """Their logits are 0, while those of text may all be near -100."""
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 1
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, -100
    padded = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=2, n_head=2, n_embd=16))
    padded.load_state_dict(model.state_dict() | {name: torch.cat([
        model.transformer.wte.weight, torch.zeros(47, 16)])
        for name in ("transformer.wte.weight", "lm_head.weight")})
    config = EvaluateConfig(data_dir=str(files / "data"))
    tasks, found = {"val": None, "lambada": files / "passages.jsonl"}, []
    for name, one in (("plain", model), ("padded", padded)):
        folder = save_checkpoint(files / name, 1, one)
        found.append(evaluate.evaluate_checkpoint(folder, config, CPU_LAUNCH, tasks))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0]["val loss"] < 20


def test_int8_is_used_where_it_is_asked_for(files, monkeypatch):
    """On any processor: what prepares the model is replaced."""
    asked = []
    monkeypatch.setattr(evaluate, "prepare_to_sample", lambda model, dtype: (
        asked.append(dtype), model)[1])
    config = EvaluateConfig(data_dir=str(files / "data"), dtype="int8")
    evaluate.evaluate_checkpoint(files / "out", config, CPU_LAUNCH, {"val": None})
    assert asked == [torch.int8]


def test_ids_of_a_padded_vocabulary_in_a_corpus_are_refused(tmp_path):
    """They are not of GPT-2's encoding, and have no text."""
    data = make_corpus(tmp_path / "data", [500, 500])
    write_shard(data / "shard_000000.npy", np.full(500, 50300, dtype=np.uint16))
    padded = GPT(GPTConfig(block_size=64, vocab_size=50304, n_layer=1, n_head=2, n_embd=16)).eval()
    assert "50300" in user_error(validation_figures, padded, EvaluateConfig(data_dir=str(data)),
                                 CPU_LAUNCH, torch.float32)


# ------------------------------------------------------------------------------- the script


@pytest.fixture
def files(tmp_path, model):
    save_checkpoint(tmp_path / "out", 1, model)
    make_corpus(tmp_path / "data", [700, 500])
    write_rows(tmp_path / "stories.jsonl", STORIES)
    write_rows(tmp_path / "passages.jsonl", PASSAGES)
    return tmp_path


def arguments(files) -> list[str]:
    return [str(files / "out"), "--data-dir", str(files / "data"), "--device", "cpu", "--tasks",
            f"val,hellaswag={files / 'stories.jsonl'},lambada={files / 'passages.jsonl'}",
            "--batch-tokens", "200"]


@pytest.mark.slow
def test_ranks_with_other_weights_or_rows_are_refused(files, tmp_path, model):
    """A run that saves meanwhile, or a node's own files: the figures would be of neither."""
    write_rows(files / "others.jsonl", STORIES[:9])
    torch.nn.init.normal_(model.transformer.wte.weight)
    save_checkpoint(files / "other", 1, model)
    for name, (old, new) in {"weights": ("out", "other"),
                             "rows": ("stories.jsonl", "others.jsonl")}.items():
        ranks = Ranks(2, "evaluate", arguments(files), tmp_path / name, constants=NO_WAIT,
                      other_files_on_rank_1=(str(files / old), str(files / new)))
        assert ranks.wait() == [2, 2] and f"{name} differs" in ranks.output()


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_results(files, tmp_path):
    results = {}
    for world_size in (1, 2, 3):
        ranks = Ranks(world_size, "evaluate", [*arguments(files), "--json",
                      str(files / f"{world_size}.json")], tmp_path / f"ranks{world_size}")
        assert ranks.wait() == [0] * world_size, ranks.output()
        (results[world_size],) = json.loads((files / f"{world_size}.json").read_text()).values()
    one = results[1]
    assert one["hellaswag rows"] == 16 and one["lambada rows"] == 15
    assert one["val tokens"] == 699
    for world_size in (2, 3):
        other = results[world_size]
        assert other.keys() == one.keys()
        for name, value in other.items():
            assert value == (pytest.approx(one[name], rel=1e-6) if name.startswith("val") else
                             one[name])
    assert "hellaswag accuracy_per_token" in ranks.output()


def test_the_table_has_a_column_for_each_checkpoint(files, monkeypatch, capsys):
    """And --json its numbers; of a single row, no figure has a standard error, nor a NaN."""
    rows = [{"context": "One, two,", "choices": ["three", "apple"], "label": 0}] * 3
    path, copy = write_rows(files / "mine.jsonl", rows), str(files / "out" / "latest")
    for limit in (1, 2):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments(files)[:-3], f"{path},lambada="
                                         f"{files / 'passages.jsonl'}", "--limit", str(limit), copy,
                                         "--json", str(files / "new" / "results.json")])
        evaluate.main()
        results = json.loads((files / "new" / "results.json").read_text())
        assert list(results) == [str(files / "out"), copy]
        assert results[copy]["mine rows"] == limit == results[copy]["lambada rows"]
        assert ("mine accuracy_summed_stderr" in results[copy]) == (limit > 1)
        assert ("lambada accuracy_last_word_stderr" in results[copy]) == (limit > 1)
    output = capsys.readouterr().out
    monkeypatch.setattr(Launch, "print0", unittest.mock.Mock(side_effect=BrokenPipeError))
    (files / "new" / "results.json").unlink()
    with pytest.raises(BrokenPipeError):  # as after `| head -1`
        evaluate.main()
    assert json.loads((files / "new" / "results.json").read_text()) == results
    assert "nan" not in output
    header, *rows = output.splitlines()[-9:]
    assert header.split() == list(results)
    assert [row.split()[0] for row in rows] == ["mine"] * 4 + ["lambada"] * 4
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments(files), str(files / "missing")])
    assert "missing" in user_error(evaluate.main)
    assert "accuracy" not in capsys.readouterr().out  # noticed before the work


@pytest.mark.parametrize("row, words", [
    ({"context": "a", "choices": ["b", "c"]}, ["label is None", "0 to 1"]),
    ({"context": "a", "choices": ["b", "c"], "label": 2}, ["label is 2"]),
    ({"context": "a", "choices": ["b", "c"], "label": -1}, ["label is -1"]),
    ({"context": "a", "choices": ["b", "c"], "label": "x"}, ["label is 'x'"]),
    ({"context": "a", "choices": ["b", " "], "label": 0}, ["not empty"]),
    ({"context": "a", "choices": ["b"], "label": 0}, ["two `choices`"]),
    ({"context": "a", "choices": "bc", "label": 0}, ["two `choices`"]),
    ({"context": "a", "choices": 5, "label": 0}, ["two `choices`"]),
    ({"context": "a", "choices": ["b", "c"], "label": True}, ["label is True"]),
    ({"context": ["a"], "choices": ["b", "c"], "label": 0}, ["one for each choice"]),
    ({"context": None, "choices": ["b", "c"], "label": 0}, ["two `choices`, texts"]),
    ({"context": "a", "choices": ["b", 3], "label": 0}, ["two `choices`, texts"]),
    ({"context": "a", "choices": ["b", "c " * 200], "label": 0}, ["tokens", "64"]),
    (["context", "choices"], ["two `choices`"]),
])
def test_malformed_rows_are_named(tmp_path, row, words):
    good = {"context": "a", "choices": ["b", "c"], "label": 0}
    path = write_rows(tmp_path / "rows.jsonl", [good, row])
    rows = read_rows(path)
    message = user_error(make_questions, path, rows, multiple_choice, 64)
    for word in ["line 2", *words]:
        assert word in message
    assert len(make_questions(path, rows[:1], multiple_choice, 64)) == 1


@pytest.mark.parametrize("render, row", [
    (lambada, {"text": "word "}), (lambada, {"text": "word"}), (lambada, {"text": " word"}),
    (lambada, {"text": None}), (lambada, {"text": ["a b"]}), (multiple_choice, {"ctx": "a"}),
    (multiple_choice, {"ctx": "a", "endings": {"b": "c"}, "label": 0}),
])
def test_rows_of_other_forms_are_refused(render, row):
    with pytest.raises(ValueError, match="expected"):
        render(row | {"label": 0})


def test_wrong_files_and_tasks(files, monkeypatch, capsys):
    def error(*changes) -> str:
        return main_error(evaluate.main, [*arguments(files), *changes], monkeypatch, capsys)

    assert "ends with a space and a word" in error("--tasks", f"lambada={files / 'stories.jsonl'}")
    assert "two `choices`" in error("--tasks", f"hellaswag={files / 'passages.jsonl'}")
    assert "--download" in error("--tasks", "hellaswag", "--eval-dir", str(files))
    assert "nothing.jsonl does not exist" in error("--tasks", "val,nothing.jsonl")
    assert f"{files} is a folder" in error("--tasks", str(files))
    for folder in (str(files), "."):
        assert f"--json {folder} is a folder, expected a file" in error("--json", folder)
    stories = files / "stories.jsonl"
    for tasks in (f"{stories},{stories}", "val,val", f"val={stories}", f"a={stories},a={stories}",
                  str(write_rows(files / "lambada.jsonl", STORIES))):
        assert "is taken" in error("--tasks", tasks)
    write_rows(files / "empty.jsonl", [])
    assert "no rows" in error("--tasks", str(files / "empty.jsonl"))
    assert "no checkpoint given" in main_error(evaluate.main, [], monkeypatch, capsys)


# ------------------------------------------------------------------------------- downloads


@pytest.mark.slow
def test_benchmarks_are_downloaded_and_verified(tmp_path):
    """The real client. Other content than the pinned one is refused, and nothing is left behind."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(STORIES), tmp_path / "stories.parquet")
    repos = {"datasets/Rowan/hellaswag": {
        "data/validation-00000-of-00001.parquet": (tmp_path / "stories.parquet").read_bytes()}}
    out = tmp_path / "out"
    with serve(repos) as (environment, _):
        result = run_module("evaluate", "--download", "--eval-dir", out, check=False,
                            env=environment | {"HF_HOME": str(tmp_path / "hf")})
    assert result.returncode == 2 and "expected SHA-256" in result.stderr
    assert list(out.iterdir()) == []


def test_a_verified_benchmark_is_kept(tmp_path, monkeypatch):
    made = write_rows(tmp_path / "made.jsonl", PASSAGES)
    monkeypatch.setitem(evaluate.DOWNLOADS, "lambada_test.jsonl",
                        ("owner/name", "0" * 40, "x.jsonl", sha256_of(made)))
    monkeypatch.setattr(evaluate, "list_files", lambda *arguments: [None])
    monkeypatch.setattr(evaluate, "fetch", lambda repo, commit, file, folder: Path(
        shutil.copy(made, folder / "x.jsonl")))
    target = tmp_path / "out" / "lambada_test.jsonl"
    evaluate.download_benchmark(target)
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == made.read_bytes()


def test_a_downloaded_benchmark_is_read_and_not_downloaded_again(tmp_path, monkeypatch):
    path = tmp_path / "hellaswag_val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(STORIES), path)
    assert len(make_questions(path, read_rows(path), multiple_choice, 64)) == 16
    monkeypatch.setattr(evaluate, "fetch", None)
    evaluate.download_benchmark(path)


def test_a_second_checkpoint_is_checked_before_the_first_is_evaluated(files, monkeypatch, capsys):
    save_checkpoint(files / "reward", 0, RewardModel(SIZES))
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", None)
    message = main_error(evaluate.main, [*arguments(files), str(files / "reward")], monkeypatch,
                         capsys)
    assert "a reward model, expected a language model" in message


def test_a_wrong_checkpoint_is_named_before_a_missing_benchmark(tmp_path, monkeypatch, capsys):
    arguments = [tmp_path, "--tasks", "hellaswag", "--eval-dir", tmp_path]
    assert f"{tmp_path} is not a checkpoint" in main_error(
        evaluate.main, arguments, monkeypatch, capsys)
