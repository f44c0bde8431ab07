"""Looks up every measured number of README.md and docs/ in the log that the text names.

    python image/check_numbers.py

- A number is measured if it has a decimal point, an exponent or a unit (%, s, GB, tokens/s, nats,
  times, ...). In a table with a log, every number outside the first column is.
- Its log is the file in image/logs/ that its row or paragraph names in backticks, else the last one
  named above it in the section. The test that asserts a number may stand in the place of a log.
  The number must be a rounding of one in there. Single steps of a training run do not count.
- If a paragraph, or the first cell of a row, names a model, a dtype, ... of the log, only the
  records with that label count.
- Text in backticks, code blocks, headings, versions (Python 3.11) and needed disk space (40 GB of
  disk) are not read. A comment `not measured: WHY` above a paragraph or table exempts it, and the
  whole section if it stands alone below the heading.
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREFIXES = {"K": 1e3, "M": 1e6, "": 1}
# Units that differ from those in the logs, where shares are fractions and sizes bytes
UNITS = {"%": 0.01, "minutes": 60, "hours": 3600, "MB": 1e6, "GB": 1e9}
NUMBER = re.compile(
    r"(?<![\w.,^/-])(?P<value>-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?)(?P<prefix>[KM]?)(?![\w^-]|"
    r"\.\d)(?:\s(?P<unit>%|ms|s|seconds|minutes|hours|MB|GB|MiB|GB/s|GFLOP/s|times|nats|"
    r"(?:tokens|rows)(?:/s| a second| per second))(?![\w/]))?")
# Fields that tell the records of a log apart; of a JSON file, the keys that lead to a record do
LABELS = ("model", "dtype", "batch", "prompt", "workers", "encoder", "recipe", "run", "batch_size",
          "steps", "max_lr")
MARK = "<!-- not measured"
# Code, targets of links, HTML; versions and licenses; the disk that a command needs
NOT_READ = r"`[^`]*`|\]\([^)]*\)|<[^>]*>|\b(?:Python|BY-NC) \d+\.\d+|\d+ GB of disk"

Record = tuple[dict[str, str], list[float]]  # labels by field, values


def values_in(node: object) -> Iterator[float]:
    """All numbers in a parsed log, those in its texts included."""
    if isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from values_in(child)
    elif isinstance(node, str):
        for match in NUMBER.finditer(node):
            yield float(match["value"].replace(",", "")) * PREFIXES[match["prefix"]]
    elif isinstance(node, int | float) and not isinstance(node, bool):
        yield node


def json_records(node: dict, keys: tuple[str, ...] = ()) -> Iterator[Record]:
    """The dictionaries in a JSON file; their labels are the keys that lead there."""
    inner = {key: child for key, child in node.items() if isinstance(child, dict)}
    yield ({f"key {i}": key for i, key in enumerate(keys) if key},
           list(values_in([node[key] for key in node.keys() - inner.keys()])))
    for key, child in inner.items():
        yield from json_records(child, (*keys, key.rpartition("/")[2]))


@functools.cache
def records_of(path: pathlib.Path) -> list[Record]:
    """What a log or a test holds: a record per line or dictionary; other files are one record."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(json_records({"": json.loads(text)}))
    if path.suffix != ".jsonl":
        return [({}, list(values_in(text)))]
    return [({name: str(record[name]) for name in LABELS if name in record},
             list(values_in(record)))
            for record in map(json.loads, text.splitlines()) if record.get("kind") != "train"]


@functools.cache
def labels_named(source: pathlib.Path, text: str) -> dict[str, set[str]]:
    """The labels of a log's records that a text names, by field: whole words, of several that
    contain each other the longest. In prose, as opposed to a first cell, a number is no label."""
    named: dict[str, set[str]] = {}
    words = text.replace("`", "")
    for field, label in {item for labels, _ in records_of(source) for item in labels.items()}:
        if (text.startswith("|") or re.search("[a-zA-Z]", label)) and re.search(
                rf"(?<![\w.-]){re.escape(label)}(?![\w-]|\.\d)", words, re.IGNORECASE):
            named.setdefault(field, set()).add(label)
    return {field: {one for one in labels if not any(one in other for other in labels - {one})}
            for field, labels in named.items()}


