"""What the repository promises about its own source: layout, imports, sizes, and plain style."""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from helpers.common import ROOT, script_env

SCRIPTS = {"trainer", "finetune", "reward", "dpo", "rlhf", "inference", "chat", "evaluate",
           "judge"}  # at the root
FOLDERS = ("minigpt2", "pretrain_data", "finetune_data", "rlhf_data", "bench", "image")
SOURCES = sorted(path.relative_to(ROOT) for path in [
    *ROOT.glob("*.py"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))])
TORCH_FREE = {"minigpt2.config", "minigpt2.files", "minigpt2.tokenizer", "minigpt2.shards",
              "minigpt2.hub", "minigpt2.preferences"}  # and all of pretrain_data/
SHARED_NAMES = {"main", "train"}  # each script's own story
CONSTANT_CALLS = {"TypeVar", "cache", "compile", "resolve", "Path", "GPTConfig", "flag", "str"}
# Lines, docstrings and comments included; README in bytes
BUDGETS = {"root": 2700, "minigpt2": 3300, "bench": 900, "data": 1200}
LONGEST_ROOT_FILE, LONGEST_README = 420, 12 * 1024


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """pretrain_data/corpus.py -> pretrain_data.corpus"""
    return ".".join(path.with_suffix("").parts)


MODULES = {module_name(path): path for path in SOURCES}


@functools.cache
def imports(name: str) -> frozenset[str]:
    """Every module that a file of ours imports, anywhere in it: `minigpt2.files`, `torch`, ..."""
    return imported_by(parse(MODULES[name]))


def imported_by(tree: ast.Module) -> frozenset[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return frozenset(found)


def import_errors(name: str, imported: frozenset[str]) -> list[str]:
    """How a module called `name` with these imports violates the import rules."""
    ours = {one for one in imported if one in MODULES}
    folder = name.partition(".")[0] if "." in name else ""
    if name == "model":
        bad = ours - {"minigpt2.loss"}
    elif folder == "minigpt2":
        bad = {one for one in ours if one != "model" and not one.startswith("minigpt2.")}
    else:
        bad = ours & (SCRIPTS - {"inference"})
        if folder != "bench":
            bad |= {one for one in ours if one.startswith("bench.")}
    errors = [f"{name} imports {one}" for one in sorted(bad)]
    if folder == "pretrain_data" or name in TORCH_FREE:
        errors += [f"{name} imports torch" for one in imported if one.split(".")[0] == "torch"]
        errors += [f"{name} imports {one}, which imports torch" for one in sorted(ours)
                   if "torch" in with_all_imports(one)]
    return errors


def with_all_imports(name: str) -> set[str]:
    """The top-level names that importing a module of ours imports, directly or not."""
    seen, waiting, found = set(), [name], set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in MODULES:
            waiting += imports(one)
        found.add(one.split(".")[0])
    return found


def test_the_root_holds_what_a_user_runs_the_model_and_the_loader():
    assert {path.stem for path in SOURCES if len(path.parts) == 1} == (
        SCRIPTS | {"model", "dataloader"})


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_rules(name):
    assert import_errors(name, imports(name)) == []


@pytest.mark.parametrize("name, line", [
    ("model", "from minigpt2.config import flag"), ("minigpt2.run", "import inference"),
    ("minigpt2.run", "from pretrain_data.corpus import write_corpus"),
    ("minigpt2.files", "import torch.nn as nn"), ("pretrain_data.corpus", "from torch import nn"),
    ("minigpt2.shards", "from minigpt2 import metrics"), ("finetune", "from trainer import train"),
    ("trainer", "from bench import train"), ("chat", "def f():\n    import finetune")])
def test_a_broken_import_rule_is_found(name, line):
    assert import_errors(name, imported_by(ast.parse(line)))


def test_only_required_packages_are_imported_by_all_means():
    """What a module body imports, of ours or of the tests, is in the standard library or required:
    on a machine with more packages, nothing else would show that one is missing."""
    required = {re.split("[=<>]", line)[0].replace("-", "_")
                for name in ("requirements.txt", "requirements-test.txt")
                for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
                if line[:1].isalpha()}
    ours = {one.split(".")[0] for one in MODULES} | {"helpers", "tiktoken_ext"}
    collected = [*ROOT.glob("tests/*.py"), *ROOT.glob("tests/helpers/*.py"),
                 *ROOT.glob("tests/referees/test_*.py"), ROOT / "tests/referees/conftest.py"]
    for path in [*SOURCES, *(path.relative_to(ROOT) for path in collected)]:
        beside = {other.stem for other in (ROOT / path).parent.glob("*.py")}
        for node in parse(path).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {name.split(".")[0] for name in ([node.module] if isinstance(
                    node, ast.ImportFrom) else [alias.name for alias in node.names])}
                assert names <= sys.stdlib_module_names | required | ours | beside, path


def over_budget(sizes: dict[Path, int]) -> list[str]:
    """Which of the line budgets these files exceed."""
    totals = defaultdict(int)
    for path, lines in sizes.items():
        folder = "root" if len(path.parts) == 1 else path.parts[0]
        totals["data" if folder.endswith("_data") else folder] += lines
    errors = [f"{name} has {totals[name]} lines, {budget} are allowed"
              for name, budget in BUDGETS.items() if totals[name] > budget]
    return errors + [f"{path} has {lines} lines, {LONGEST_ROOT_FILE} are allowed"
                     for path, lines in sizes.items()
                     if len(path.parts) == 1 and lines > LONGEST_ROOT_FILE]


def line_counts() -> dict[Path, int]:
    return {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in SOURCES}


def test_line_budgets():
    assert over_budget(line_counts()) == []
    assert (ROOT / "README.md").stat().st_size <= LONGEST_README


@pytest.mark.parametrize("path, lines", [
    ("trainer.py", 421), ("minigpt2/more.py", 3300), ("bench/more.py", 900),
    ("rlhf_data/more.py", 1200), ("evaluate.py", 2700)])
def test_an_exceeded_budget_is_found(path, lines):
    assert over_budget(line_counts() | {Path(path): lines})


def repeated_blocks(sources: dict[str, str], length: int = 6) -> list[tuple[str, ...]]:
    """Runs of `length` lines of code that stand in two places: (place, place, first line). Blank
    lines, comments and imports do not count."""
    places: dict[tuple[str, ...], str] = {}
    repeated = []
    for name, text in sources.items():
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)
                 if line.strip() and not line.strip().startswith(("#", "import ", "from "))]
        for i in range(len(lines) - length + 1):
            block = tuple(line for _, line in lines[i : i + length])
            here = f"{name}:{lines[i][0]}"
            if sum(map(len, block)) >= 20 * length and block in places:  # not a list of names
                repeated.append((places[block], here, block[0]))
            places.setdefault(block, here)
    return repeated


