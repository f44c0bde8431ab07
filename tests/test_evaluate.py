"""Evaluation: the arithmetic by hand, scores against Hugging Face, any number of ranks."""

import json
import math

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
from helpers.ranks import Ranks

import evaluate
import finetune
from dataloader import make_examples, pad_rows, read_rows, split_rows, text_turns
from evaluate import (
    EvaluateConfig,
    answer_figures,
    hellaswag_harness,
    lambada,
    plain,
    repeated_4grams,
    validation_figures,
)
from inference import generate, logprobs
from minigpt2.benchmarks import (
    Question,
    choice_figures,
    hellaswag,
    last_word_figures,
    make_questions,
    multiple_choice,
    score,
)
from minigpt2.checkpoint import save_checkpoint
from minigpt2.shards import MANIFEST, read_manifest, write_record
from minigpt2.tokenizer import EOT_TOKEN, decode, encode, format_prompt
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
    assert figures["perplexity_per_word_stderr"] == pytest.approx(
        math.exp(3) * np.std([1, 2, 6], ddof=1) / math.sqrt(3))


def test_continuations_carry_their_space():
    question = hellaswag(STORIES[0])
    context, continuation = question.pairs[1]
    assert decode(context) == STORIES[0]["ctx"] and decode(continuation)[:5] == " ate "
    assert context + continuation == encode(STORIES[0]["ctx"] + " " + STORIES[0]["endings"][1])
    assert question.label == 0 and question.characters[1] == len("ate a fish and a loaf of bread.")
    (context, word), = lambada(PASSAGES[2]).pairs  # the last word is what follows the last space
    assert decode(word) == " the\nking" and decode(context).endswith("gave them to")
    asked = multiple_choice({"context": "Q: 2+2?\nA:\n", "choices": ["4", "5"], "label": 0})
    assert decode(asked.pairs[0][0]) == "Q: 2+2?\nA:" and decode(asked.pairs[0][1]) == "\n4"
    sentences = multiple_choice({"context": "", "choices": ["It is.", "It are."], "label": 0})
    assert sentences.pairs[0] == ([EOT_TOKEN], encode("It is."))
    blanks = multiple_choice({"context": ["Ann hit Bob. Ann", "Ann hit Bob. Bob"], "label": 1,
                              "choices": ["cried."] * 2})
    assert [decode(context)[-3:] for context, _ in blanks.pairs] == ["Ann", "Bob"]


def test_the_harness_form_of_hellaswag():
    row = {"activity_label": "Baking", "ctx_a": "A man [header] How to bake [title] Mix.",
           "ctx_b": "he  stirs", "label": "1", "endings": ["now. [step] Wait.", "it."]}
    question = hellaswag_harness(row)
    assert decode(question.pairs[0][0]) == "Baking: A man How to bake. Mix. He stirs"
    assert decode(question.pairs[0][1]) == " now. Wait." and question.characters == [10, 3]


# --------------------------------------------------------------------- scores of the model


def test_scores_match_hugging_face_and_our_own_logprobs(model, tmp_path):
    from transformers import GPT2LMHeadModel
    reference = GPT2LMHeadModel.from_pretrained(save_checkpoint(tmp_path, 1, model)).eval()
    pairs = pairs_of([hellaswag(row) for row in STORIES] + [lambada(row) for row in PASSAGES])
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
    pairs = pairs_of([hellaswag(row) for row in STORIES])
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
    fewer = EvaluateConfig(data_dir=str(data), eval_tokens=10)
    assert validation_figures(model, fewer, CPU_LAUNCH, torch.float32)["tokens"] == 10


# ------------------------------------------------------------------- answers to instructions

REFERENCES = ("Paris.", "It is a city in the north of France.", "yes", "Blue, of course!", "4")
INSTRUCTIONS = [{"instruction": f"Question {n}?", "input": "It is short." * (n % 2),
                 "output": REFERENCES[n % 5]} for n in range(40)]
