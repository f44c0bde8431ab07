"""A tiny model from text to answers on the command line, and what the docs say about scripts."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import runpy
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.common import ROOT, TINY_FLAGS, assert_user_error, run_script, run_torchrun

from finetune_data import alpaca_downloader
from minigpt2.checkpoint import save_checkpoint
from minigpt2.config import parse_config
from minigpt2.metrics import read_log
from model import GPT, GPTConfig

SENTENCES = ["The cat sat on the mat and slept.", "A dog ran over the hill to the sea.",
             "Rain fell all night on the old roof.", "She read the letter twice and smiled."]


@pytest.mark.slow
def test_from_parquet_to_an_answer(tmp_path):
    table = pyarrow.table({"text": [f"{a} {b} {c}" for a in SENTENCES for b in SENTENCES
                                    for c in SENTENCES]})
    pyarrow.parquet.write_table(table, tmp_path / "web.parquet")
    run_script("-m", "pretrain_data.text_to_shards", tmp_path / "*.parquet", "--out-dir",
               tmp_path / "shards", "--workers", 1)
    run_torchrun(2, ROOT / "trainer.py", *TINY_FLAGS, "--data-dir", tmp_path / "shards",
                 "--out-dir", tmp_path / "pretrain", "--total-batch-size", 128, "--max-lr", 0.01,
                 "--micro-batch-size", 4, "--max-steps", 12, "--warmup-steps", 2,
                 "--eval-interval", 6, "--save-interval", 6)
    val = read_log(tmp_path / "pretrain" / "metrics.jsonl")["val"]
    assert val[12]["loss"] < val[6]["loss"] < val[0]["loss"]

    # the checkpoint is what others read
    from transformers import AutoTokenizer, GPT2LMHeadModel
    folder = tmp_path / "pretrain" / (tmp_path / "pretrain" / "latest").readlink()
    ids = AutoTokenizer.from_pretrained(folder)("The cat", return_tensors="pt")
    assert GPT2LMHeadModel.from_pretrained(folder)(**ids).logits.shape == (1, 2, 50257)

    rows = [{"instruction": "Hi", "input": "", "output": sentence} for sentence in SENTENCES * 3]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    short = run_script(ROOT / "finetune.py", "--checkpoint", tmp_path / "pretrain", "--data",
                       tmp_path / "rows.json", "--out-dir", tmp_path / "no", check=False)
    assert short.returncode == 2 and "12 over 32 tokens" in short.stderr  # the template is long

    run_script(ROOT / "trainer.py", *TINY_FLAGS, "--block-size", 128, "--data-dir",
               tmp_path / "shards", "--out-dir", tmp_path / "longer", "--total-batch-size", 128,
               "--micro-batch-size", 8, "--max-steps", 3, "--warmup-steps", 0)
    run_script(ROOT / "finetune.py", "--checkpoint", tmp_path / "longer" / "latest", "--data",
               tmp_path / "rows.json", "--out-dir", tmp_path / "tuned", "--batch-size", 4,
               "--micro-batch-size", 4, "--max-lr", 0.01, "--epochs", 1)
    printed = run_script(ROOT / "inference.py", "--checkpoint", tmp_path / "tuned", "--max-steps",
                         8, "--temperature", 0, "Hi").stdout
    assert re.search(r"prompt:   Hi\nresponse: .*\n +\[\d tokens, ended by", printed, re.DOTALL)


def tracked_files() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.split()


def script_flags() -> dict[str, set[str]]:
    """The flags of every script, by path."""
    flags = {}
    for path in (name for name in tracked_files() if name.endswith("_speed.py")
                 or (name.endswith(".py") and "tests/" not in name)):
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__ and (
                    value.__name__.endswith("Config") and value.__name__ != "GPTConfig"):
                fields = {field.name.replace("_", "-") for field in dataclasses.fields(value)}
                flags[path] = flags.get(path, {"help", "no-compile"}) | fields
    return flags


def test_every_file_is_described():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    described = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    for path in map(Path, tracked_files()):
        if path.suffix in (".py", ".sh") and path.parts[0] != "tests" and path.stem != "__init__":
            assert f"| `{path}` |" in described, f"docs/development.md does not say what {path} is"
            name = path.name if len(path.parts) == 1 else f"{path.parts[0]}/"
            assert re.search(rf"(?m)^{name} ", readme), f"README.md does not say what {name} is"
    for path in re.findall(r"^\| `([\w/.]+)` \|", described, re.MULTILINE):
        assert (ROOT / path).exists(), path


def test_docs_and_shell_scripts_use_only_flags_that_exist():
    """Flags in a command belong to its script; flags mentioned elsewhere, to any script."""
    flags = script_flags()
    every = set().union(*flags.values())
    of_others = {"standalone", "nproc-per-node", "nnodes", "rdzv-backend", "rdzv-endpoint",
                 "rdzv-id", "max-restarts", "nodes", "cpus-per-task",  # torchrun's and SLURM's
                 "output_dir", "outfile", "outtype",  # of other projects' converters
                 "index-url", "force-reinstall",  # pip's
                 "rlhf"}  # of runs/demo.sh
    checked = 0
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("runs/*.sh")):
        if path.name in ("LOG.md", "setup.sh"):  # the past, and pip's flags
            continue
        text = re.sub("(?m)^#SBATCH .*", "", path.read_text(encoding="utf-8"))
        for line in text.replace("\\\n", " ").splitlines():
            scripts = [name for name in flags if re.search(rf"(^|\s){name}\s", line)]
            known = flags[scripts[0]] if len(scripts) == 1 else every
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", line):
                checked += 1
                names = {flag, flag.replace("_", "-")}
                assert names & (known | of_others), f"{path}: --{flag} in {line}"
    assert checked > 100


RECORD = """#!/usr/bin/env bash
printf '%s\\037' "$(basename "$0")" "$@" >> "$RECORD"; echo >> "$RECORD"
[[ ! -p /dev/stdin ]] || cat > /dev/null
"""  # in place of python and torchrun: one command per line


@pytest.mark.parametrize("script, arguments, stages", [
    ("demo.sh", ["--rlhf", "FOLDER"], ["pydocs_corpus", "trainer", "pydocs_questions", "finetune",
                                       "inference", "rlhf", "plot_frontier", "inference"]),
    ("stories.sh", ["FOLDER/stories.parquet", "FOLDER"], [
        "text_to_shards", "trainer", "finetune", "rlhf", "judge", *["inference"] * 3]),
    ("gpt2_124m.sh", ["4"], ["fineweb_downloader", "trainer", "alpaca_downloader", "finetune",
                             "inference"]),
    ("fast.sh", ["2", "--max-steps", "9"], ["trainer"]),
    ("recipes.sh", ["FOLDER"], [*["trainer"] * 6, "plot_loss"]),
    ("figures.sh", ["FOLDER"], [*["plot_loss"] * 3, *["plot_report"] * 2, "plot_samples",
                                "plot_frontier"])])
def test_every_command_of_a_pipeline_is_accepted(script, arguments, stages, tmp_path):
    """All stages, in order, with paths that have a space: their scripts accept the arguments."""
    folder, tools = tmp_path / "a b", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    (folder / "stories.parquet").touch()
    for name in ("python", "torchrun"):
        (tools / name).write_text(RECORD)
        (tools / name).chmod(0o755)
    subprocess.run(["bash", f"runs/{script}", *(word.replace("FOLDER", str(folder))
                                                for word in arguments)],
                   cwd=ROOT, check=True, capture_output=True, env=os.environ | {
                       "PATH": f"{tools}:{os.environ['PATH']}", "VIRTUAL_ENV": "active",
                       "RECORD": str(tmp_path / "record")})
    ran = []
    for line in (tmp_path / "record").read_text().split("\037\n")[:-1]:
        words = line.split("\037")
        path = next((Path(word) for word in words if word.endswith(".py") and word[0] != "/"), None)
        if path:  # not pip, and no program on standard input
            module = importlib.import_module(".".join(("image", path.stem) if path.parts[0] == ".."
                                                      else path.with_suffix("").parts))
            configs = [value for value in vars(module).values() if inspect.isclass(value)
                       and value.__module__ == module.__name__
                       and value.__name__.endswith("Config")]
            parse_config(configs[-1], words[words.index(str(path)) + 1 :], description="")
            ran.append(path.stem)
    assert ran == stages


def test_the_requests_of_stories_leave_out_rows_without_text(tmp_path):
    """Too few stories are one line."""
    program = (ROOT / "runs" / "stories.sh").read_text(encoding="utf-8")
    program = program.partition("<< 'END'\n")[2].partition("\nEND\n")[0]
    story = "The cat saw a ball. " * 20
    pyarrow.parquet.write_table(pyarrow.table({"text": [story, None]}), tmp_path / "a.parquet")
    result = run_script("-c", program, tmp_path / "a.parquet", tmp_path, check=False)
    assert result.returncode == 1 and result.stderr.strip().endswith(
        "has 1 stories of 50 to 160 words with two things to ask for, expected at least 5,000")


@pytest.mark.parametrize("page", ["README.md", "docs/sampling.md"])
def test_the_python_program_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "out" / "finetune", 0,
                    GPT(GPTConfig(block_size=128, n_layer=1, n_head=2, n_embd=16)))
    [program] = [block for block in re.findall(
        "```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        if "load_model" in block]
    (tmp_path / "program.py").write_text(program)
    runpy.run_path(str(tmp_path / "program.py"))
    assert "[" in capsys.readouterr().out  # a list of one text


@pytest.mark.slow
def test_default_paths_do_not_depend_on_the_current_folder():
    for name, folder in (("trainer.py", "pretrain_data/fineweb"),
                         ("finetune.py", "finetune_data/alpaca.json"),
                         ("pretrain_data/pydocs_corpus.py", "pretrain_data/pydocs")):
        text = run_script(ROOT / name, "--help", cwd=ROOT / "tests").stdout
        assert str(ROOT / folder) in "".join(text.split()), name
    result = run_script(ROOT / "pretrain_data" / "fineweb_downloader.py", "--verify", "--edu",
                        cwd=ROOT / "tests", check=False)
    assert_user_error(result, str(ROOT / "pretrain_data" / "fineweb-edu"))


def test_alpaca_goes_beside_its_script(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["alpaca_downloader.py", "--cleaned"])
    asked = []
    monkeypatch.setattr(alpaca_downloader, "download_rows",
                        lambda *arguments: asked.append(arguments))
    alpaca_downloader.main()
    [(repo, commit, _, _, path)] = asked
    assert path == ROOT / "finetune_data" / "alpaca_cleaned.json"
    assert repo == "yahma/alpaca-cleaned" and len(commit) == 40
