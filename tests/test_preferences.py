"""Preference rows as token ids, what is left out, and the scripts that write such rows."""

import gzip
import json
import sys
from dataclasses import replace

import pytest
from helpers.common import (
    ROOT,
    assert_user_error,
    main_error,
    main_of,
    run_script,
    user_error,
    write_rows,
)
from helpers.hub_server import serve

import dpo
import judge
import reward
import rlhf
from dataloader import (
    content_hash,
    load_pairs,
    load_prompts,
    message_turns,
    split_pairs,
    split_rows,
)
from finetune import read_turns, token_ids
from minigpt2.preferences import make_pairs, rank_share
from minigpt2.tokenizer import ALPACA, EOT_TOKEN, decode, encode, encode_example, format_prompt
from model import GPTConfig
from pretrain_data.pydocs import Document
from rlhf_data import hh_rlhf_downloader, pydocs_pairs
from rlhf_data.pydocs_pairs import make_rows

HH = "\n\nHuman: {}\n\nAssistant:"
SIZES = GPTConfig(block_size=128, n_layer=1, n_head=1, n_embd=8)
OTHERS = [{"question": f"Say {i}.", "context": None, "good": f"{i}", "bad": "no", "chosen": 3}
          for i in range(4)]  # rows under keys that are not ours


def pairs_of(*rows: dict, block_size: int = 1024, **options):
    return make_pairs([(f"x.jsonl line {i}", row) for i, row in enumerate(rows, 1)], block_size,
                      **options)


def pair_of(**row):
    [pair], _ = pairs_of(row)
    return pair


@pytest.mark.parametrize("answer", [" leading space", "\nnewline", "7 digits", "é 日本", "a\n\n",
                                    "<|endoftext|>", "{braces} ### Response:\n"])
@pytest.mark.parametrize("question", ["Say it.", "Say it: ", "Say\n", "12"])
def test_prompt_and_responses_are_encoded_apart_and_end_with_endoftext(question, answer):
    """The same ids as in fine-tuning and sampling, and nothing merges across the boundary."""
    pair = pair_of(instruction=question, input="loudly", chosen=answer, rejected=f"{answer}!")
    assert (pair.prompt, pair.chosen) == encode_example(question, "loudly", answer)
    assert pair.prompt == encode(format_prompt(question, "loudly"))
    assert pair.rejected == [*encode(f"{answer}!"), EOT_TOKEN]
    assert decode(pair.chosen[:-1]) == answer and EOT_TOKEN not in pair.chosen[:-1]
    assert pair.num_tokens == len(pair.prompt) + len(pair.rejected)


def test_the_schemas_and_absent_columns():
    expected = pair_of(instruction="a", chosen="b", rejected="c")
    assert pair_of(instruction="a", input=None, prompt=None, chosen="b", rejected="c") == expected
    assert pair_of(prompt="a", chosen="b", rejected="c", score=0.5) == expected
    assert (expected.place, expected.instruction, expected.input) == ("x.jsonl line 1", "a", "")


def test_transcripts_are_split_before_their_last_answer():
    """Not at the first Human turn: the earlier turns are the prompt, as in a conversation that
    finetune.py trains on."""
    start = HH.format("Hi?") + " Hello." + HH.format("Name a color\n\nand a city.")
    pair = pair_of(chosen=f"{start} Blue.\nParis. ", rejected=f"{start} Red.")
    conversation = message_turns([
        {"role": role, "content": text} for role, text in
        (("user", "Hi?"), ("assistant", "Hello."), ("user", "Name a color\n\nand a city."),
         ("assistant", "Blue.\nParis."))], "")
    assert pair.prompt + pair.chosen == token_ids([encode_example(*turn) for turn in conversation])
    assert pair.rejected == [*encode("Red."), EOT_TOKEN]
    assert pair.instruction == start.removesuffix("\n\nAssistant:") and pair.input == ""


