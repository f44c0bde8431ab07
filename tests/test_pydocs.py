"""The pydocs corpus and the questions about it."""

import ast
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.common import run_script, user_error

from finetune_data import pydocs_questions
from minigpt2.shards import read_manifest
from pretrain_data import pydocs
from pretrain_data.pydocs import (
    Document,
    most_mentioned,
    question_and_answer,
    read_docstrings,
    read_topics,
    read_tree,
)

SOURCE = '''"""Tools for shapes, and nothing else but shapes."""
import does_not_exist
raise SystemExit("imported!")

def area(width, height=1, *, unit: str = "m"):
    """Return the area, e.g. of a window, of a rectangle. Both sides are lengths.

        More about it.
    """
    def inner():
        """Documentation of a function inside a function."""

class Square(Shape, metaclass=Meta):
    """A square with four sides of one length.

    It has corners.
    """
    async def grow(self, by):
        """Makes the square larger by a length given in meters"""
    def quiet(self): pass
'''


def test_docstrings_are_read_without_importing(tmp_path):
    package = tmp_path / "shapes"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "flat.py").write_text(SOURCE)
    (package / "tests" / "test_it.py").write_text(SOURCE)
    (package / "broken.py").write_text("def (")
    documents = list(read_tree(package, "shapes"))
    assert [(d.kind, d.name) for d in documents[:4]] == [
        ("module", "shapes"), ("function", "shapes.area"), ("class", "shapes.Square"),
        ("function", "shapes.Square.grow")]
    assert [d.name for d in documents[4:]] == [
        "shapes.flat", "shapes.flat.area", "shapes.flat.Square", "shapes.flat.Square.grow"]
    assert documents[1].text == (
        "shapes.area(width, height=1, *, unit: str='m')\n\nReturn the area, e.g. of a window, of "
        "a rectangle. Both sides are lengths.\n\nMore about it.\n")
    assert documents[2].heading == "class shapes.Square(Shape)"


def test_questions_and_answers():
    by_name = {d.name: d for d in read_docstrings(ast.parse(SOURCE), "module", "shapes", "")}
    assert question_and_answer(by_name["shapes"]) == (
        "What is the Python module shapes for?", "Tools for shapes, and nothing else but shapes.")
    assert question_and_answer(by_name["shapes.area"]) == (
        "What does the Python function shapes.area do?",
        "Return the area, e.g. of a window, of a rectangle.")
    assert question_and_answer(by_name["shapes.Square"]) == (
        "What is the Python class shapes.Square?", "A square with four sides of one length.")
    assert question_and_answer(by_name["shapes.Square.grow"])[1].endswith("in meters")
    assert question_and_answer(Document("function", "f", "f()", ">>> f()")) is None
    assert question_and_answer(Document("topic", "assert", "", "The assert statement is.")) is None


def test_the_most_mentioned_names_of_the_standard_library_in_several_wordings():
    said = ["json.dumps", "json.dumps, json.loads.", "xjson.loads json.loads2",
            "torch.add torch.add", "torch.add a.b.c a.b.c", "torch.add a.b.c _private"]
    documents = [Document("topic", f"t{i}", "", text) for i, text in enumerate(said)]
    names = ["json", "json.loads", "json.dumps", "torch.add", "a.b.c", "_private"]
    documents += [Document("function", name, name, "Return x.") for name in names]
    assert [d.name for d in most_mentioned(documents, 9)] == ["json.dumps", "json.loads", "json"]
    assert [d.name for d in most_mentioned(documents, 1)] == ["json.dumps"]
    json_module = Document("module", "json", "json", "Read and write JSON.")
    assert question_and_answer(json_module, "Explain {}.") == (
        "Explain json.", "Read and write JSON.")


def test_topics_are_parsed(tmp_path):
    path = tmp_path / "topics.py"
    path.write_text("topics = {'b': 'About b.\\n', 'a': 'About a.'}\n")
    assert [d.text for d in read_topics(path)] == [
        "Python language reference: a\n\nAbout a.\n", "Python language reference: b\n\nAbout b.\n"]
    assert "topics" in user_error(lambda: list(read_topics(tmp_path / "none.py")))


@pytest.mark.slow
def test_the_scripts_in_this_environment(tmp_path, monkeypatch):
    """pydocs_corpus.py from the command line; pydocs_questions.py in this process, without reading
    the documents again."""
    pool = ThreadPoolExecutor(1)
    process = pool.submit(run_script, "-m", "pretrain_data.pydocs_corpus", "--out-dir",
                          tmp_path / "shards")
    before = set(sys.modules)
    documents = pydocs.read_documents()
    assert not {"numpy.f2py", "torch.onnx", "idlelib"} & (set(sys.modules) - before)
    assert len(documents) > 10_000
    assert len({d.body for d in documents}) == len(documents)
    names = {d.name for d in documents}
    assert {"json.dumps", "numpy", "torch.nn.modules.linear.Linear", "assert"} <= names

    process.result()
    manifest = read_manifest(tmp_path / "shards")
    assert manifest["documents"] == len(documents) and manifest["tokens"] > 2_000_000
    assert manifest["shards"][0]["split"] == "val" and len(manifest["shards"]) > 20

    monkeypatch.setattr(pydocs_questions, "read_documents", lambda: documents)
    monkeypatch.setattr(sys, "argv", ["pydocs_questions.py", "--out", str(tmp_path / "q.json")])
    pydocs_questions.main()
    rows = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert len(rows) > 10_000
    assert {tuple(row) for row in rows} == {("instruction", "input", "output")}
    assert len({row["instruction"] for row in rows}) == len(rows)
    answers = {row["instruction"]: row["output"] for row in rows}
    assert answers["What does the Python function json.dumps do?"].startswith("Serialize ``obj``")

    monkeypatch.setattr(sys, "argv", [*sys.argv, "--names", "300"])
    pydocs_questions.main()
    rows = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    assert 1000 < len(rows) <= 1500
    answers = {row["instruction"]: row["output"] for row in rows}
    assert answers["Explain json.dumps."] == answers["What does the Python function json.dumps do?"]
