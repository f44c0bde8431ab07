"""Command lines from dataclasses, and errors in one line."""

import ast
import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from helpers.common import ROOT, assert_user_error, exit_status, run_script, script_env

from minigpt2.config import UserError, first_line, flag, parse_config, run_main, share_cores


@dataclass(frozen=True)
class Example:
    names: tuple[str, ...] = flag((), "names", positional=True)
    rate: float = flag(0.1, "a rate of 100%", minimum=0, below=1)
    folder: str = flag("here", "a folder")
    max_steps: int | None = flag(None, "steps", minimum=1)
    kind: Literal["a", "b"] = flag("a", "a kind")
    compile: bool | None = flag(None, "three states")
    resume: bool = flag(False, "two states")
    size: int | Literal["auto"] = flag(32, "a number or a word", minimum=1, below=100)
    mode: Literal["x", "y"] | None = flag(None, "a word or none")
    path: str | None = flag("~/default", "a path", is_path=True)


def parse(*argv: str) -> Example:
    return parse_config(Example, argv, description="")


def test_values_and_defaults():
    assert parse() == Example(path=os.path.expanduser("~/default"))
    assert parse("x", "y", "--rate", "1e-3", "--max-steps", "5", "--kind", "b", "--no-compile",
                 "--resume", "--path", "p") == Example(
        ("x", "y"), 1e-3, "here", 5, "b", False, True, path="p")
    assert parse("--size", "8", "--mode", "y", "--path", "p") == Example(size=8, mode="y", path="p")
    assert parse("--size", "auto").size == "auto"


@pytest.mark.parametrize("argv, words", [
    (["--unknown", "1"], "--unknown"),
    (["--max", "5"], "--max"),  # an abbreviation of --max-steps
    (["--max-steps", "five"], "five"),
    (["--max-steps", "0"], "at least 1"),
    (["--rate", "-1"], "at least 0"),
    (["--rate", "nan"], "at least 0"),
    (["--rate", "inf"], "at least 0"),
    (["--rate", "1.0"], "less than 1"),
    (["--folder", ""], "--folder is empty"),
    (["--kind", "c"], "invalid choice"),
    (["--mode", "z"], "invalid choice"),
    (["--size", "Auto"], "--size: 'Auto', expected an integer or auto"),
    (["--size", "1.5"], "expected an integer or auto"),
    (["--size", ""], "expected an integer or auto"),
    (["--size", "0"], "at least 1 and less than 100"),
    (["--size", "100"], "less than 100"),
    (["-b"], "arguments: -b (--help lists the flags, -- ends them)"),
    (["--folder", "-x"], "--folder: expected one argument"),
    (["--path", ""], "--path is empty"),
])
def test_bad_flags_are_one_line_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and words in error


def test_prompts_and_paths_are_taken_literally(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for words in (["--max_steps"], ["-b", "--k=1", "--", "c"], ["-5"], ["~/x", "*"], ["caf\udce9"]):
        assert parse("--", *words).names == tuple(words)
        assert parse("a", "--max-steps", "3", "--", *words).names == ("a", *words)
    assert parse("--a_b c_d", "-5 x_y").names == ("--a_b c_d", "-5 x_y")  # not one word: no flag
    assert parse("--folder=a_b").folder == "a_b" and parse("--folder", "~/x").folder == "~/x"
    for path, expected in (("~/a b", "/home/me/a b"), ("~", "/home/me"), ("a~", "a~"),
                           ("x[1]*?", "x[1]*?"), ("~nobody-here/x", "~nobody-here/x")):
        assert parse("--path", path).path == parse(f"--path={path}").path == expected


@dataclass(frozen=True)
class FlagsOnly:
    files: str = flag("", "a quoted glob", may_be_empty=True)


@pytest.mark.parametrize("argv, words", [
    (["--files", "a.txt", "b.txt"], "arguments: b.txt (--help lists the flags"),
    (["--", "b.txt"], "unrecognized arguments: -- b.txt")])
def test_values_without_a_flag_are_refused(argv, words, capsys):
    with pytest.raises(SystemExit):
        parse_config(FlagsOnly, argv, description="")
    assert words in capsys.readouterr().err


def help_text(cls: type, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_config(cls, ["--help"], description="")
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_prints_every_field(capsys):
    text = help_text(Example, capsys)
    assert all(word in text for word in ("--max-steps", "a rate of 100%", "(default: 0.1)"))


@dataclass(frozen=True)
class Derived(Example):
    own: int = flag(1, "an own flag", minimum=0)
    rate: float = flag(0.2, "another default", minimum=0, below=1)


@dataclass(frozen=True)
class Last(Derived):
    last: str = flag("", "the last one", may_be_empty=True)


def test_flags_are_inherited_and_overridden(capsys):
    text = " ".join(help_text(Last, capsys).split())
    assert all(f" {name} " in text for name in ("--last", "--rate", "--folder", "--own"))
    assert "another default (default: 0.2)" in text and "(default: 0.1)" not in text
    assert parse_config(Last, ["x", "--own", "3", "--max-steps", "5", "--path", "p"],
                        description="") == Last(names=("x",), own=3, max_steps=5, path="p")


def exit_of(main, capsys) -> tuple[int, str]:
    return exit_status(main), capsys.readouterr().err


def test_run_main_reports_an_error_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["trainer.py"])

    def mistake():
        raise UserError("--data-dir x does not exist")

    def full_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "out/log")

    assert exit_of(mistake, capsys) == (2, "trainer.py: error: --data-dir x does not exist\n")
    for number in (errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS):
        def refused(number=number):
            raise OSError(number, os.strerror(number), "out/log")

        error = f"trainer.py: error: out/log: {os.strerror(number)}\n"
        assert exit_of(refused, capsys) == (2, error)
    code, error = exit_of(full_disk, capsys)
    assert code == 2 and "out/log" in error and error.count("\n") == 1
    assert exit_of(lambda: None, capsys) == (0, "")


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    def allocate(message="CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has"):
        raise RuntimeError(message)

    monkeypatch.setattr(sys, "argv", ["inference.py"])
    code, error = exit_of(allocate, capsys)
    assert code == 2 and error.count("\n") == 1 and "lower --batch-size or --workers" in error
    assert "out of memory (CUDA out of memory. Tried to allocate 2 GiB)" in error
    with pytest.raises(RuntimeError, match="another"):
        run_main(lambda: allocate("another error"))


