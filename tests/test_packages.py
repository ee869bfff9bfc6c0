"""What is installed: metadata, the page of an index, versions, and the package of the shipped weights."""

import configparser
import importlib
import runpy
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from diffusers_imagen.utils import shipped


ROOT = Path(__file__).parents[1]
EMOJI = ROOT / "packages" / "emoji"
in_a_clone = pytest.mark.skipif(not EMOJI.is_dir(), reason="a source distribution has no weights: this needs a clone")


@pytest.fixture(scope="module")
def index_page():
    return runpy.run_path(str(ROOT / "setup.py"))["index_page"]


@pytest.fixture(scope="module")
def checks():
    """scripts/check_dist.py, by its path."""
    return runpy.run_path(str(ROOT / "scripts" / "check_dist.py"))


def lower_bounds(settings: configparser.ConfigParser, extra: str) -> dict[str, Version]:
    """Return the lower bound of each package of an extra, of the extras that it names, and of the package itself."""
    bounds, extras, lines = {}, [extra], settings["options"]["install_requires"].splitlines()
    while extras:
        lines += settings["options.extras_require"][extras.pop()].splitlines()
        while lines:
            if (line := lines.pop().strip()) and not line.startswith("#"):
                requirement = Requirement(line)
                if requirement.name == "diffusers-imagen":
                    extras += requirement.extras
                else:
                    (bound,) = (part.version for part in requirement.specifier if part.operator == ">=")
                    bounds[canonicalize_name(requirement.name)] = Version(bound)
    return bounds


def read_setup(folder: Path) -> configparser.ConfigParser:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(folder / "setup.cfg", encoding="utf-8")
    return settings


# ---- the page of an index


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("see [the `docs`](docs/a.md) and [b [c]](#d)", "see the `docs` and b [c]"),
        ("[a](https://a.b/c) [b](mailto:a@b) ![c](https://a.b/c.png)", None),
        ('[a](docs/a.md "title"), ![b](b.png "title")c', "a, c"),
        ("a\n\n![b](docs/b.png)\n\nc", "a\n\nc"),
        ("a\n\n[![b](docs/b.png)](docs/b.md)\n\nc", "a\n\nc"),
        ("[![b](docs/b.png) b](docs/b.md)", "b"),
        ('<p align="center"><img src="docs/b.png" width="9"></p>\nc', "c"),
        ('<img src="https://a.b/c.png"> <a href="https://a.b">b</a>', None),
        ('<a href="docs/a.md">a</a> <a href="https://a.b">b</a>', 'a <a href="https://a.b">b</a>'),
        ("```\n[a](docs/a.md)\n![b](b.png)\n```", None),
        ("```\n| ![b](b.png) |\n```\n[a](b)", "```\n| ![b](b.png) |\n```\na"),
        ("| a | [b](b.md) |\n|---|---|\n| c | d |", "| a | b |\n|---|---|\n| c | d |"),
        ("x\n\n| ![a](a.png) | ![b](b.png) |\n|---|:-:|\n| a | b |\n\ny", "x\n\ny"),
        ("| ![a](a.png) | ![b](b.png) |\n|---|---|\n| a | b |\n| c | d |", "| a | b |\n|---|---|\n| c | d |"),
        ("| a | b |\n|---|---|\n| ![a](a.png) | ![b](b.png) |\n\ny", "y"),
    ],
)
def test_the_page_of_an_index_has_no_links_into_the_repository(index_page, before, after):
    after = before if after is None else after
    page = index_page(before)
    assert page == after + "\n" and index_page(page) == page


