"""The documentation that every Python environment of this project already holds, as documents.

The language reference (`pydoc_data`), and the docstrings of the standard library, NumPy and
PyTorch. Sources are read with `ast`; nothing is imported, so nothing runs. It is real English
technical prose, about two million tokens of it, and needs no download: the corpus of the demo.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt2.config import UserError

PACKAGES = ("numpy", "torch")
# Tests, vendored copies and generated tables hold no documentation.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib",
                   "lib2to3", "_vendor", "_bundled", "vendor", "turtledemo"}
SHORTEST_DOCUMENT = 40  # characters; below that a docstring is a note, not documentation


@dataclass(frozen=True)
class Document:
    kind: str  # "topic", "module", "class" or "function"
    name: str  # json.dumps
    heading: str  # json.dumps(obj, *, skipkeys=False, ...)
    body: str  # the docstring, or the topic's text

    @property
    def text(self) -> str:
        return f"{self.heading}\n\n{self.body}\n"


def read_documents() -> list[Document]:
    """All public documents in a fixed order, each body once: the same for the same Python, NumPy
    and PyTorch. Raises UserError when one of them has no sources on disk."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = [*read_topics(library / "pydoc_data" / "topics.py"), *read_tree(library, "")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # finds a top-level package without importing it
        if spec is None or spec.origin is None:
            raise UserError(f"{package} is not installed: pip install -r requirements.txt")
        documents += read_tree(Path(spec.origin).parent, package)
    unique = {}
    for document in documents:
        private = document.name.rsplit(".", 1)[-1].startswith("_")
        if not private and len(document.body) >= SHORTEST_DOCUMENT:
            unique.setdefault(document.body, document)
    return list(unique.values())


def read_topics(path: Path) -> Iterator[Document]:
    """The language reference: a module that assigns one dict of topic -> text."""
    if not path.is_file():
        raise UserError(f"{path} is missing: this Python was installed without its documentation "
                        "topics; use one from python.org, conda, pyenv or your distribution")
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Document("topic", topic, f"Python language reference: {topic}", text.strip())


def read_tree(root: Path, package: str) -> Iterator[Document]:
    """The docstrings of every module below a folder, in the order of their paths."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        names = [package, *parts] if package else list(parts)
        module = ".".join(names[:-1] if names[-1] == "__init__" else names)
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and deliberately broken examples
            continue
        yield from read_docstrings(tree, "module", module, f"module {module}")


def read_docstrings(node: ast.AST, kind: str, name: str, heading: str) -> Iterator[Document]:
    """The docstring of a module, class or function, then those defined in it (not in functions)."""
    body = ast.get_docstring(node)
    if body:
        yield Document(kind, name, heading, inspect.cleandoc(body))
    if kind == "function":
        return
    for child in node.body:
        inner = f"{name}.{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from read_docstrings(child, "function", inner,
                                       f"{inner}({ast.unparse(child.args)})")
        elif isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            yield from read_docstrings(child, "class", inner,
                                       f"class {inner}" + (f"({bases})" if bases else ""))


def question_and_answer(document: Document) -> tuple[str, str] | None:
    """A question about a module, class or function, and the first sentence of its documentation;
    None where there is no such sentence."""
    if document.kind == "topic":
        return None
    paragraph = " ".join(document.body.split("\n\n")[0].split())
    sentence = re.match(r"[A-Z].{15,200}?((?<!e\.g)(?<!i\.e)\.(?=\s)|$)", paragraph)
    if sentence is None:
        return None
    questions = {"module": "What is the Python module {} for?",
                 "class": "What is the Python class {}?",
                 "function": "What does the Python function {} do?"}
    return questions[document.kind].format(document.name), sentence[0]
