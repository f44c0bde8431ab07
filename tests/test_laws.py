"""The laws of this repository that a syntax tree can show."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT, script_env

SOURCES = sorted(path.relative_to(ROOT) for path in [
    *ROOT.glob("*.py"), *ROOT.glob("*_data/*.py"), *ROOT.glob("image/*.py")])
# A room may import those before it and no other; a script is imported by nothing.
ROOMS = ["config", "files", "progress", "tokenizer", "documents", "hub", "pydocs", "shards",
         "corpus", "model", "metrics", "graphs", "dataloader",
         "checkpoint", "optimizer", "distributed", "memory", "faults", "resume", "draws",
         "sampling", "kernels", "chat", "measure", "bench_data", "bench_memory",
         "bench_train", "bench_decode", "bench_gpu", "bench_recipes"]
SHARED_NAMES = {"main", "train"}  # each script's own story
CONSTANT_CALLS = {"TypeVar", "compile", "resolve", "Path", "GPTConfig", "Recipe", "Set", "flag",
                  "str"}


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


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


def test_imports_point_one_way():
    scripts = {path.stem for path in SOURCES} - set(ROOMS)
    for path in SOURCES:
        allowed = ROOMS[: ROOMS.index(path.stem)] if path.stem in ROOMS else ROOMS
        for node in ast.walk(parse(path)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
            for name in names:
                root = (name or "").split(".")[0]
                assert root not in scripts, f"{path} imports the script {root}"
                assert root not in ROOMS or root in allowed, f"{path} imports {root}"


def test_model_imports_nothing_of_ours_and_the_data_rooms_no_torch():
    for name, forbidden in (("model.py", set(ROOMS)), *((f"{room}.py", {"torch"}) for room in
                              ROOMS[: ROOMS.index("corpus") + 1])):
        for node in ast.walk(parse(Path(name))):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] not in forbidden
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden


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


def test_every_file_parses_to_lines_of_at_most_100_columns():
    for path in SOURCES:
        for line in (ROOT / path).read_text(encoding="utf-8").splitlines():
            assert len(line) <= 100, f"{path}: {line}"


def test_importing_everything_has_no_effect(tmp_path):
    """In a fresh process: nothing printed, written, seeded, put into the environment, or put on
    a GPU."""
    modules = [".".join(path.with_suffix("").parts) for path in SOURCES]
    code = ("import os, sys, random, torch, numpy\n"
            "sys.path.insert(0, os.environ['REPO'])\n"
            "def state(): return (dict(os.environ), random.getstate(),"
            " torch.get_rng_state().tolist(), str(numpy.random.get_state()),"
            " torch.get_num_threads(), torch.get_float32_matmul_precision(),"
            " torch.cuda.is_initialized())\n"
            "before = state()\nimport importlib\n"
            f"for name in {modules}: importlib.import_module(name)\n"
            "assert state() == before\n"
            "import tokenizer\nassert tokenizer.load_tokenizer.cache_info().currsize == 0\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True,
                            capture_output=True, env=script_env() | {"REPO": str(ROOT)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
