"""Build the package of weights from checkpoints/imagen-emoji, with the version of diffusers-imagen."""

import configparser
import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "checkpoints" / "imagen-emoji"


class BuildWithWeights(build_py):
    """Copy the weights next to the module, because git has only one copy."""

    def run(self):
        super().run()
        folder = Path(self.build_lib, "diffusers_imagen_emoji", WEIGHTS.name)
        shutil.rmtree(folder, ignore_errors=True)  # files of an earlier build
        shutil.copytree(WEIGHTS, folder)


def read_version(path: Path) -> str:
    """Return the version of the package that a setup.cfg describes."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(path, encoding="utf-8")
    return settings["metadata"]["version"]


def read_card(path: Path) -> str:
    """Return a model card as a page for an index: without its front matter and without links to its folder."""
    _, _, page = path.read_text(encoding="utf-8").split("---\n", 2)
    return runpy.run_path(str(ROOT / "setup.py"))["index_page"](page)


if __name__ == "__main__":
    version = read_version(ROOT / "setup.cfg")
    setup(
        version=version,
        install_requires=[f"diffusers-imagen>={version}"],
        long_description=read_card(WEIGHTS / "README.md"),
        cmdclass={"build_py": BuildWithWeights},
    )
