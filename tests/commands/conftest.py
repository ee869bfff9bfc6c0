"""A saved model, and commands that are run in this process."""

import numpy as np
import pytest
from PIL import Image

from diffusers_imagen.commands import main as cli


@pytest.fixture
def model(cascade, tmp_path) -> str:
    cascade.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder: pictures and a file of prompts."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    (folder / "prompts.txt").write_text("a red apple\na blue face\n")
    (folder / "file").write_text("x")
    (folder / "folder.png").mkdir()
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit code, what it printed, and the lines of stderr."""

    def run(*arguments):
        capsys.readouterr()
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as exit:  # of the parser
            code = exit.code
        out, error = capsys.readouterr()
        return code, out, error.strip().splitlines()

    return run
