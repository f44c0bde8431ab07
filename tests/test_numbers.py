"""Every measured number of README.md and docs/ is in the log that the text names."""

import json

import pytest
from helpers.common import ROOT, run_script

from image import check_numbers
from image.check_numbers import claims_in, errors_in


def test_every_measured_number_is_in_its_log():
    result = run_script(ROOT / "image" / "check_numbers.py", check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_wrong_digits_of_results_are_found():
    """Last digits of numbers in tables made wrong, one at a time: the error names file, line,
    number and log. A few numbers of two digits become another one of the same records."""
    found = []
    for page in check_numbers.pages():
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        claims = [one for one in claims_in("\n".join(lines)) if lines[one[0] - 1].startswith("|")]
        for line, number, _, logs, _ in claims[::1 if page == "README.md" else 4]:
            row, at = lines[line - 1], number.end("value") - 1
            wrong = f"{row[:at]}{(int(row[at]) + 1) % 10}{row[at + 1:]}"
            errors = errors_in(page, "\n".join([*lines[:line - 1], wrong, *lines[line:]]))
            found.append(bool(errors))
            for error in errors:
                assert error.startswith(f"{page}:{line}: {wrong[number.start('value'):at + 1]}")
                assert any(str(log.relative_to(ROOT)) in error for log in logs)
    assert len(found) > 100 and sum(found) / len(found) > 0.9


RECORDS = [{"model": "30M", "speed": 1234.5, "bytes": 2_540_000_000, "share": 0.0218},
           {"model": "124M", "speed": 98.76, "note": "7.25 at the end"},
           {"kind": "train", "loss": 3.21}, {"kind": "val", "loss": 4.32, "change": -0.075}]
NO_LOG = "has no log beside it"


@pytest.mark.parametrize("text, errors", [
    ("98.8 tokens/s (`a.jsonl`)", []), ("98.7 tokens/s (`a.jsonl`)", ["1: 98.7 tokens/s"]),
    ("1.2K tokens/s, 2.5 GB, 2.2 % (`a.jsonl`)", []), ("2.6 GB (`a.jsonl`)", ["1: 2.6 GB"]),
    ("first 4.32,\nthen 3.21\n(`a.jsonl`)", ["2: 3.21"]),  # single steps do not count
    ("0.075 nats less, a change of -0.075, or -4.32 (`a.jsonl`)", ["1: -4.32"]),
    ("7.25 (`image/logs/a.jsonl`)\n\n7.25\n\n## New section\n\n7.25", [f"7: 7.25 {NO_LOG}"]),
    ("with the 30M model 98.8 tokens/s (`a.jsonl`)", ["1: 98.8 tokens/s"]),
    ("`a.jsonl`\n\n| model | |\n|---|---|\n| 124M | 99 |\n| 30M | 99 |", ["6: 99"]),
    ("| model | | log |\n|---|---|---|\n| 124M | 99 | `a.jsonl` |\n| 30M | 9.9 | |", [
        f"4: 9.9 {NO_LOG}"]),
    ("12 and 14 s", [f"1: 12 s {NO_LOG}", f"1: 14 s {NO_LOG}"]),
    ("GPT-2 has 1.5B parameters, 12 layers, `--lr 3e-4`, `0.1`:\n\n```\n9.5 s\n```", []),
    ("Python 3.11 or newer, 40 GB of disk, CC BY-NC 4.0", []),
    ("<!-- not measured: settings -->\n0.5 and 30 s\n\n0.5", [f"4: 0.5 {NO_LOG}"]),
    ("## A\n\n<!-- not measured: sizes -->\n\n2 GB\n\n### B\n\n2 GB, as in\n\n## C\n\n2 GB", [
        f"13: 2 GB {NO_LOG}"]),
    ("# A\n\n<!-- not measured: a diary -->\n\n9.9\n\n9.9 (`a.jsonl`)", ["7: 9.9"]),
    ("0.95 (`tests/test_a.py`)", []), ("0.96 (`tests/test_a.py`)", ["1: 0.96"])])
def test_rules(text, errors, tmp_path, monkeypatch):
    for folder in ("image/logs", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "image/logs/a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    (tmp_path / "tests/test_a.py").write_text("assert share > 0.95\n")
    monkeypatch.setattr(check_numbers, "ROOT", tmp_path)
    found = errors_in("page", text)
    assert len(found) == len(errors)
    for one, expected in zip(found, errors, strict=True):
        assert one.startswith(f"page:{expected}")
