"""The rules that a reward model is compared with."""

import math

import torch

from minigpt2.preferences import make_pairs
from rlhf_data.baselines import (
    accuracy_interval,
    bag_of_words_margins,
    print_accuracies,
    rule_margins,
)


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


def test_the_rules_are_printed_with_their_interval(capsys):
    n = 18
    print_accuracies({name: accuracy_interval(torch.full((n,), value)) for name, value in
                      [("longer", -1.0), ("shorter", 1.0), ("no artifact", 0.0)]})
    header, *rows = capsys.readouterr().out.splitlines()
    assert "95 % interval" in header
    table = {row[:26].strip(): row[26:].split() for row in rows}
    assert {name: row[0] for name, row in table.items()} == {
        "longer": "0.0000", "shorter": "1.0000", "no artifact": "0.5000"}
    assert " ".join(table["no artifact"]).endswith(f"{n} ({n} ties)")
    expected = accuracy_interval(torch.ones(n))
    assert table["shorter"][1:4] == [f"{expected['low']:.3f}", "to", f"{expected['high']:.3f}"]