WIDE = GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return GPT(WIDE).eval()


def turns_of(path) -> list:
    return [text_turns(row, place) for place, row in read_rows(path)]


def test_repetition_and_plain_answers_by_hand():
    assert repeated_4grams("a b c d a b c d") == pytest.approx(1 / 5)  # of abcd bcda cdab dabc abcd
    assert repeated_4grams("no no no no no no") == pytest.approx(2 / 3)
    assert repeated_4grams("three words only") == repeated_4grams("") == 0
    assert repeated_4grams("one two three four five") == 0
    assert plain(" The  Capital is\nPARIS. ") == "the capital is paris" == plain(
        "the capital is Paris !")
    assert plain("C++") == "c++" and plain("3.5") == "3.5" != plain("35")


def test_the_response_loss_is_that_of_fine_tuning(wide, tmp_path):
    """Over all tokens of all responses, conversations included; rows that fine-tuning leaves out
    are left out, and --limit takes the first held-out rows."""
    chat = {"messages": [{"role": role, "content": text} for role, text in (
        ("user", "Who?"), ("assistant", "You."), ("user", "Why?"), ("assistant", "I am."))]}
    long = {"instruction": "long", "output": "word " * 200}
    rows = [*INSTRUCTIONS, chat, long, {"instruction": "none", "output": " "}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    turns, examples, _ = make_examples(turns_of(path), WIDE.block_size)
    held_out = split_rows(turns, 0.9)[1]
    assert len(turns) == 41 and 30 < len(held_out) < 41 and 40 in held_out  # the conversation
    for limit in (None, 3):
        config = EvaluateConfig(val_fraction=0.9, answer_rows=1, answer_tokens=1, limit=limit)
        kept = [examples[i] for i in held_out[:limit]]
        inputs, targets = finetune.collate(kept, len(kept), WIDE.block_size)
        with torch.no_grad():
            expected = wide(inputs, targets, return_logits=False)[1].item()
        torch.manual_seed(0)
        figures = answer_figures(GPT(WIDE).eval(), path, config, CPU_LAUNCH, torch.float32, None)
        assert figures["response_loss"] == pytest.approx(expected, abs=1e-5)
        assert figures["rows"] == len(kept)


def test_figures_of_answers_by_hand(wide, tmp_path, monkeypatch):
    """Six held-out rows in the order of the file, with given answers. The first three are judged;
    the first three with short references, wherever they are, are matched."""
    references = ["Paris.", "It is a city in the north of France.", "We do not know that at all.",
                  "yes", "five words, but no more", "also short"]
    rows = [{"instruction": f"Q{n}", "output": text} for n, text in enumerate(references)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(evaluate, "split_rows", lambda turns, fraction: (
        [], list(range(len(turns))), "all held out"))
    given = {"Q0": ("paris", "stop", 1), "Q1": ("so so so so so so", "length", 6),
             "Q2": ("It is not known.", "stop", 5), "Q3": ("no", "stop", 1),
             "Q4": ("Five words, but no more!", "stop", 6)}
    asked = []

    def answer(model, prompts, config, launch, dtype):
        texts = [decode(prompt) for prompt in prompts]
        asked.extend(texts)
        names = [next(name for name in given if f"\n{name}\n" in text) for text in texts]
        return [dict(zip(("answer", "finish_reason", "tokens"), given[name], strict=True))
                for name in names]

    monkeypatch.setattr(evaluate, "answer", answer)
    config = EvaluateConfig(answer_rows=3)
    figures = answer_figures(wide, path, config, CPU_LAUNCH, torch.float32, tmp_path)
    assert len(asked) == 5  # Q0, Q1, Q2 and the short Q0, Q3, Q4; not Q5
    assert figures["stopped"] == pytest.approx(2 / 3)
    assert figures["stopped_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert figures["repeated_4grams"] == pytest.approx((0 + 2 / 3 + 0) / 3)
    assert figures["answer_tokens"] == pytest.approx((1 + 6 + 5) / 3)
    assert figures["reference_tokens"] == pytest.approx(
        sum(len(encode(text)) for text in references[:3]) / 3)
    assert figures["exact_match"] == pytest.approx(2 / 3) and figures["exact_match_rows"] == 3
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert lines[0] == {"prompt": format_prompt("Q0"), "answer": "paris", "reference": "Paris.",
                        "finish_reason": "stop", "tokens": 1}
    assert [line["reference"] for line in lines] == references[:3]
    write_rows(path, rows[1:3])  # without a short reference
    figures = answer_figures(wide, path, config, CPU_LAUNCH, torch.float32, None)
    assert figures["exact_match_rows"] == 0 and "exact_match" not in figures


def test_answers_are_generated_in_order_and_end_as_reported(wide, monkeypatch):
    """Equal to each prompt alone; prompts of very different lengths, in batches of two."""
    monkeypatch.setattr(evaluate, "ROWS_PER_BATCH", 2)
    prompts = [encode("word " * n) for n in (9, 1, 119, 30, 2)]
    config = EvaluateConfig(answer_tokens=10)
    alone = [generate(wide, *pad_rows([prompt]), 0.0, 10)[0][0, len(prompt) :].tolist()
             for prompt in prompts]
    answers = evaluate.answer(wide, prompts, config, CPU_LAUNCH, torch.float32)
    assert [one["answer"] for one in answers] == list(map(decode, alone))
    assert [one["tokens"] for one in answers] == [10, 10, 8, 10, 10]  # 119 "word ", and a space
    assert [one["finish_reason"] for one in answers] == ["length", "length", "context", "length",
                                                         "length"]
    model = GPT(WIDE).eval()  # one that says <|endoftext|> at once
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[EOT_TOKEN] = 1
    assert evaluate.answer(model, prompts[:2], config, CPU_LAUNCH, torch.float32) == [
        {"answer": "", "finish_reason": "stop", "tokens": 0}] * 2


# ------------------------------------------------------------------------------- the script


@pytest.fixture
def files(tmp_path, model):
    save_checkpoint(tmp_path / "out", 1, model)
    make_corpus(tmp_path / "data", [700, 500])
    write_rows(tmp_path / "rows.jsonl", [row | {"input": ""} for row in INSTRUCTIONS])
    write_rows(tmp_path / "stories.jsonl", STORIES)
    write_rows(tmp_path / "passages.jsonl", PASSAGES)
    return tmp_path


def arguments(files) -> list[str]:
    return [str(files / "out"), "--data-dir", str(files / "data"), "--device", "cpu", "--tasks",
            f"val,hellaswag={files / 'stories.jsonl'},lambada={files / 'passages.jsonl'}",
            "--batch-tokens", "200"]


def results_of(files) -> dict:
    return json.loads((files / "out" / "step_000001" / "evaluation.json").read_text())


@pytest.mark.slow
def test_any_number_of_ranks_gives_the_same_results(files, tmp_path):
    results, argv = {}, arguments(files)
    argv[argv.index("--tasks") + 1] += f",answers={files / 'rows.jsonl'}"
    argv += ["--val-fraction", "0.5", "--answer-tokens", "5", "--answer-temperature", "1"]
    for world_size in (1, 2, 3):
        ranks = Ranks(world_size, "evaluate", argv, tmp_path / f"ranks{world_size}",
                      constants={"evaluate.ROWS_PER_BATCH": 5})
        assert ranks.wait() == [0] * world_size, ranks.output()
        results[world_size] = results_of(files)
    one = results[1]
    assert one["hellaswag"]["rows"] == 16 and one["lambada"]["rows"] == 15
    assert one["val"]["tokens"] == 699
    assert one["answers"]["rows"] > 10 and one["answers"]["exact_match_rows"] > 5
    assert (files / "out" / "step_000001" / "answers.jsonl").read_text().count("\n") > 10
    for world_size in (2, 3):
        other = results[world_size]
        assert other["hellaswag"] == one["hellaswag"] and other["lambada"] == one["lambada"]
        assert other["val"] == pytest.approx(one["val"], rel=1e-6)
        assert other["answers"] == one["answers"]
    assert "hellaswag accuracy_per_token" in ranks.output()


def test_results_of_other_tasks_are_kept(files, monkeypatch, capsys):
    rows = [{"context": "One, two,", "choices": ["three", "apple"], "label": 0}] * 3
    path = write_rows(files / "mine.jsonl", rows)
    for tasks in (f"hellaswag={files / 'stories.jsonl'}", str(path)):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments(files)[:-3], tasks, "--limit",
                                         "2", str(files / "out" / "latest")])
        evaluate.main()
    assert set(results_of(files)) == {"hellaswag", "mine"}
    assert results_of(files)["hellaswag"]["rows"] == 2 == results_of(files)["mine"]["rows"]
    header, *rows = capsys.readouterr().out.splitlines()[-5:]
    assert header.split() == [str(files / "out"), str(files / "out" / "latest")]
    assert [row.split()[0] for row in rows] == ["mine"] * 4


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
    (lambada, {"text": None}), (lambada, {"text": ["a b"]}), (hellaswag, {"ctx": "a"}),
    (hellaswag, {"ctx": "a", "endings": {"b": "c"}, "label": 0}),
    (hellaswag_harness, {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": 3}),
    (hellaswag_harness, {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", 3]}),
    (hellaswag_harness, {"activity_label": "A", "ctx_a": "b", "ctx_b": None, "endings": ["d"]})])
def test_rows_of_other_forms_are_refused(render, row):
    with pytest.raises(ValueError, match=r"expected|not all there"):
        render(row | {"label": 0})


def test_repeated_prompts_are_answered_apart(wide, monkeypatch):
    """Also when their batches differ: batches of two rows."""
    monkeypatch.setattr(evaluate, "ROWS_PER_BATCH", 2)
    config = EvaluateConfig(answer_temperature=1.0, answer_tokens=8)
    answers = evaluate.answer(wide, [[5, 6, 7]] * 6, config, CPU_LAUNCH, torch.float32)
    assert len({answer["answer"] for answer in answers}) == 6


def test_results_that_cannot_be_written_are_printed(files, monkeypatch, capsys):
    """In a folder that is not writable; a damaged file is refused; one row has no NaN."""
    argv = ["evaluate.py", str(files / "out"), "--device", "cpu", "--limit", "1", "--tasks",
            f"hellaswag={files / 'stories.jsonl'}"]
    monkeypatch.setattr("sys.argv", argv)
    evaluate.main()
    assert "accuracy_summed_stderr" not in results_of(files)["hellaswag"]
    assert "nan" not in capsys.readouterr().out
    path = files / "out" / "step_000001" / "evaluation.json"
    path.write_text("[1, 2]")
    assert "evaluation.json is damaged" in user_error(evaluate.main)
    with monkeypatch.context() as patch:
        patch.setattr("evaluate.os.access", lambda path, mode: False)
        evaluate.main()
    assert path.read_text() == "[1, 2]"
    output = capsys.readouterr().out
    assert "is not writable" in output and "hellaswag accuracy_summed" in output
    monkeypatch.setattr("sys.argv", [*argv[:2], str(files / "missing"), *argv[2:]])
    assert "missing" in user_error(evaluate.main)
    assert path.read_text() == "[1, 2]"  # noticed before the work


def test_published_numbers_stand_beside_gpt2(files, monkeypatch, capsys):
    """The loss only for the corpora on which it was published."""
    found = evaluate.find_checkpoint
    monkeypatch.setattr(evaluate, "find_checkpoint", lambda name: found(files / "out"))
    harness = [{"activity_label": "A", "ctx_a": "A cat.", "ctx_b": "it", "label": "1",
                "endings": ["sat.", "slept."]}]
    write_rows(files / "harness.jsonl", harness)
    argv = arguments(files)[1:]
    argv[argv.index("--tasks") + 1] += f",hellaswag_harness={files / 'harness.jsonl'}"
    columns = {}
    for corpus, name in (("HuggingFaceFW/fineweb", "gpt2"), ("kjj0/fineweb10B-gpt2", "gpt2"),
                         ("HuggingFaceFW/fineweb-edu", "openai-community/gpt2"),
                         ("wikipedia", "gpt2")):
        manifest = read_manifest(files / "data") | {"source": {"name": corpus}}
        write_record(files / "data" / MANIFEST, manifest)
        monkeypatch.setattr("sys.argv", ["evaluate.py", name, *argv])
        evaluate.main()
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split("  ")[-1].strip() == f"{name}, published"
        start = header.index(f"{name}, published")
        columns[corpus] = {line.split("  ")[0]: line[start:] for line in lines if line[start:]}
    expected = {
        "val loss": "3.4250", "hellaswag accuracy_summed": "0.2859",
        "hellaswag accuracy_per_token": "0.2955", "hellaswag_harness accuracy_summed": "0.2892",
        "hellaswag_harness accuracy_per_character": "0.3114",
        "lambada accuracy_last_word": "0.3256", "lambada accuracy_last_token": "0.4599",
        "lambada perplexity_per_word": "40.0600"}
    assert columns["HuggingFaceFW/fineweb"] == expected == columns["kjj0/fineweb10B-gpt2"]
    assert columns["HuggingFaceFW/fineweb-edu"] == expected | {"val loss": "3.2924"}
    assert columns["wikipedia"] == {k: v for k, v in expected.items() if k != "val loss"}


def test_wrong_files_and_tasks(files, monkeypatch, capsys):
    def error(*changes) -> str:
        return main_error(evaluate.main, [*arguments(files), *changes], monkeypatch, capsys)

    assert "ends with a space and a word" in error("--tasks", f"lambada={files / 'stories.jsonl'}")
    assert "two `choices`" in error("--tasks", f"hellaswag={files / 'passages.jsonl'}")
    assert "ctx_a" in error("--tasks", f"hellaswag_harness={files / 'stories.jsonl'}")
    assert "--download" in error("--tasks", "hellaswag", "--eval-dir", str(files))
    assert "nothing.jsonl does not exist" in error("--tasks", "val,nothing.jsonl")
    assert "alpaca_downloader.py" in error("--tasks", "answers=nothing.json")
    stories = files / "stories.jsonl"
    for tasks in (f"{stories},{stories}", "val,val", f"val={stories}", f"a={stories},a={stories}",
                  str(write_rows(files / "answers.jsonl", STORIES))):
        assert "is taken" in error("--tasks", tasks)
    rows = write_rows(files / "bad.jsonl", [*INSTRUCTIONS[:1], {"instruction": "a"}])
    assert "bad.jsonl line 2 has the keys" in error("--tasks", f"answers={rows}")
    write_rows(rows, [{"instruction": "a", "output": "word " * 99}])
    assert "1 over 64 tokens" in error("--tasks", f"answers={rows}")
    write_rows(rows, INSTRUCTIONS[:1])
    assert "--val-fraction" in error("--tasks", f"answers={rows}")
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


def test_a_downloaded_benchmark_is_read_and_not_downloaded_again(tmp_path, monkeypatch):
    path = tmp_path / "hellaswag_val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(STORIES), path)
    assert len(make_questions(path, read_rows(path), hellaswag, 64)) == 16
    assert "is not the file of Rowan/hellaswag" in user_error(evaluate.download_benchmark, path)
    monkeypatch.setattr(evaluate, "sha256_of", lambda _: evaluate.DOWNLOADS[path.name][3])
    evaluate.download_benchmark(path)
