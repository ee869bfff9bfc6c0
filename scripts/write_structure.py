#!/usr/bin/env python
"""Write the tree of docs/structure.md, from the first line of every module; part of `make docs`.

python scripts/write_structure.py
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "structure.md"
PACKAGE = ROOT / "src" / "diffusers_imagen"
LAYERS = re.compile(r"^`(\w+(?:, \w+)*(?: <- \w+(?:, \w+)*)+)`$", re.MULTILINE)
TREE = re.compile(r"^```\nsrc/.*?^```$", re.MULTILINE | re.DOTALL)
COLUMN = 40


def read_layers(page: str) -> list[list[str]]:
    """Return the packages of each layer, lowest first, from the line of the page that begins with the lowest."""
    found = LAYERS.search(page)
    if found is None:
        raise ValueError(f"{PAGE} has no line of layers such as `diffusion, utils <- models <- pipelines`.")
    return [layer.split(", ") for layer in found[1].split(" <- ")]


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def describe(path: Path, depth: int) -> str:
    """Return the line of a module or package, indented by its depth."""
    name = f"{path.parent.name}/" if path.name == "__init__.py" and path.parent != PACKAGE else path.name
    return f"{'  ' * depth + name:<{COLUMN}}{first_line(path)}".rstrip()


def describe_package(folder: Path, order: list[str], depth: int = 0) -> list[str]:
    """Return the lines of a package, its modules by name, and its packages: those of `order` first, others by name."""
    lines = ["src/diffusers_imagen/"] if depth == 0 else [describe(folder / "__init__.py", depth)]
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py" or depth == 0]
    lines += [describe(path, depth + 1) for path in modules]
    packages = {path.parent.name: path.parent for path in sorted(folder.glob("*/__init__.py"))}
    for name in sorted(packages, key=lambda name: order.index(name) if name in order else len(order)):
        lines += [""] * (depth == 0) + describe_package(packages[name], order, depth + 1)
    return lines


def write_tree(page: str) -> str:
    """Return the page with an updated tree."""
    order = [package for layer in read_layers(page) for package in layer]
    lines = describe_package(PACKAGE, order)
    for folder in ("scripts", "examples"):
        lines += ["", f"{folder}/", *(describe(path, 1) for path in sorted((ROOT / folder).glob("*.py")))]
    return TREE.sub(lambda _: "\n".join(["```", *lines, "```"]), page)


if __name__ == "__main__":
    PAGE.write_text(write_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
