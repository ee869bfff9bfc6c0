#!/usr/bin/env python
"""Check the English of pages and Python files against the patterns in pyproject.toml, [tool.prose]; part of `make quality`.

    python scripts/check_prose.py                  # the paths in [tool.prose]
    python scripts/check_prose.py docs README.md   # other files and folders

Pages are checked without code blocks, code in backticks, link targets, placeholders and HTML comments. In Python files, docstrings,
comments, and string literals with several words are checked; the summaries of functions also against the patterns in
[tool.prose.summaries]. The exit code is 1 if a pattern is found.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOT_PROSE = re.compile(
    r"^(?P<fence>[ ]*```)\w*\n.*?^(?P=fence)$"  # fenced blocks
    r"|^ *\*{0,2}\w+(?:, \*{0,2}\w+)* \(.*?\):"  # names and types of arguments
    r"|<!--.*?-->|`[^`\n]*`|\]\([^)\s]*\)|<https?:[^>]*>|\{\w+\}",
    re.MULTILINE | re.DOTALL,
)
SENTENCE = re.compile(r"[A-Za-z]{2,},?\s[A-Za-z]")  # string literals without this are names, formats or code
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Rule(NamedTuple):
    """Pattern to avoid, and what to write instead."""

    pattern: re.Pattern
    advice: str


class Settings(NamedTuple):
    """Content of [tool.prose]."""

    rules: list[Rule]
    summaries: list[Rule]
    paths: list[str]
    exclude: list[str]


class Line(NamedTuple):
    """A line of prose with its number; `is_summary` marks the summary of a function."""

    number: int
    text: str
    is_summary: bool = False


def read_settings() -> Settings:
    """Read the rules, the paths to check, and the paths to exclude from pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["prose"]
    rules = [Rule(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in settings["rules"].items()]
    summaries = [Rule(re.compile(pattern), advice) for pattern, advice in settings.get("summaries", {}).items()]
    return Settings(rules, summaries, settings["paths"], settings.get("exclude", []))


def prose_of(path: Path) -> Iterator[Line]:
    """Iterate over the lines of prose in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from lines_of(1, text)
        return
    tree = ast.parse(text)
    docstrings = docstrings_of(tree)
    for first, docstring, is_function in docstrings.values():
        yield from lines_of(first, docstring, has_summary=is_function)
    for first, string in strings_of(tree, docstrings):
        yield from lines_of(first, string)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from lines_of(token.start[0], token.string)


def lines_of(first: int, text: str, has_summary: bool = False) -> Iterator[Line]:
    """Split a text that starts at line `first`; without code and addresses."""
    lines = NOT_PROSE.sub(lambda match: "`" + "\n" * match[0].count("\n"), text).split("\n")
    summary = next((number for number, line in enumerate(lines) if line.strip()), 0) if has_summary else None
    for number, line in enumerate(lines):
        yield Line(first + number, line.strip(), number == summary)


def docstrings_of(tree: ast.AST) -> dict[int, tuple[int, str, bool]]:
    """Return first line, text, and whether it is that of a function, for each docstring, by the id of its node."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                is_function = isinstance(node, FUNCTIONS) and not is_property(node)
                found[id(first.value)] = (first.lineno, first.value.value, is_function)
    return found


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function is a property, whose summary is a noun phrase."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def strings_of(tree: ast.AST, docstrings: dict[int, tuple[int, str, bool]]) -> Iterator[tuple[int, str]]:
    """Iterate over string literals with several words, and their first lines; values of f-strings become backticks."""
    parts = set(docstrings)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in ast.walk(node) if part is not node}
            text = "".join(part.value if isinstance(part, ast.Constant) else "`" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if SENTENCE.search(text):
            is_block = (node.end_lineno or node.lineno) - node.lineno >= text.count("\n")
            yield node.lineno, text if is_block else text.replace("\n", " ")


def files_of(paths: list[str], exclude: list[str]) -> list[Path]:
    """Return the pages and modules among files and folders."""
    files = []
    for path in (ROOT / name for name in paths):
        files += [path] if path.is_file() else [*sorted(path.rglob("*.md")), *sorted(path.rglob("*.py"))]
    files = [file for file in files if "build" not in file.relative_to(ROOT).parts]  # copies that `make dist` leaves
    excluded = [ROOT / name for name in exclude]
    return [file for file in files if not any(file == one or one in file.parents for one in excluded)]


def find_faults(paths: list[str] | None = None) -> list[str]:
    """Return a line for each pattern that is found: file, line number, the words, and what to write."""
    settings = read_settings()
    return [
        f"{path.relative_to(ROOT)}:{line.number}: {match[0]!r}: {rule.advice}"
        for path in files_of(paths or settings.paths, settings.exclude)
        for line in sorted(prose_of(path))
        for rule in (*settings.rules, *(settings.summaries if line.is_summary else ()))
        for match in rule.pattern.finditer(line.text)
    ]


if __name__ == "__main__":
    faults = find_faults(sys.argv[1:])
    print(*faults, sep="\n", end="\n" * bool(faults))
    sys.exit(bool(faults))