def test_turns_of_one_speaker_in_a_row_are_joined():
    start = HH.format("a\n\nHuman: b") + " c\n\nAssistant: d" + HH.format("e")
    assert decode(pair_of(chosen=f"{start} 1", rejected=f"{start} 2").prompt) == (
        format_prompt("a\n\nb") + "c\n\nd<|endoftext|>" + format_prompt("e"))


def test_what_is_left_out_is_counted_by_reason():
    hi = HH.format("Hi?")
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"},
            {"chosen": f"{hi} a", "rejected": f"{HH.format('Ho?')} b"},  # prompts differ
            {"chosen": f"{hi} a", "rejected": f"{hi} a{HH.format('More?')} b"},
            {"prompt": "a", "chosen": "b ", "rejected": " b"}, {"chosen": f"{hi} a",
                                                                "rejected": f"{hi} a"},  # equal
            {"prompt": "a", "chosen": "", "rejected": "b"},
            {"prompt": "a", "chosen": "b", "rejected": " \n"}, {"chosen": f"{hi} a",
                                                                "rejected": f"{hi} "},  # empty
            {"chosen": f"{hi} a\n\nAssistant: b", "rejected": f"{hi} a\n\nAssistant: c"},
            {"chosen": HH.format("") + " b", "rejected": HH.format("") + " c"},  # no question
            {"chosen": f"{hi} a\n\nHuman: More?", "rejected": f"{hi} b"},  # one after it
            {"prompt": "a", "chosen": "word " * 100, "rejected": "b"}]
    pairs, summary = pairs_of(*rows, block_size=100)
    assert [pair.place for pair in pairs] == ["x.jsonl line 1"]
    assert summary == ("1 of 12 pairs (left out: 1 over 100 tokens, 2 whose prompts differ, 3 with "
                       "an empty response, 2 with equal responses, 3 without a question before the "
                       "response, or with one after it)")
    assert pairs_of(rows[0])[1] == "1 of 1 pairs (left out: none)"


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_long_pairs_are_left_out_never_cut(longer):
    """The last token of every sequence is <|endoftext|>, also of one that fills the context."""
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} | {longer: "word " * 60}
    size = pair_of(**row).num_tokens
    [pair], _ = pairs_of(row, block_size=size)
    assert pair.chosen[-1] == pair.rejected[-1] == EOT_TOKEN
    assert pairs_of(row, block_size=size - 1)[0] == []


@pytest.mark.parametrize("row, words", [
    (["a"], ["expected an object"]), ({"prompt": "a", "chosen": "b"}, ["prompt, chosen"]),
    ({"prompt": "a", "chosen": "b", "rejected": 7}, ["rejected is 7", "expected text"]),
    ({"instruction": "a", "input": 1, "chosen": "b", "rejected": "c"}, ["input is 1"]),
    ({"instruction": " ", "chosen": "b", "rejected": "c"}, ["empty instruction"]),
    ({"chosen": "b", "rejected": "c"}, ["not a transcript", "chosen"]),
    ({"chosen": HH.format("a") + "b", "rejected": "\n\nHuman: a"}, ["rejected", "transcript"]),
    ({"chosen": None, "rejected": None}, ["keys"])])