def is_recorded(number: re.Match, unit: str, source: pathlib.Path, text: str) -> bool:
    """Whether a number of a text is a rounding of one in a file."""
    named = labels_named(source, text)
    value = float(number["value"].replace(",", ""))
    mantissa, _, exponent = number["value"].partition("e")
    half = 0.5001 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    scale = PREFIXES[number["prefix"]] * UNITS.get(unit, 1)
    return any(abs((abs(one) if value > 0 else one) / scale - value) <= half
               for labels, found in records_of(source)
               if all(label in named.get(field, {label}) for field, label in labels.items())
               for one in found)


def blank(pattern: str, text: str) -> str:
    """A text with spaces in place of what matches."""
    return re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def measured(text: str, every: bool) -> list[tuple[re.Match, str]]:
    """The measured numbers of a text with their units; a list such as 3, 4 and 5 s has one."""
    found: list[tuple[re.Match, str]] = []
    text, unit, start = blank(NOT_READ, text), "", len(text)
    for number in reversed(list(NUMBER.finditer(text))):
        joined = re.fullmatch(r",?\s(?:and |to |or |against )?", text[number.end() : start])
        unit, start = number["unit"] or (unit if joined else ""), number.start()
        if every or unit or (not number["prefix"] and re.search("[.e]", number["value"])):
            found.append((number, unit))
    return found[::-1]


def sources_in(text: str) -> list[pathlib.Path]:
    """The logs and tests that a text names."""
    names = re.findall(r"`([\w/.]+\.(?:jsonl?|txt|py))`", text)
    paths = [ROOT / name if "/" in name else ROOT / "image" / "logs" / name for name in names]
    return [path for path in paths if path.is_file() and (
        path.is_relative_to(ROOT / "image" / "logs") or path.is_relative_to(ROOT / "tests"))]


def blocks_of(text: str) -> Iterator[tuple[int, str]]:
    """Headings, paragraphs, lists and tables, each with the number of its first line."""
    text = blank(r"(?ms)^ *```.*?^ *```$", text)
    for match in re.finditer(r"(?m)(?:^.*\S.*\n?)+", text):
        yield text.count("\n", 0, match.start()) + 1, match[0]


def claims_in(text: str) -> Iterator[tuple[int, re.Match, str, list[pathlib.Path], str]]:
    """The measured numbers of a page: line, number, unit, logs, the text that may name labels."""
    sources: list[pathlib.Path] = []
    rank = exempt = 0  # of the last heading; of the one whose section is exempt, or 0
    for line, block in blocks_of(text):
        is_table = block.startswith("|")
        own = [] if is_table else sources_in(block)
        if block.startswith("#"):
            sources, rank = [], len(block.partition(" ")[0])
            exempt = 0 if rank <= exempt else exempt
        if block.startswith(MARK) and block.count("\n") == 1:
            exempt = exempt or rank
        if block.startswith((MARK, "#")) or (exempt and not own):
            continue
        sources = own or sources
        for i, row in enumerate(block.splitlines()[2:] if is_table else [block]):
            first = re.match(r"\|(?:\\\||[^|])*", row)[0] if is_table else ""
            logs = sources_in(row) or sources
            for number, unit in measured(" " * len(first) + row[len(first):],
                                         every=is_table and bool(logs)):
                lines_above = 2 * is_table + i + row.count("\n", 0, number.start())
                yield line + lines_above, number, unit, logs, first or block


def errors_in(name: str, text: str) -> list[str]:
    """One line for every measured number of a page that is in no log."""
    errors = []
    for line, number, unit, logs, context in claims_in(text):
        if not any(is_recorded(number, unit, log, context) for log in logs):
            looked_at = ", ".join(str(log.relative_to(ROOT)) for log in logs)
            errors.append(f"{name}:{line}: {' '.join((number[1] + number[2], unit)).strip()} "
                          + (f"is not in {looked_at}" if logs else "has no log beside it"))
    return errors


def pages() -> list[str]:
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def main() -> int:
    errors = [error for page in pages()
              for error in errors_in(page, (ROOT / page).read_text(encoding="utf-8"))]
    print(*errors, sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
