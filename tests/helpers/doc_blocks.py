"""Code blocks of Markdown pages: read, parsed, and run in a prepared folder.

A fenced block of `python` or `bash` runs, unless a comment stands before it:

    <!-- not run: needs a GPU -->
    <!-- run by tests/test_migrating.py -->

Such a block is parsed: Python by `ast`, commands of this package by their own parsers.
"""

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from tiny_runs import reset_accelerate

from diffusers_imagen.commands import main as command_line
from diffusers_imagen.commands.parser import check_numbers
from diffusers_imagen.training import (
    DreamBoothLoraTrainer,
    DreamBoothTrainer,
    DreamBoothTrainingConfig,
    LoraTrainer,
    LoraTrainingConfig,
    Trainer,
    TrainingConfig,
    parse_args,
)
from diffusers_imagen.training.network import make_unet
from diffusers_imagen.training.options import OptionParser


ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(
    r"(?P<comment>^[ ]*<!--[ ](?P<marker>not run:|run by)[ ](?P<reason>[^\n]+?)[ ]-->\n\s*)?"
    r"^(?P<indent>[ ]*)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
CONFIGS = {
    "train_imagen.py": TrainingConfig,
    "train_imagen_lora.py": LoraTrainingConfig,
    "train_imagen_dreambooth.py": DreamBoothTrainingConfig,
}
TRAINING = {
    "train": "scripts/train_imagen.py",
    "train-lora": "scripts/train_imagen_lora.py",
    "train-dreambooth": "scripts/train_imagen_dreambooth.py",
}
TRAINERS = {TrainingConfig: Trainer, LoraTrainingConfig: LoraTrainer, DreamBoothTrainingConfig: DreamBoothTrainer}
ONE_STEP = "--max_train_steps 1 --train_batch_size 1 --lr_warmup_steps 0 --mixed_precision no".split()
SHELL = ("printf", "mkdir")  # programs that are run as they are
SERVERS = ("demo",)  # commands that end when they are interrupted


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    not_run: str | None  # why, or by which test it is run

    @property
    def place(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages() -> list[Path]:
    """All pages that have code: README.md and those under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read_blocks(page: Path, language: str | None = None) -> list[Block]:
    """The blocks of a page, or those of one language."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, match["language"], code, match["reason"]))
    return [block for block in found if language in (None, block.language)]


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block of shell: words, without comments and assignments, with variables in their places."""
    variables, commands = {}, []
    text = re.sub(r"\\\n", " ", block.text)
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in lines_of(text):
        if assignment := re.fullmatch(r"(\w+)=\"([^\"]*)\"", line.strip()):
            variables[assignment[1]] = expand(assignment[2], variables)
        else:
            for part in re.split(r"\s&&\s", line):
                commands.append(shlex.split(expand(part, variables)))
    return [command for command in commands if command]


def lines_of(text: str) -> list[str]:
    """Lines of shell without comments; what is in quotes may go over several."""
    lines, quote, start = [""], "", True  # start: whether a word may begin here
    for character in re.sub(r"(?m)^\s*#.*$", "", text):
        if quote == "#":
            quote = "" if character == "\n" else quote
        elif quote:
            quote = "" if character == quote else quote
        elif character in "'\"" or (character == "#" and start):
            quote = character
        if quote != "#" and (character != "\n" or quote):
            lines[-1] += character
        elif character == "\n":
            lines.append("")
        start = character.isspace()
    return lines


def expand(text: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), text).replace("\n", " ")


class Command(NamedTuple):
    """A command as it counts here: without environment, launcher and folder of the virtual environment."""

    program: str  # diffusers-imagen, the name of a script, or another program
    arguments: list[str]

    @classmethod
    def of(cls, words: list[str]) -> "Command":
        while re.match(r"\w+=", words[0]):
            words = words[1:]
        program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
        if program in ("accelerate", "torchrun", "python", "sbatch"):
            for place, word in enumerate(arguments):
                if word.startswith(("scripts/", "examples/")):
                    return cls(word, arguments[place + 1 :])
                if word in ("diffusers_imagen", "diffusers_imagen.commands.main"):
                    return cls.of(["diffusers-imagen", *arguments[place + 1 :]])
                if word.startswith("diffusers_imagen.train"):
                    return cls(TRAINING[word.partition(".")[2].replace("_", "-")], arguments[place + 1 :])
        if program == "diffusers-imagen" and arguments and arguments[0] in TRAINING:
            return cls(TRAINING[arguments[0]], arguments[1:])
        return cls(program, arguments)

    @property
    def script(self) -> str:
        return Path(self.program).name

    def check(self) -> None:
        """Raises if the program or an option is not there."""
        if self.program == "diffusers-imagen":
            check_numbers(command_line.make_parser().parse_args(self.arguments))
        elif self.script in CONFIGS:
            check_flags(self.arguments, CONFIGS[self.script])
        elif "/" in self.program:
            source = (ROOT / self.program).read_text(encoding="utf-8")
            for option in (word for word in self.arguments if word.startswith("--")):
                assert f'"{option}"' in source or f"{option[2:]}: " in source, f"{self.program} has no {option}"
        elif self.program == "make":
            for target in (word for word in self.arguments if "=" not in word):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"there is no target {target}"
        elif self.program == "pip":
            for extra in re.findall(r"(?<=diffusers-imagen\[)[\w,-]+", " ".join(self.arguments)):
                extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
                assert all(f"\n{name} =\n" in extras for name in extra.split(",")), f"there is no extra {extra}"

    def run(self) -> None:
        """Does what it says, if that is for this package to do, in this process."""
        self.check()
        if self.program == "diffusers-imagen" and self.arguments[0] not in SERVERS:
            # doctor ends with 1 if it finds something in the data
            assert command_line.main(self.arguments) in (0, *(1,) * (self.arguments[0] == "doctor"))
        elif self.script in CONFIGS:
            self.train()
        elif self.program in SHELL:
            subprocess.run(["bash", "-c", self.shell_line()], check=True)

    def train(self) -> None:
        """A training run of one step."""
        config = parse_args([*self.arguments, *ONE_STEP], config_class=CONFIGS[self.script])
        trainer = TRAINERS[type(config)]
        if trainer is DreamBoothTrainer and config.rank is not None:
            trainer = DreamBoothLoraTrainer
        reset_accelerate()
        try:
            trainer(config, make_unet(config)).train()
        finally:
            reset_accelerate()

    def shell_line(self) -> str:
        words = [word if word == ">" else shlex.quote(word) for word in (self.program, *self.arguments)]
        return " ".join(words)


def check_flags(arguments: list[str], config_class: type) -> None:
    """Raises ValueError for wrong options of training; what a `--config` has is left open."""
    if "--config" not in arguments:
        parse_args(arguments, config_class=config_class)
        return
    parser = OptionParser(config_class, allow_abbrev=False)
    parser.add_argument("--config")
    parser.parse_args(arguments)


def check_block(block: Block) -> None:
    """Parses a block."""
    if block.language == "python":
        ast.parse(block.text, block.place)
    elif block.language == "bash":
        for words in commands_of(block):
            Command.of(words).check()


def run_block(block: Block, names: dict[str, Any]) -> None:
    """Runs a block; `names` are what blocks before it left."""
    if block.language == "python":
        # in tracebacks the lines have the numbers that they have on the page
        exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)
    elif block.language == "bash":
        for words in commands_of(block):
            Command.of(words).run()
