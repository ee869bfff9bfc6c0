"""The layout of the package: what docs/structure.md says of it, and how large its parts may be."""

import ast
import graphlib
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from script_modules import script_module


ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "diffusers_imagen"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50  # with the signature, without the docstring
MAX_PARAMETERS = 8
MAX_MODULES = {"training": 20}  # on one level; of other packages, 24

# The arguments of a diffusers class are its configuration and its API; their lines are not counted.
PUBLIC_SIGNATURES = {
    "models/unet_efficient.py:EfficientUNetModel.__init__",
    "models/unet_imagen.py:ImagenUNetModel.__init__",
    "schedulers/scheduling_continuous_ddpm.py:ContinuousDDPMScheduler.__init__",
    "schedulers/scheduling_edm_adams.py:EDMAdamsScheduler.__init__",
    "schedulers/scheduling_edm_heun.py:EDMHeunScheduler.__init__",
    "pipelines/pipeline_imagen.py:ImagenPipeline.__call__",
    "pipelines/pipeline_imagen.py:ImagenPipeline.__init__",
    "pipelines/pipeline_imagen_cascade.py:ImagenCascadePipeline.__call__",
    "pipelines/pipeline_imagen_cascade.py:ImagenCascadePipeline.__init__",
    "pipelines/pipeline_imagen_superresolution.py:ImagenSuperResolutionPipeline.__call__",
    "pipelines/pipeline_imagen_superresolution.py:ImagenSuperResolutionPipeline.__init__",
}


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def writer():
    with script_module("write_structure") as module:
        yield module


def imports_of(path: Path) -> set[Path]:
    """The files of this package that a module imports from: at its top, inside functions, and for types alone."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.level:
            source = path.parents[node.level - 1].joinpath(*filter(None, (node.module or "").split(".")))
            for alias in node.names:  # a module, a package, or a name in either
                files = (source / f"{alias.name}.py", source / alias.name / "__init__.py")
                files += (source.with_suffix(".py"), source / "__init__.py")
                found.add(next(file for file in files if file in TREES))
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert SRC.name not in {name.split(".")[0] for name in names}, f"{path} imports its package by name"
    return found


def functions_of(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """All functions of a module, with the names of the classes and functions that they are in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        named = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        yield from functions_of(child, f"{prefix}{child.name}." if named else prefix)


def count_lines(name: str, function: ast.FunctionDef) -> int:
    """Lines of code, without the docstring, and of a public function without the signature."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    signature = 0 if name in PUBLIC_SIGNATURES else function.body[0].lineno - function.lineno
    return signature + (body[-1].end_lineno - body[0].lineno + 1 if body else 0)


def count_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SRC.rglob("*.py"))}
MODULES = [path for path in TREES if path.name != "__init__.py"]
FUNCTIONS = dict(pair for path, tree in TREES.items() for pair in functions_of(tree, f"{path.relative_to(SRC)}:"))


def test_dependencies_point_one_way(page, writer):
    layers = {package: number for number, layer in enumerate(writer.read_layers(page)) for package in layer}
    assert set(layers) == {path.parent.name for path in SRC.glob("*/__init__.py")}
    wrong = []
    for path in TREES:
        importer = path.relative_to(SRC)
        for imported in (file.relative_to(SRC) for file in imports_of(path)):
            packages = importer.parts[0], imported.parts[0]
            if packages[0] in layers and packages[0] != packages[1]:
                # what lies beside the packages is above them all
                if packages[1] not in layers or layers[packages[1]] >= layers[packages[0]]:
                    wrong.append(f"{importer} imports {imported}")
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({path: imports_of(path) for path in TREES}).prepare()


def test_no_file_name_has_two_meanings():
    # the modules beside the packages are programs for `python -m`, called as the commands that they run
    counts = Counter(path.name for path in MODULES if path.parent != SRC)
    assert [name for name, count in counts.items() if count > 1] == []


def test_packages_have_several_modules_and_not_too_many():
    sizes = Counter(str(path.parent.relative_to(SRC)) for path in MODULES if path.parent != SRC)
    assert {name: size for name, size in sizes.items() if not 2 <= size <= MAX_MODULES.get(name, 24)} == {}


def test_files_are_short():
    lengths = {str(path.relative_to(SRC)): len(path.read_text(encoding="utf-8").splitlines()) for path in TREES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_fit_a_screen():
    lengths = {name: count_lines(name, function) for name, function in FUNCTIONS.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_functions_have_few_parameters():
    many = {name for name, function in FUNCTIONS.items() if count_parameters(function) > MAX_PARAMETERS}
    assert many == PUBLIC_SIGNATURES  # no exception that is not needed


def test_every_module_begins_with_a_line_that_says_what_it_is():
    first_lines = {path: (ast.get_docstring(tree) or "").split("\n")[0] for path, tree in TREES.items()}
    assert [str(path.relative_to(SRC)) for path, line in first_lines.items() if not line.endswith(".")] == []


def test_the_page_shows_the_modules_as_they_are(page, writer):
    assert writer.write_tree(page) == page, "docs/structure.md is not up to date: run `make docs`"


def test_the_wheel_has_every_module_and_says_that_they_are_typed(tmp_path):
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(SRC, tmp_path / "src" / SRC.name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    names = set(zipfile.ZipFile(tmp_path / made.stdout.splitlines()[-1]).namelist())
    assert {str(path.relative_to(SRC.parent)) for path in [*TREES, SRC / "py.typed"]} - names == set()