def test_the_first_line_of_a_message():
    assert first_line(ValueError("\nC++ compile error\nmore")) == "C++ compile error"
    assert first_line(ValueError("\n")) == first_line(ValueError()) == "ValueError"


def test_rank_0_reports_an_error_first(capsys, monkeypatch):
    def mistake():
        raise UserError("no data")

    delays = []
    monkeypatch.setattr("minigpt2.config.time.sleep", delays.append)
    monkeypatch.setattr(sys, "argv", ["trainer.py"])
    monkeypatch.setenv("RANK", "3")
    assert exit_of(mistake, capsys) == (2, "trainer.py: error: no data (rank 3)\n")
    assert delays == [3.0]  # if rank 0 has failed too, torchrun stops this rank meanwhile
    for rank, local_rank in (("9", "1"), ("8", "0"), ("1", "1"), ("", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        note = f" (rank {rank})" if rank else ""
        assert exit_of(mistake, capsys) == (2, f"trainer.py: error: no data{note}\n")
    assert delays == [3.0, 6.0, 3.0, 3.0]  # rank 8 speaks for the second node, rank 0 for all


def test_a_closed_pipe_gives_no_traceback():
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom minigpt2.config import run_main\n"
            "def main():\n    for i in range(100_000): print('line', i)\nrun_main(main)\n")
    result = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "$CODE" | head -1'],
                            env=os.environ | {"CODE": code}, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("line 0\n", "")


def test_a_log_file_shows_every_line_at_once():
    """Else a validation loss would stand there minutes later, after all progress lines."""
    code = (f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from minigpt2.config import run_main\n"
            "run_main(lambda: (print('val loss'), os.kill(os.getpid(), 9)))\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env=script_env())
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, "val loss\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_full_disk_is_reported_when_the_last_line_is_written(end):
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom minigpt2.config import run_main\n"
            f"run_main(lambda: print('a line', end={end!r}))\n")
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE,
                                text=True, env=script_env())
    assert "error: no space left while writing output" in result.stderr
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


def test_an_unexpected_error_keeps_its_traceback():
    def bug():
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with pytest.raises(OSError):
        run_main(bug)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["trainer.py", "finetune.py", "inference.py",
                                    "pretrain_data/fineweb_downloader.py",
                                    "pretrain_data/pretokenized_downloader.py",
                                    "pretrain_data/text_to_shards.py",
                                    "finetune_data/alpaca_downloader.py", "image/plot_loss.py"])
def test_scripts_refuse_unknown_flags(script):
    assert_user_error(run_script(ROOT / script, "--no-such-flag", check=False), "--no-such-flag")


def run_bare(code: str, *arguments: str, **chosen: str) -> str:
    """What code prints, without OpenMP's variables but those that are chosen."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env | chosen, cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout.strip()


SHOW = ("import os; from minigpt2.config import share_cores; share_cores()\n"
        "print(*map(os.environ.get, ['OMP_NUM_THREADS', 'GOMP_SPINCOUNT', 'KMP_BLOCKTIME']))")


@pytest.mark.parametrize("chosen, shown", [
    ({}, "None 10000 0"), ({"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "1"}, "1 7 0"),
    ({"OMP_WAIT_POLICY": "PASSIVE"}, "None None None")])
def test_threads_wait_asleep_unless_the_user_chose(chosen, shown):
    assert run_bare(SHOW, **chosen) == shown


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("chosen", [False, True])
def test_torchruns_ranks_share_the_cores(chosen):
    """torchrun gives each rank one thread, unless the user's environment names a number."""
    torchrun = ("import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], "
                "env=os.environ | {'OMP_NUM_THREADS': '1', 'LOCAL_WORLD_SIZE': '1'})")
    threads = run_bare(torchrun, SHOW, **({"OMP_NUM_THREADS": "1"} if chosen else {})).split()[0]
    assert int(threads) == (1 if chosen else len(os.sched_getaffinity(0)))


@pytest.mark.parametrize("ranks, threads", [("4", "2"), ("16", "1")])
def test_each_rank_of_a_node_gets_its_part_of_the_cores(ranks, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"")  # the parent has chosen nothing
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("script", ["trainer", "finetune", "reward", "dpo", "rlhf", "inference",
                                    "chat", "evaluate", "judge"])
def test_every_script_shares_the_cores_before_pytorch_is_imported(script):
    """OpenMP reads the variables when PyTorch loads it."""
    body = [ast.unparse(node) for node in ast.parse(
        (ROOT / f"{script}.py").read_text(encoding="utf-8")).body[1:]]
    assert "share_cores()" in body[0] and body[0].startswith("if __name__ == '__main__'")