def test_the_readme_leaves_no_link_to_a_file(index_page):
    page = index_page((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "](docs/" not in page and "](checkpoints/" not in page and 'src="docs' not in page
    assert (
        page.startswith("# diffusers-imagen\n")
        and "```python" in page
        and "](https://arxiv.org/abs/2205.11487)" in page
    )


# ---- metadata


def test_extras_and_commands():
    settings = read_setup(ROOT)
    assert settings["options.extras_require"]["emoji-weights"].split() == ["diffusers-imagen-emoji"]
    assert settings["options.entry_points"]["console_scripts"].strip() == (
        "diffusers-imagen = diffusers_imagen.commands.main:main"
    )
    assert settings["options.package_data"]["diffusers_imagen"] == "py.typed"
    assert all((ROOT / name).is_file() for name in settings["metadata"]["license_files"].split())


def test_the_lowest_constraints_are_the_lower_bounds():
    bounds = lower_bounds(read_setup(ROOT), "test")
    assert {"diffusers", "peft", "shtab", "pytest"} <= set(bounds)
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {name: Version(version) for name, version in pinned.items()}
    assert pinned == bounds


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_tested_versions_install_on_each_python(python):
    """Of the packages that are installed here in the tested version; the others' metadata is not at hand."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pins = [pin for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": python})]
    assert len({canonicalize_name(pin.name) for pin in pins}) == len(pins)  # one version each
    installed = {canonicalize_name(str(package.metadata["Name"])): package for package in metadata.distributions()}
    refused = []
    for pin in pins:
        package = installed.get(canonicalize_name(pin.name))
        if package and pin.specifier.contains(package.version, prereleases=True):
            needed = SpecifierSet(package.metadata.get("Requires-Python") or "")
            refused += [] if needed.contains(f"{python}.20") else [f"{pin}: {needed}"]
    assert refused == []


def test_lines_that_name_an_extra_name_one_that_there_is():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = {part.split("]")[0] for part in text.split("diffusers-imagen[")[1:]} - {"{extra}"}
    assert named and named <= set(read_setup(ROOT)["options.extras_require"])


@in_a_clone
def test_the_package_of_the_weights_is_found_by_its_entry_point(monkeypatch):
    settings = read_setup(EMOJI)
    name, entry = settings["options.entry_points"][shipped.ENTRY_POINTS].strip().split(" = ")
    assert name == shipped.NAME
    monkeypatch.syspath_prepend(EMOJI)
    module, attribute = entry.split(":")
    folder = getattr(importlib.import_module(module), attribute)
    assert folder == EMOJI / module / shipped.NAME
    assert not folder.exists()  # git has the weights once


@in_a_clone
def test_the_package_of_the_weights_has_the_version_of_the_package(index_page):
    build = runpy.run_path(str(EMOJI / "setup.py"))
    assert build["read_version"](ROOT / "setup.cfg") == read_setup(ROOT)["metadata"]["version"]
    assert "version" not in read_setup(EMOJI)["metadata"]
    page = build["read_card"](build["WEIGHTS"] / "README.md")
    assert page.startswith("# imagen-emoji\n") and index_page(page) == page


# ---- what `make dist` refuses


def test_a_tag_of_another_version_is_refused(checks):
    for tags in ([], ["v0.1.0"], ["nightly", "v0.1.0"]):
        checks["check_tag"]("0.1.0", tags)
    for version in ("0.1.0.dev0", "0.1.1"):
        with pytest.raises(ValueError, match=f"has the tag 'v0.1.0', but `version` in setup.cfg is '{version}'"):
            checks["check_tag"](version, ["nightly", "v0.1.0"])


def wheel(
    folder: Path, name: str, version: str, files: dict[str, bytes], page: str = "# a\n", requires: str = ""
) -> Path:
    """A wheel as far as it is read."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.4\nName: {name}\n{requires}\n{page}"
    with zipfile.ZipFile(path, "w") as made:
        for file, content in {**files, "METADATA": metadata.encode()}.items():
            made.writestr(file if "/" in file and "licenses/" not in file else f"{info}/{file}", content)
    return path


@pytest.fixture
def package_files() -> dict[str, bytes]:
    modules = [str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")]
    return dict.fromkeys([*modules, "diffusers_imagen/py.typed", "licenses/LICENSE", "licenses/NOTICE"], b"")


def test_a_wheel_that_lacks_a_file_or_has_weights_is_refused(checks, package_files, tmp_path):
    def check(**changes):
        checks["check_package"](
            wheel(tmp_path, "diffusers_imagen", "1.0", **{"files": package_files, **changes}), "1.0"
        )

    check()
    for name in ("diffusers_imagen/py.typed", "diffusers_imagen/train.py", "licenses/NOTICE"):
        with pytest.raises(ValueError, match=f"lacks .*{name}"):
            check(files={file: b"" for file in package_files if file != name})
    with pytest.raises(ValueError, match=r"has weights in it: \['diffusers_imagen/a.safetensors'\]"):
        check(files={**package_files, "diffusers_imagen/a.safetensors": b""})
    with pytest.raises(ValueError, match="The page of .* should be the result of index_page of setup.py"):
        check(page="[a](docs/a.md)\n")
    with pytest.raises(ValueError, match="should have the version of setup.cfg, '1.1'"):
        checks["check_package"](tmp_path / "diffusers_imagen-1.0-py3-none-any.whl", "1.1")


def test_a_wheel_with_other_weights_is_refused(checks, tmp_path, monkeypatch):
    weights, folder = tmp_path / "imagen-emoji", checks["FOLDER"]
    (weights / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/model.safetensors"):
        (weights / name).write_text(name)
    monkeypatch.setitem(checks["check_weights"].__globals__, "WEIGHTS", weights)
    files = {f"{folder}/{name}": name.encode() for name in ("model_index.json", "unet/model.safetensors")}
    files |= dict.fromkeys(
        ["diffusers_imagen_emoji/__init__.py", "licenses/LICENSE", "licenses/LICENSES/NOTICE.txt"], b""
    )

    def check(requires="Requires-Dist: diffusers-imagen>=1.0\n", **changed):
        made = wheel(tmp_path, "diffusers_imagen_emoji", "1.0", {**files, **changed}, requires=requires)
        checks["check_weights"](made, "1.0")

    check()
    with pytest.raises(
        ValueError, match=r"has other contents than checkpoints/imagen-emoji: \['.*/model_index.json'\]"
    ):
        check(**{f"{folder}/model_index.json": b"{}"})
    with pytest.raises(ValueError, match=r"has \['diffusers_imagen_emoji/.*extra'"):
        check(**{f"{folder}/extra": b""})
    with pytest.raises(ValueError, match="requires 'diffusers-imagen>=0.9', not this version"):
        check("Requires-Dist: diffusers-imagen>=0.9\n")


def test_other_files_than_the_three_are_refused(checks, tmp_path):
    names = ["diffusers_imagen-1.0-py3-none-any.whl", "diffusers_imagen_emoji-1.0-py3-none-any.whl"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="should have the wheels of diffusers_imagen and diffusers_imagen_emoji and"):
        checks["find_built"](tmp_path)
    (tmp_path / "diffusers_imagen-1.0.tar.gz").touch()
    assert {name: path.name for name, path in checks["find_built"](tmp_path).items()} == {
        **dict(zip(checks["NAMES"], names)),
        "sdist": "diffusers_imagen-1.0.tar.gz",
    }
    (tmp_path / "diffusers_imagen-0.9-py3-none-any.whl").touch()
    with pytest.raises(ValueError, match="one sdist"):
        checks["find_built"](tmp_path)
