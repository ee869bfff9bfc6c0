#!/usr/bin/env python
"""Check the results of `make dist` before publication: versions, contents, pages, and tests of the source distribution.

python scripts/check_dist.py dist
"""

import argparse
import email
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.message import Message
from pathlib import Path

from diffusers_imagen.utils.errors import run_to_exit_code


ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "checkpoints" / "imagen-emoji"
NAMES = ("diffusers_imagen", "diffusers_imagen_emoji")
FOLDER = "diffusers_imagen_emoji/imagen-emoji"  # of the weights in their wheel
MAX_BYTES = 100 * 2**20  # per file, the limit of PyPI
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt")  # of weights
# a part of the suite that takes seconds: the mathematics, files and folders, and the structure of the package
TESTS = (
    "tests/diffusion",
    "tests/utils",
    "tests/test_packages.py",
    "tests/test_structure.py",
    "tests/test_training_flags.py",
)


def check_tag(version: str, tags: list[str]) -> None:
    """Raise ValueError if the commit has a version tag, such as v0.1.0, of another version."""
    wrong = [tag for tag in tags if re.match(r"v\d", tag) and tag != f"v{version}"]
    if wrong:
        raise ValueError(f"The commit has the tag {wrong[0]!r}, but `version` in setup.cfg is {version!r}.")


def read_tags() -> list[str]:
    """Return the tags of the commit; none outside of a clone."""
    found = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def find_built(folder: Path) -> dict[str, Path]:
    """Return the two wheels by package name, and the source distribution, `sdist`.

    Raises:
        ValueError: If one is missing, there are others, or one is larger than an index accepts.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {path.name.split("-")[0]: path for path in files if path.suffix == ".whl"}
    found |= {"sdist": path for path in files if path.name.endswith(".tar.gz")}
    if set(found) != {*NAMES, "sdist"} or len(files) != len(found):
        names = [path.name for path in files]
        raise ValueError(f"'{folder}' has {names}, but should have the wheels of {' and '.join(NAMES)} and one sdist.")
    for path in files:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"'{path}' has {path.stat().st_size:,} bytes, but should have at most {MAX_BYTES:,}.")
    return found


def read_metadata(wheel: zipfile.ZipFile, file: str = "METADATA") -> Message:
    """Return the metadata of a wheel."""
    name = next(name for name in wheel.namelist() if name.endswith(f".dist-info/{file}"))
    return email.message_from_string(wheel.read(name).decode("utf-8"))


def check_version(path: Path, version: str) -> None:
    """Raise ValueError if a file has another version than setup.cfg."""
    if f"-{version}-" not in path.name and not path.name.endswith(f"-{version}.tar.gz"):
        raise ValueError(f"'{path.name}' should have the version of setup.cfg, {version!r}.")


def check_page(path: Path, page: str) -> None:
    """Raise ValueError for a page with links to files of the repository."""
    shorter = runpy.run_path(str(ROOT / "setup.py"))["index_page"](page)
    if shorter.strip() != page.strip() or not page.strip():
        raise ValueError(f"The page of '{path.name}' should be the result of index_page of setup.py.")


def check_files(path: Path, names: set[str], needed: set[str]) -> None:
    """Raise ValueError for missing files."""
    if needed - names:
        raise ValueError(f"'{path.name}' lacks {sorted(needed - names)}.")


def check_package(path: Path, version: str) -> None:
    """Check the wheel of the code."""
    check_version(path, version)
    info = f"diffusers_imagen-{version}.dist-info"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        modules = {str(file.relative_to(ROOT / "src")) for file in (ROOT / "src").rglob("*.py")}
        licenses = {f"{info}/licenses/{name}" for name in ("LICENSE", "NOTICE")}
        check_files(path, names, {*modules, *licenses, "diffusers_imagen/py.typed"})
        heavy = sorted(name for name in names if name.endswith(SUFFIXES))
        if heavy:
            raise ValueError(f"'{path.name}' has weights in it: {heavy}.")
        check_page(path, read_metadata(wheel).get_payload())


def check_weights(path: Path, version: str) -> None:
    """Check the wheel of the weights, which has exactly the files of checkpoints/imagen-emoji besides its module."""
    check_version(path, version)
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        files = {f"{FOLDER}/{file.relative_to(WEIGHTS)}": file for file in WEIGHTS.rglob("*") if file.is_file()}
        if names != {*files, "diffusers_imagen_emoji/__init__.py"}:
            raise ValueError(
                f"'{path.name}' has {sorted(names ^ set(files))} besides or instead of the cascade's files."
            )
        changed = sorted(name for name, file in files.items() if wheel.read(name) != file.read_bytes())
        if changed:
            raise ValueError(f"'{path.name}' has other contents than checkpoints/imagen-emoji: {changed}.")
        info = f"diffusers_imagen_emoji-{version}.dist-info"
        check_files(path, set(wheel.namelist()), {f"{info}/licenses/LICENSE", f"{info}/licenses/LICENSES/NOTICE.txt"})
        metadata = read_metadata(wheel)
        check_page(path, metadata.get_payload())
        if metadata["Requires-Dist"] != f"diffusers-imagen>={version}":
            raise ValueError(f"'{path.name}' requires {metadata['Requires-Dist']!r}, not this version of the package.")


def run_tests(path: Path) -> None:
    """Unpack a source distribution and run some of its tests there, on its own modules.

    Raises:
        ValueError: If they fail.
    """
    with tempfile.TemporaryDirectory(prefix="diffusers-imagen-sdist-") as folder:
        with tarfile.open(path) as tar:
            tar.extractall(folder, filter="data")
        (unpacked,) = Path(folder).iterdir()
        environment = {**os.environ, "PYTHONPATH": str(unpacked / "src")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        if subprocess.run(command, cwd=unpacked, env=environment).returncode:
            raise ValueError(f"The tests of '{path.name}' fail.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the two wheels and the source distribution")
    args = parser.parse_args()
    version = runpy.run_path(str(ROOT / "packages" / "emoji" / "setup.py"))["read_version"](ROOT / "setup.cfg")
    check_tag(version, read_tags())
    built = find_built(args.folder)
    check_package(built["diffusers_imagen"], version)
    check_weights(built["diffusers_imagen_emoji"], version)
    check_version(built["sdist"], version)
    run_tests(built["sdist"])
    for path in built.values():
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(run_to_exit_code(main, "check_dist.py"))