def test_a_malformed_row_is_one_line_naming_it(row, words):
    message = user_error(pairs_of, {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    assert message.startswith("x.jsonl line 2") and all(word in message for word in words)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_pairs_in_equally_many_micro_batches(world_size):
    shares = [rank_share(range(16), 3, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(16))
    assert max(len(batch) for share in shares for batch in share) == 3


def test_what_fine_tuning_holds_out_is_held_out_here(tmp_path):
    rows = [{"instruction": f"Say {i}.", "input": "loudly" * (i % 2), "output": "a"}
            for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tuned = {turns[0][:2] for turns in read_turns(tmp_path / "rows.json")
             if content_hash(*turns[0][:2]) < 0.2}
    pairs, _ = pairs_of(*({"instruction": row["instruction"].upper(), "input": row["input"],
                           "chosen": "b", "rejected": "c"} for row in rows[::-1]))
    _, held_out, _ = split_pairs(pairs, 0.2)
    assert {(pair.instruction.capitalize(), pair.input) for pair in held_out} == tuned


def test_five_folds_hold_out_every_pair_once():
    keys = [(f"prompt {i // 2}", "") for i in range(400)]
    folds = [split_rows(range(400), keys, 0.2, k / 5)[1] for k in range(5)]
    assert sorted(i for fold in folds for i in fold) == list(range(400))
    assert all(40 < len(fold) < 120 for fold in folds)
    assert folds[0] == split_rows(range(400), keys, 0.2)[1]


def test_a_file_that_is_missing_or_has_too_few_pairs(tmp_path):
    missing = user_error(load_pairs, str(tmp_path / "no.json"), "--data", 64, ALPACA)
    assert "no.json" in missing and "hh_rlhf_downloader.py" in missing
    (tmp_path / "one.json").write_text('[{"prompt": "a", "chosen": "b", "rejected": "c"}]')
    assert len(load_pairs(str(tmp_path / "one.json"), "--val-data", 64, ALPACA)[0]) == 1
    message = user_error(load_pairs, str(tmp_path / "one.json"), "--data", 64, ALPACA)
    assert "--data" in message and "1 of 1 pairs" in message


@pytest.mark.parametrize("script", [reward, dpo, rlhf, judge])
def test_every_script_names_keys_that_are_not_ours_and_maps_them(script, base, tmp_path,
                                                                 monkeypatch, capsys):
    path = write_rows(tmp_path / "rows.jsonl", OTHERS)
    argv = [*["--checkpoint"][script is judge :], base, "--out-dir", tmp_path / "out", "--device",
            "cpu", *(["--reward", "function:stops", "--prompts"] if script is rlhf else ["--data"]),
            path]
    message = main_error(main_of(script), argv, monkeypatch, capsys)
    assert ("line 1 has the keys 'question, good, bad, chosen' (context is null), expected "
            in message and "; or --columns instruction=NAME," in message)
    message = main_error(main_of(script), [*argv, "--columns", "prompt=query"], monkeypatch, capsys)
    assert "has no query (--columns), only the keys 'question, context, good, bad" in message


def test_pairs_and_prompts_under_other_keys(tmp_path):
    """Those that are not named are not read, also if they have our names."""
    path = str(write_rows(tmp_path / "rows.jsonl", OTHERS))
    columns = "prompt=question,input=context"
    for more, output in (("", ""), (",completion=good", "2"), (",chosen=good,rejected=bad", "2")):
        trained, held_out, _ = load_prompts(path, "--prompts", 99, 9, 0.0, columns=columns + more)
        found = {(prompt.instruction, prompt.input, prompt.output) for prompt in trained + held_out}
        assert len(found) == 4 and ("Say 2.", "", output) in found
    columns += ",chosen=good,rejected=bad"
    pairs, _ = load_pairs(path, "--data", 99, ALPACA, columns)
    assert pairs[2] == replace(pair_of(prompt="Say 2.", chosen="2", rejected="no"),
                               place="rows.jsonl line 3")
    config = reward.RewardConfig(data=path, val_data=path, columns=columns)
    assert [len(part) for part in reward.read_splits(config, 99, ALPACA)[:2]] == [4, 4]


# ---------------------------------------------------------------------- the data scripts


def hub() -> dict:
    files = {}
    for split, n in (("train", 5), ("test", 3)):
        rows = [json.dumps({"chosen": f"{HH.format(i)} é {split}", "rejected": "b"})
                for i in range(n)]
        files[f"harmless-base/{split}.jsonl.gz"] = gzip.compress("\n".join(rows).encode())
    return {"datasets/Anthropic/hh-rlhf": files | {"README.md": b"x"}}


def download(tmp_path, repos: dict, *, faults: list = (), check: bool = True):
    code = ("import rlhf_data.hh_rlhf_downloader as d, sys; from minigpt2 import hub\n"
            "hub.INITIAL_DELAY_S = 0.001; d.run_main(d.main)\n")
    with serve(repos, faults=faults) as (environment, pending):
        result = run_script("-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}",
                            "--subset", "harmless-base", "--out-dir", tmp_path / "new", check=check,
                            env=environment | {"HF_HOME": str(tmp_path / "hf")}, cwd=tmp_path)
    assert not pending
    return result


@pytest.mark.slow
def test_hh_rlhf_is_downloaded_with_the_real_client(tmp_path):
    """Through dropped connections, cut bodies and a flipped bit; a second run has nothing to do."""
    faults = [503, "drop", "cut", "flip"]
    assert "5 rows" in download(tmp_path, hub(), faults=faults).stdout
    train, test = (tmp_path / "new" / f"hh_harmless_base_{split}.jsonl"
                   for split in ("train", "test"))
    assert [json.loads(line)["chosen"] for line in test.read_text(encoding="utf-8").splitlines()
            ] == [f"{HH.format(i)} é test" for i in range(3)]
    assert {path.name for path in train.parent.iterdir()} == {train.name, test.name}
    before = train.stat().st_mtime_ns
    assert f"{train} exists already" in download(tmp_path, {}).stdout
    assert train.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("repos, words", [
    ({}, ["Anthropic/hh-rlhf"]),
    ({"datasets/Anthropic/hh-rlhf": {"harmless-base/x": b""}}, ["train.jsonl.gz"])])
def test_a_missing_data_set_is_reported(tmp_path, repos, words):
    assert_user_error(download(tmp_path, repos, check=False), *words)
    assert not list((tmp_path / "new").glob("*.jsonl"))


def test_an_unknown_subset_is_refused(monkeypatch, capsys):
    assert "red-team" in main_error(hh_rlhf_downloader.main, ["--subset", "red-team"], monkeypatch,
                                    capsys)


def test_pydocs_pairs_have_three_faults():
    answers = {f"What is the Python class c{i}?": f"Class number {i} of a list." for i in range(30)}
    answers |= {f"What does the Python function f{i} do?": f"Returns {i}." for i in range(30)}
    rows = make_rows(answers)
    assert rows == make_rows(dict(reversed(answers.items()))) and len(rows) > 50
    found = set()
    for row in rows:
        assert row["chosen"] == answers[row["instruction"]] != row["rejected"]
        kinds = {"cut": row["chosen"].startswith(row["rejected"]),
                 "repeated": row["rejected"] == f"{row['chosen']} {row['chosen']}",
                 "another's": row["rejected"] in answers.values()}
        [kind] = [name for name, is_kind in kinds.items() if is_kind]
        if kind == "another's":  # of the same kind of symbol
            assert row["rejected"].split()[0] == row["chosen"].split()[0]
        found.add(kind)
    assert found == {"cut", "repeated", "another's"}
    assert len(make_pairs([("", row) for row in rows], 1024)[0]) == len(rows)


def test_pydocs_pairs_writes_rows(tmp_path, monkeypatch, capsys):
    documents = [Document("function", f"f{i}", "", f"Returns the number {i}.") for i in range(9)]
    documents.append(Document("function", "f0", "", "Returns something else."))  # the first counts
    monkeypatch.setattr(pydocs_pairs, "read_documents", lambda: documents)
    path = tmp_path / "new" / "pairs.json"
    monkeypatch.setattr(sys, "argv", ["", "--out", str(path)])
    pydocs_pairs.main()
    assert f"wrote {path}: 8 rows" in capsys.readouterr().out
    pairs, summary = load_pairs(str(path), "--data", 256, ALPACA)
    assert len(pairs) == 8, summary
    assert "something else" not in path.read_text()