def test_no_six_lines_are_written_twice():
    sources = {str(path): (ROOT / path).read_text(encoding="utf-8") for path in SOURCES}
    assert repeated_blocks(sources) == []
    sources["copy.py"] = "\n".join(sources["finetune.py"].splitlines()[-40:-20])
    assert repeated_blocks(sources)


def is_path_preamble(node: ast.stmt) -> bool:
    return ast.unparse(node).startswith("sys.path.insert(0, str(pathlib.Path(__file__)")


def is_main_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_a_module_body_only_defines(path):
    folder_script = len(path.parts) > 1
    for node in parse(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if is_main_guard(node) or (folder_script and is_path_preamble(node)):
            continue
        assert isinstance(node, ast.Assign | ast.AnnAssign), ast.unparse(node)
        for call in ast.walk(node):  # constants: nothing that reads, prints or builds
            if isinstance(call, ast.Call):
                name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
                assert name in CONSTANT_CALLS, ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_forbidden_constructs(path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global), "global"
        if isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type).strip("()")
            assert caught and not {"Exception", "BaseException"} & set(caught.split(", "))
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("eval", "exec", "pickle.load", "pickle.loads"), call
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(node)
            if call in ("np.load", "numpy.load"):
                assert "allow_pickle=False" in ast.unparse(node)
            if call == "open" and "b" not in ast.unparse(node.args[1] if node.args[1:] else node):
                assert "encoding=" in ast.unparse(node), ast.unparse(node)


def test_no_function_is_written_twice():
    places = defaultdict(list)
    for path in SOURCES:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name not in SHARED_NAMES:
                places[node.name].append(str(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_configurations_are_frozen_and_every_field_has_help():
    for path in SOURCES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                assert ast.unparse(node.decorator_list[0]) == "dataclass(frozen=True)"
                if node.name != "GPTConfig":
                    for field in node.body:
                        if isinstance(field, ast.AnnAssign):
                            assert ast.unparse(field.value).startswith("flag("), field.target.id


def test_no_line_is_longer_than_100_columns():
    for path in SOURCES:
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
            assert len(line) <= 100, f"{path}: {line}"


def test_importing_everything_has_no_effect(tmp_path):
    """In a fresh process: nothing printed, written, seeded, put into the environment, or put on
    a GPU."""
    code = ("import os, sys, random, torch, numpy\n"
            "sys.path.insert(0, os.environ['REPO'])\n"
            "def state(): return (dict(os.environ), random.getstate(),"
            " torch.get_rng_state().tolist(), str(numpy.random.get_state()),"
            " torch.get_num_threads(), torch.get_float32_matmul_precision(),"
            " torch.cuda.is_initialized())\n"
            "before = state()\nimport importlib\n"
            f"for name in {list(MODULES)}: importlib.import_module(name)\n"
            "assert state() == before\n"
            "from minigpt2 import tokenizer\n"
            "assert tokenizer.load_tokenizer.cache_info().currsize == 0\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, env=script_env() | {"REPO": str(ROOT)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def names_before_the_first_forward_pass(tree: ast.Module) -> set[str]:
    """The functions, classes and constants of ours that a script's `train` uses before it calls
    `model(...)` for the first time."""
    ours = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (ROOT / node.module.replace(".", "/")).with_suffix(
                ".py").exists():
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            ours |= {target.id for target in node.targets}
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    forward = min(node.lineno for node in ast.walk(train)
                  if isinstance(node, ast.Call) and ast.unparse(node.func) == "model")
    return {node.id for node in ast.walk(train)
            if isinstance(node, ast.Name) and node.id in ours and node.lineno < forward}


@pytest.mark.parametrize("path", ["trainer.py", "finetune.py", "dpo.py"])
def test_the_training_loop_is_short_and_near_the_top(path):
    """conventions: at most 25 names before the first forward pass, `train` about 100 lines."""
    tree = parse(Path(path))
    assert len(names_before_the_first_forward_pass(tree)) <= 25
    train = next(node for node in tree.body if getattr(node, "name", "") == "train")
    assert train.end_lineno - train.lineno < 100
