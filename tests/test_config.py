import errno
import os
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT, assert_user_error, run_script

from config import UserError, flag, parse_config, run_main


@dataclass(frozen=True)
class Example:
    names: tuple[str, ...] = flag((), "names", positional=True)
    rate: float = flag(0.1, "a rate of 100%", minimum=0)
    max_steps: int | None = flag(None, "updates", minimum=1)
    kind: Literal["a", "b"] = flag("a", "a kind")
    compile: bool | None = flag(None, "three states")
    resume: bool = flag(False, "two states")


def parse(*argv: str) -> Example:
    return parse_config(Example, argv, description="")


def test_values_and_defaults():
    assert parse() == Example()
    assert parse("x", "y", "--rate", "1e-3", "--max-steps", "5", "--kind", "b", "--no-compile",
                 "--resume") == Example(("x", "y"), 1e-3, 5, "b", False, True)


@pytest.mark.parametrize("argv, words", [
    (["--unknown", "1"], "--unknown"),
    (["--max", "5"], "--max"),  # an abbreviation of --max-steps
    (["--max-steps", "five"], "five"),
    (["--max-steps", "0"], "at least 1"),
    (["--rate", "-1"], "at least 0"),
    (["--rate", "nan"], "at least 0"),
    (["--kind", "c"], "invalid choice"),
])
def test_bad_flags_are_one_line_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


def test_help_prints_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(word in text for word in ("--max-steps", "a rate of 100%", "(default: 0.1)"))


def exit_of(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    return stopped.value.code, capsys.readouterr().err


def test_run_main_turns_mistakes_into_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py"])

    def mistake():
        raise UserError("--data-dir x does not exist")

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "out/log")

    assert exit_of(mistake, capsys) == (2, "trainer.py: error: --data-dir x does not exist\n")
    code, error = exit_of(full_disk, capsys)
    assert code == 2 and "out/log" in error and error.count("\n") == 1
    assert exit_of(lambda: None, capsys) == (0, "")


def test_a_defect_of_ours_keeps_its_traceback():
    def defect():
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(OSError):
        run_main(defect)


@pytest.mark.parametrize("script", ["trainer.py", "finetune.py", "inference.py",
                                    "pretrain_data/fineweb_downloader.py",
                                    "finetune_data/alpaca_downloader.py", "image/plot_loss.py"])
def test_scripts_refuse_a_flag_that_does_not_exist(script):
    assert_user_error(run_script(ROOT / script, "--no-such-flag", check=False), "--no-such-flag")
