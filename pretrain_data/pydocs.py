"""The documentation installed with Python, NumPy and PyTorch, as documents.

Python's language reference (`pydoc_data`), and the docstrings of the standard library, NumPy and
PyTorch: about 2.8 million tokens of English prose without a download, the corpus of the demo. The
sources are parsed with `ast` and never imported.
"""

import ast
import importlib.util
import inspect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt2.config import UserError

PACKAGES = ("numpy", "torch")
SKIPPED_FOLDERS = {  # tests, vendored copies, generated tables
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3",
    "_vendor", "_bundled", "vendor", "turtledemo"}
MIN_LENGTH = 40  # characters; shorter docstrings are left out
QUESTIONS = {"module": "What is the Python module {} for?", "class": "What is the Python class {}?",
             "function": "What does the Python function {} do?"}
WORDINGS = ("Explain {}.", "What is {}?", "Tell me about {}.", "Describe {} in one sentence.")


@dataclass(frozen=True)
class Document:
    kind: str  # "topic", "module", "class" or "function"
    name: str  # json.dumps
    heading: str  # json.dumps(obj, *, skipkeys=False, ...)
    body: str  # the docstring, or the text of the topic

    @property
    def text(self) -> str:
        return f"{self.heading}\n\n{self.body}\n"


def read_documents() -> list[Document]:
    """All public documents with distinct bodies, in a fixed order for given versions of Python,
    NumPy and PyTorch. Raises UserError if the sources are not on disk."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = [*read_topics(library / "pydoc_data" / "topics.py"), *read_tree(library, "")]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # does not import a top-level package
        documents += read_tree(Path(spec.origin).parent, package)
    unique = {}
    for document in documents:
        private = document.name.rsplit(".", 1)[-1].startswith("_")
        if not private and len(document.body) >= MIN_LENGTH:
            unique.setdefault(document.body, document)
    return list(unique.values())


def read_topics(path: Path) -> Iterator[Document]:
    """The language reference: a module that assigns one dict, topic -> text."""
    if not path.is_file():
        raise UserError(f"{path} is missing: this Python has no documentation topics, install "
                        "Python from python.org, conda, pyenv or your distribution")
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Document("topic", topic, f"Python language reference: {topic}", text.strip())


def read_tree(root: Path, package: str) -> Iterator[Document]:
    """The docstrings of all modules in a folder, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        names = [package, *parts] if package else list(parts)
        module = ".".join(names[:-1] if names[-1] == "__init__" else names)
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates, and examples of invalid code
            continue
        yield from read_docstrings(tree, "module", module, f"module {module}")


def read_docstrings(node: ast.AST, kind: str, name: str, heading: str) -> Iterator[Document]:
    """The docstring of a module, class or function, then those of the classes and functions in it;
    functions within functions are left out."""
    body = ast.get_docstring(node)
    if body:
        yield Document(kind, name, heading, inspect.cleandoc(body))
    for child in node.body if kind != "function" else ():
        inner = f"{name}.{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{inner}({ast.unparse(child.args)})"
            yield from read_docstrings(child, "function", inner, signature)
        elif isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            signature = f"class {inner}({bases})" if bases else f"class {inner}"
            yield from read_docstrings(child, "class", inner, signature)


def most_mentioned(documents: list[Document], count: int) -> list[Document]:
    """Of the standard library's modules and contents, the `count` named in the most documents."""
    words = Counter(word for document in documents
                    for word in set(re.findall(r"[A-Za-z_][\w.]*\w", document.body)))
    known = [document for document in documents if document.kind != "topic"
             and document.name.count(".") < 2 and document.name[0] != "_"
             and document.name.split(".")[0] not in PACKAGES]
    return sorted(known, key=lambda document: (-words[document.name], document.name))[:count]


def question_and_answer(document: Document, wording: str = "") -> tuple[str, str] | None:
    """A question about a module, class or function, and its documentation's first sentence."""
    paragraph = " ".join(document.body.split("\n\n")[0].split())
    sentence = re.match(r"[A-Z].{15,200}?((?<!e\.g)(?<!i\.e)\.(?=\s)|$)", paragraph)
    if document.kind == "topic" or sentence is None:
        return None
    return (wording or QUESTIONS[document.kind]).format(document.name), sentence[0]
