"""Every committed figure is redrawn by runs/figures.sh from logs with configuration and commit."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.common import ROOT, main_error
from matplotlib.image import imread

from image import plot_frontier, plot_loss, plot_report, plot_samples
from minigpt2.metrics import read_log

IMAGE = ROOT / "image"
SCRIPTS = {"loss": plot_loss, "report": plot_report, "frontier": plot_frontier,
           "samples": plot_samples}


def lines_of_figures() -> dict[str, tuple[str, list[str]]]:
    """The lines `draw SCRIPT FIGURE LOG... [flags]` of runs/figures.sh, with globs expanded."""
    text = (ROOT / "runs" / "figures.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in re.findall(r"(?m)^draw (?!\()(.*)", text):
        script, figure, *arguments = shlex.split(line)
        found[figure] = script, [name for one in arguments for name in (
            sorted(str(path.relative_to(IMAGE / "logs")) for path in (IMAGE / "logs").glob(one))
            if one.endswith(".jsonl") else [one])]
    return found


FIGURES = lines_of_figures()


@pytest.mark.parametrize("figure", sorted(path.stem for path in IMAGE.glob("*.png")))
def test_every_committed_figure_is_that_of_its_logs(figure, tmp_path, monkeypatch):
    script, arguments = FIGURES[figure]
    monkeypatch.chdir(IMAGE / "logs")
    monkeypatch.setattr("sys.argv", [script, *arguments, "--out", str(tmp_path / "x.png")])
    SCRIPTS[script].main()
    drawn, committed = imread(tmp_path / "x.png"), imread(IMAGE / f"{figure}.png")
    assert drawn.shape == committed.shape
    changed = abs(drawn - committed).max(-1) > 0.5  # a marker that moves changes 160 pixels
    assert changed.sum() < 100, "floating-point differences between machines change a few"


def test_samples_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    """What inference.py prints is read back whole: lines, a blank response, its end."""
    one, two, none = (tmp_path / name for name in ("a_one.txt", "a_two.txt", "none.txt"))
    one.write_text("prompt:   a\nresponse: two\n\nlines\n          [3 tokens, ended by x]\n\n"
                   "prompt:   b\nresponse: \n          [blank, 1 tokens, ended by y]\n\n")
    two.write_text("prompt:   a\nresponse: b\n          [3 tokens, ended by x]\n\n")
    none.write_bytes(b"step 1: loss 2 \xff\n")
    first, second = plot_samples.read_samples(one)
    assert first == (["a"], ["two", "lines", "[3 tokens, ended by x]"])
    assert second == (["b"], ["[blank, 1 tokens, ended by y]"])
    for files, words in (((one, two), "equally many prompts"), ((), "one file or more"),
                         ((one, none), f"{none} holds no prompt")):
        arguments = [*map(str, files), "--out", str(tmp_path / "x.png")]
        assert words in main_error(plot_samples.main, arguments, monkeypatch, capsys)
    monkeypatch.setattr("sys.argv", ["plot_samples.py", str(one), "--out", str(tmp_path / "x.png")])
    plot_samples.main()
    assert (tmp_path / "x.png").stat().st_size > 1000


def commit_of(log: Path) -> str | None:
    """The commit in a run's first record, or in a report's flags."""
    if log.suffix == ".jsonl":
        first = json.loads(log.read_text(encoding="utf-8").partition("\n")[0])
        assert first["kind"] == "run" and {"seed", "max_lr", "dtype", "torch"} <= first.keys(), log
        return first["git_commit"]
    report = json.loads(log.read_text(encoding="utf-8"))
    return report["flags"].get("git_commit") if isinstance(report, dict) else None


def test_the_logs_of_figures_hold_configuration_and_commit():
    """Those that do not are named in the docs."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    section = page.partition("## Figures\n")[2].partition("\n## ")[0]
    for script, arguments in FIGURES.values():
        for log in (IMAGE / "logs" / name for name in arguments if ".json" in name):
            commit = commit_of(log)
            assert f"`{log.name}`" in section if commit is None else re.fullmatch(
                r"[0-9a-f]{40}(\+changes)?", commit), f"{script}: {log}"


def test_the_comparison_of_recipes_is_that_of_its_runs():
    lines = (IMAGE / "logs" / "bench_recipes.jsonl").read_text(encoding="utf-8").splitlines()
    recipes = {one["recipe"]: one for one in map(json.loads, lines) if one["bench"] == "recipe"}
    for name, recipe in recipes.items():
        logs = sorted((IMAGE / "logs" / "recipes").glob(f"{name}_*.jsonl"))
        last = [max(read_log(log)["val"].items())[1]["loss"] for log in logs]
        assert [round(loss, 4) for loss in last] == recipe["losses"] and len(last) == 3
    script = (ROOT / "runs" / "fast.sh").read_text(encoding="utf-8")
    for name in ("max_lr", "muon_lr"):  # the script runs the recipe that was compared
        assert f"--{name.replace('_', '-')} {recipes['fast'][name]} " in script
