"""Reward functions, by name and from files, and the prompts they are asked about."""

import itertools
import json

import pytest
import torch
from helpers.common import CPU_LAUNCH, user_error, write_rows

from dataloader import Prompt, content_hash, load_prompts, read_turns, split_examples
from minigpt2.rewards import Reward
from minigpt2.sampling import Response
from minigpt2.tokenizer import EOT_TOKEN, encode, format_prompt

CPU = torch.device("cpu")


def scores(spec: str, texts: list[str], output: str = "", stopped: bool = True,
           **options) -> list[float]:
    """The scores of responses with these texts to a row with this output."""
    row = Prompt("rows.json row 1", "Say it.", "", output, [0])
    responses = [Response([0], encode(text) + [EOT_TOKEN] * stopped, "stop" if stopped else
                          "length") for text in texts]
    reward = Reward(spec, "--reward", CPU, **options)
    return reward(responses, [row] * len(texts), CPU_LAUNCH, torch.float32).tolist()


@pytest.mark.parametrize("spec, output, texts, expected", [
    ("function:stops", "", ["", "a b", "\n"], [1, 1, 1]),
    ("function:at_most_words=2", "", ["", "a  b\n", "a b c"], [1, 1, 0]),
    ("function:contains=Cat", "dog", ["a cat", "concatenate", "a dog"], [1, 1, 0]),
    ("function:contains", "Blue sky", ["the BLUE SKY.", "blue", ""], [1, 0, 0]),
    ("function:equals=four two", "", [" four  two\n", "four", "Four two", "four two ."],
     [1, 0, 0, 0]),
    ("function:equals", "4 = x", ["4 = x", "4 =\nx ", "4=x"], [1, 1, 0]),
    ("function:equals=a=b", "", ["a=b", "a"], [1, 0])])
def test_functions(spec, output, texts, expected):
    assert scores(spec, texts, output) == expected
    assert scores(spec, texts, output, stopped=False) == [0] * len(texts)
    assert scores(spec, texts, output, stopped=False, unstopped_score=-0.5) == [-0.5] * len(texts)


@pytest.mark.parametrize("spec", ["function:contains", "function:equals"])
def test_an_output_that_is_needed_but_missing(spec):
    """Is refused before anything is sampled."""
    rows = [Prompt(f"rows.json row {n}", "Say it.", "", output, [0])
            for n, output in enumerate(("cat", "", ""), 1)]
    for spelled in (spec, f"{spec}="):
        message = user_error(Reward(spelled, "--reward", CPU).check_rows, rows)
        assert "2 rows have none, the first is rows.json row 2" in message
    for fine in (f"{spec}=cat", "function:stops"):
        Reward(fine, "--reward", CPU).check_rows(rows)
    Reward(spec, "--reward", CPU).check_rows(rows[:1])


def test_a_function_of_a_file(tmp_path):
    """Gets the row and the text without <|endoftext|>; may return any real number."""
    path = tmp_path / "mine.py"
    path.write_text("from fractions import Fraction\n\n\ndef score(row, response):\n"
                    "    assert set(row) >= {'instruction', 'input', 'output'}, row\n"
                    "    return Fraction(len(response), 4) + (row.pop('output') == 'x')\n")
    assert scores(f"{path}:score", ["", "abc"], "x") == [1.0, 1.75]  # a row is its own copy
    before = Reward(f"{path}:score", "--reward", CPU).sha256
    path.write_text(path.read_text() + "# more\n")
    assert Reward(f"{path}:score", "--reward", CPU).sha256 != before
    path.write_text(path.read_text() + "\n\ndef other(row, response):\n    return 0\n")
    assert len({Reward(f"{path}:{name}", "--reward", CPU).sha256 for name in ("score", "other")}
               ) == 2
    assert "FILE.py:FUNCTION" in user_error(Reward, str(path), "--reward", CPU)  # without a name


def test_an_argument_that_would_be_ignored_is_refused():
    assert "stops takes no argument" in user_error(Reward, "function:stops=5", "--reward", CPU)


@pytest.mark.parametrize("value, shown", [("1e39", "1e+39"), ("-1e39", "-1e+39"),
                                          ("next(iter([]))", "StopIteration")])
def test_what_float32_cannot_hold_and_an_empty_iterator_are_errors(tmp_path, value, shown):
    path = tmp_path / "mine.py"
    path.write_text(f"def score(row, response):\n    return {value}\n")
    message = user_error(scores, f"{path}:score", ["a"])
    assert f"gives {shown}" in message and "rows.json row 1" in message


def test_a_file_may_define_a_dataclass(tmp_path):
    """Which looks its module up by name."""
    path = tmp_path / "re.py"  # the name of a module that is loaded already
    path.write_text("from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
                    "@dataclass\nclass Score:\n    value: float\n\n\n"
                    "def score(row, response):\n    return Score(2.0).value\n")
    assert scores(f"{path}:score", ["a"]) == [2.0]


