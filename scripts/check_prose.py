#!/usr/bin/env python
"""Checks the English of pages and docstrings against the patterns in pyproject.toml, [tool.prose]: a part of `make quality`.

    python scripts/check_prose.py                  # what [tool.prose] names
    python scripts/check_prose.py docs README.md   # other files and folders

Code blocks, code in backticks, addresses of links and HTML comments are left out. Of Python files the docstrings are
checked. The exit code is 1 if a pattern is found.
"""

import ast
import re
import sys
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
    r"|<!--.*?-->|`[^`\n]*`|\]\([^)\s]*\)|<https?:[^>]*>",
    re.MULTILINE | re.DOTALL,
)


class Rule(NamedTuple):
    """A pattern that is not to occur, and what to write in its place."""

    pattern: re.Pattern
    advice: str


def read_settings() -> tuple[list[Rule], list[str], list[str]]:
    """Rules, the files and folders to check, and what is left out, of pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["prose"]
    rules = [Rule(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in settings["rules"].items()]
    return rules, settings["paths"], settings.get("exclude", [])


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of prose of a file, with their numbers."""
    text = path.read_text(encoding="utf-8")
    parts = [(1, text)] if path.suffix != ".py" else docstrings_of(ast.parse(text))
    for first, part in parts:
        plain = NOT_PROSE.sub(lambda match: "\n" * match[0].count("\n"), part)
        yield from enumerate(plain.split("\n"), start=first)


def docstrings_of(tree: ast.AST) -> list[tuple[int, str]]:
    """The docstrings of a module, each with the number of its first line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                found.append((first.lineno, first.value.value))
    return found


def files_of(paths: list[str], exclude: list[str]) -> list[Path]:
    """The pages and modules among files and folders."""
    files = []
    for path in (ROOT / name for name in paths):
        files += [path] if path.is_file() else [*sorted(path.rglob("*.md")), *sorted(path.rglob("*.py"))]
    excluded = [ROOT / name for name in exclude]
    return [file for file in files if not any(file == one or one in file.parents for one in excluded)]


def find_faults(paths: list[str] | None = None) -> list[str]:
    """A line for each pattern that is found: file, number of the line, the words, and what to write."""
    rules, default, exclude = read_settings()
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}: {rule.advice}"
        for path in files_of(paths or default, exclude)
        for number, line in prose_of(path)
        for rule in rules
        for match in rule.pattern.finditer(line)
    ]


if __name__ == "__main__":
    faults = find_faults(sys.argv[1:])
    print(*faults, sep="\n", end="\n" * bool(faults))
    sys.exit(bool(faults))
