"""The commands of docs/deepfloyd.md, against repositories of IF's kind on a Hub of our own."""

import json
from pathlib import Path

import hub_server
import pytest
from deepfloyd_repository import stage_1, stage_2, write_repository
from doc_blocks import commands_of, read_blocks
from hub_client import Client
from PIL import Image


PAGE = Path(__file__).parents[2] / "docs" / "deepfloyd.md"
RUN = """
import os, sys
from diffusers_imagen.commands.main import main
commands = COMMANDS
token = os.environ.pop("HF_TOKEN")
assert main(commands[0]) == 2
print("logged in", file=sys.stderr)
os.environ["HF_TOKEN"] = token
for command in commands:
    assert main(command) == 0, command
"""


def commands_of_the_page() -> list[list[str]]:
    """Its lines for the command line, each as a list of arguments; pictures with few steps."""
    blocks = [block for block in read_blocks(PAGE) if block.not_run == "tests/commands/test_deepfloyd_page.py"]
    commands = [words[1:] for block in blocks for words in commands_of(block) if words[0] == "diffusers-imagen"]
    return [line + ["--steps", "2"] * (line[0] in ("generate", "upscale")) for line in commands]


@pytest.fixture
def hub(tmp_path):
    """Repositories for those alone who log in."""
    with hub_server.Hub() as hub:
        for name, make in (("IF-I-M-v1.0", stage_1), ("IF-II-M-v1.0", stage_2)):
            folder = write_repository(make(), tmp_path / name, variant="fp16")
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
            hub.fill(f"DeepFloyd/{name}", {**files, "LICENSE.md": b"the license", "README.md": b"# A card\n"})
        hub.private = True
        yield hub
    assert hub.unknown == []


def test_the_commands_run(hub, tmp_path):
    commands = commands_of_the_page()
    assert [command[0] for command in commands][:3] == ["generate", "generate", "convert-if"] and len(commands) == 7
    client = Client(tmp_path)
    client.run(RUN.replace("COMMANDS", repr(commands)))
    error = (tmp_path / "run-1.err").read_text()
    (line,) = (line for line in error.splitlines() if line.startswith("diffusers-imagen: error: "))
    assert "`model` is 'DeepFloyd/IF-I-M-v1.0'" in line and "hf auth login" in line
    assert error.index(line) < error.index("logged in")

    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes == {"corgi": (32, 32), "fast": (32, 32), "small": (16, 16), "large": (32, 32)}
    for folder in ("if-m", "if-ii-m", "if-i-m-diffusers"):
        assert (tmp_path / folder / "LICENSE.md").read_text() == "the license"
    card = (tmp_path / "if-m" / "README.md").read_text()
    assert "DeepFloyd is licensed under the DeepFloyd License" in card and "DeepFloyd/IF-I-M-v1.0" in card
    index = json.loads((tmp_path / "if-m" / "model_index.json").read_text())
    assert index["origin"]["sr256"] == {"base_model": "DeepFloyd/IF-II-M-v1.0", "license": "deepfloyd"}