def test_different_prompts_are_read_from_all_kinds_of_rows(tmp_path):
    rows = [{"instruction": "Name a cat.", "output": "Tom"}, {"prompt": "Name a cat."},
            {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Add.",
                                                                   "input": "1 2"},
            {"prompt": "Say yes.", "completion": "yes"},
            {"instruction": "Choose.", "chosen": "this", "rejected": "that"},
            {"messages": [{"role": "user", "content": "Hello?"},
                          {"role": "assistant", "content": "Hello!"}]},
            {"prompt": "long " * 100}, {"instruction": "Sing.", "output": None}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    *parts, summary = load_prompts(str(path), "--prompts", 100, 20, 0.4)
    prompts = sorted(itertools.chain(*parts), key=lambda prompt: prompt.place)
    assert [(p.instruction, p.input, p.output) for p in prompts] == [
        ("Name a cat.", "", "Tom"), ("Add.", "1 2", "3"), ("Say yes.", "", "yes"),
        ("Choose.", "", "this"), ("Hello?", "", "Hello!"), ("Sing.", "", "")]
    assert all(part == [one for one in prompts if one in part] for part in parts)  # in order
    assert all(p.ids == encode(format_prompt(p.instruction, p.input)) for p in prompts)
    assert [p.place.split()[-1] for p in prompts] == ["1", "3", "5", "6", "7", "9"]
    assert summary.startswith("6 prompts of 9 rows (left out: 2 repeated, 1 without room for 20 "
                              "tokens in a context of 100); ")
    assert all(parts) and f"{len(parts[0])} to train on, {len(parts[1])} held out" in summary
    message = user_error(load_prompts, str(path), "--prompts", 30, 20, 0.0)
    assert "0 prompts of 9 rows" in message and "lower --max-tokens" in message


def test_prompts_are_held_out_as_in_fine_tuning(tmp_path):
    """Of whose rows it trains on none, also if over a fifth of all rows share a prompt, which it
    splits by their responses, and if the row of the lowest hash has no room for a response."""
    common = [{"instruction": "Name a thing.", "output": f"thing {n}"} for n in range(40)]
    rows = common + [{"instruction": f"Name {n} things.", "output": "a"} for n in range(60)]
    (path := tmp_path / "rows.json").write_text(json.dumps(rows))
    for fraction in (0.05, content_hash("Name a thing.", "") + 0.01):
        trained, held_out, _ = split_examples(read_turns(path), 100, fraction)
        assert trained and held_out
        seen = {tuple(prompt) for [(prompt, _)] in trained}
        for prompts, is_seen in zip(load_prompts(str(path), "--prompts", 100, 20, fraction),
                                    (True, False), strict=False):
            assert prompts and all((tuple(prompt.ids) in seen) == is_seen for prompt in prompts)
    few = [f"Name {'cheap ' * n}things." for n in range(8)]
    lowest = min(few, key=lambda text: content_hash(text, ""))
    rows = [{"instruction": text, "input": "", "output": "a"} for text in few]
    (path := tmp_path / "few.json").write_text(json.dumps(rows))
    assert content_hash(lowest, "") > 0.001 and lowest != few[0]
    *_, (held_out,), _ = load_prompts(str(path), "--prompts", 100, 20, 0.001)
    assert held_out.instruction == lowest
    size = len(held_out.ids) + 19
    trained, (other,), _ = load_prompts(str(path), "--prompts", size, 20, 0.001)
    assert trained and other.instruction != lowest  # it has no room; one must be held out


def test_prompts_of_transcripts(tmp_path):
    """As hh-rlhf has them: all turns before the last answer, which is the output."""
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Sing.\n\nAssistant:"
    rows = [{"chosen": f"{start} La.", "rejected": f"{start} No."},
            {"chosen": f"{start} La la.", "rejected": f"{start} Never."},
            {"chosen": f"{start} La.", "rejected": "\n\nHuman: Other\n\nAssistant: No."},
            {"chosen": "\n\nHuman: Go\n\nAssistant: I go.", "rejected":
             "\n\nHuman: Go\n\nAssistant: Why?"}]
    *parts, summary = load_prompts(str(write_rows(tmp_path / "rows.jsonl", rows)), "--prompts", 200,
                                   20, 0.0)
    prompts = sorted(itertools.chain(*parts), key=lambda prompt: prompt.place)
    assert [(p.instruction, p.output) for p in prompts] == [
        (start.removesuffix("\n\nAssistant:"), "La."), ("\n\nHuman: Go", "I go.")]
    first = encode(format_prompt("Hi")) + encode("Yes?") + [EOT_TOKEN]
    assert prompts[0].ids == first + encode(format_prompt("Sing."))
    assert summary.startswith("2 prompts of 4 rows (left out: 1 unusable pairs of transcripts, "
                              "1 repeated, 0 without room")


@pytest.mark.parametrize("row", [3, {"text": "a"}, {"prompt": 3}, {"prompt": ""},
                                 {"messages": "hello"}, {"instruction": None, "output": "b"}])
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, row])
    assert "line 2" in user_error(load_prompts, str(path), "--prompts", 100, 20, 0.0)
