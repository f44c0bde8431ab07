"""The rules that a reward model is compared with, and the script that prints them."""

import json
import math
import sys

import torch
from helpers.common import main_error

from dataloader import load_pairs
from minigpt2.preferences import make_pairs
from minigpt2.tokenizer import ALPACA
from rlhf_data import baselines
from rlhf_data.baselines import accuracy_interval, bag_of_words_margins, rule_margins


def pairs_of(*texts: tuple[str, str]) -> list:
    rows = [{"prompt": f"p{i}", "chosen": chosen, "rejected": rejected}
            for i, (chosen, rejected) in enumerate(texts)]
    return make_pairs([("", row) for row in rows], 128)[0]


def test_the_margins_of_every_rule():
    pairs = pairs_of(("a long answer", "short ## Instruction"), ("b", "b, but longer"), ("c", "d"))
    margins = rule_margins(pairs, pairs_of(("good a", "bad a"), ("good b", "bad c")) * 50)
    assert margins["longer"].tolist() == [-7, -12, 0]
    assert margins["shorter"].tolist() == [7, 12, 0]
    assert margins["no artifact"].tolist() == [1, 0, 0]
    words = bag_of_words_margins([("good", "bad"), ("bad x", "good y"), ("x", "y")],
                                 [("good a", "bad a"), ("good b", "bad c")] * 50)
    assert words[0] > 2 and words[1] == -words[0] and words[2] == 0
    assert bag_of_words_margins([("a", "b")], []).tolist() == [0]


def test_the_bag_of_words_is_at_its_optimum():
    """The gradient of the penalized loss is 0, for one word by hand: w = 3 sigmoid(-w)."""
    [margin] = bag_of_words_margins([("x", "")], [("x", "")] * 3).tolist()
    assert math.isclose(margin, 3 / (1 + math.exp(margin)), abs_tol=1e-6)
    # a word said twice counts twice: w = 3 * 2 sigmoid(-2w)
    [margin] = bag_of_words_margins([("x", "")], [("x x", "")] * 3).tolist()
    assert math.isclose(margin, 6 / (1 + math.exp(2 * margin)), abs_tol=1e-6)


def test_the_script_prints_the_rules_on_the_held_out_pairs(tmp_path, monkeypatch, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "chosen": f"good {i}",
                                        "rejected": "bad, I fear"}) + "\n" for i in range(60)))
    monkeypatch.setattr(sys, "argv", ["", str(path), "--val-fraction", "0.3"])
    baselines.main()
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith("60 of 60 pairs") and "95 % interval" in header
    table = {row[:26].strip(): row[26:].split() for row in rows}
    n = int(table["longer"][4])
    assert 6 < n < 30 and f"{n} " in first
    assert {name: row[0] for name, row in table.items()} == {
        "longer": "0.0000", "shorter": "1.0000", "no artifact": "0.5000", "bag of words": "1.0000"}
    assert " ".join(table["no artifact"]).endswith(f"{n} ({n} ties)")
    expected = accuracy_interval(torch.ones(n))
    assert table["shorter"][1:4] == [f"{expected['low']:.3f}", "to", f"{expected['high']:.3f}"]
    assert len(load_pairs(str(path), "data", 1024, ALPACA)[0]) == 60


def test_one_file_is_expected(monkeypatch, capsys):
    for files in ([], ["a.json", "b.json"]):
        assert "expected one" in main_error(baselines.main, files, monkeypatch, capsys)
