"""The command `diffusers-imagen`."""

import difflib
import importlib
import io
import sys
from collections.abc import Collection
from importlib.metadata import version
from typing import NamedTuple

from ..utils.errors import run_to_exit_code
from .parser import Parser, check_numbers, find_defaults


class Command(NamedTuple):
    """Where a command is, and its line in the list of commands."""

    module: str  # of this package, with `add_arguments`
    help: str


COMMANDS = {
    "generate": Command("generate", "make pictures from prompts"),
    "upscale": Command("upscale", "make a picture larger"),
    "inpaint": Command("inpaint", "paint a part of a picture anew"),
    "demo": Command("demo", "draw in a browser"),
    "train": Command("train", "train a stage of a cascade"),
    "train-lora": Command("train_lora", "train a LoRA adapter of a stage"),
    "train-dreambooth": Command("train_dreambooth", "teach a stage a subject from a few images (DreamBooth)"),
    "reconstruct-ema": Command("reconstruct_ema", "average the weights of a finished run over another length"),
    "cache-embeddings": Command("cache_embeddings", "encode the captions of a data set once"),
    "doctor": Command("doctor", "examine a data set, a trained stage or an embedding cache"),
    "evaluate": Command("evaluate", "FID, KID, CLIP score and others of a model"),
    "convert-if": Command("convert_if", "write DeepFloyd IF in the format of this package"),
    "export-if": Command("export_if", "write a stage of DeepFloyd IF in diffusers' format"),
    "convert-nemo": Command("convert_nemo", "convert checkpoints of NVIDIA NeMo's Imagen"),
    "export-nemo": Command("export_nemo", "write a stage as an archive of NVIDIA NeMo"),
    "convert-config": Command("convert_config", "translate a NeMo configuration for training"),
    "completion": Command("completion", "print a script that completes this command in a shell"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Its exit code, 0 if it has none, 2 after one line about what does not fit, 130 if interrupted. A line that
        cannot be parsed ends in SystemExit with code 2.
    """

    def run() -> int | None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        arguments = sys.argv[1:] if argv is None else argv
        named = next((argument for argument in arguments if not argument.startswith("-")), None)
        parser = make_parser(() if named is None else (named,))
        if named not in (None, *COMMANDS):
            parser.error(describe_unknown(str(named)))
        args = parser.parse_args(arguments)
        try:
            check_numbers(args)
            find_defaults(args)
            return args.run(args)
        except ValueError as error:
            raise ValueError(commands_of(parser)[str(named)].with_flags(str(error))) from error

    return run_to_exit_code(run, "diffusers-imagen")


def make_parser(names: Collection[str] = tuple(COMMANDS)) -> Parser:
    """Make the command line.

    Args:
        names (`Collection[str]`, defaults to all): The commands whose modules are imported for their arguments; of the
            others there is the name.
    """
    parser = Parser(prog="diffusers-imagen", description="Imagen for diffusers.")
    parser.add_argument("--version", action="version", version=version("diffusers-imagen"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.help)
        if name in names:
            importlib.import_module(f".{command.module}", __package__).add_arguments(of_command)
    return parser


def commands_of(parser: Parser) -> dict[str, Parser]:
    """The parsers of the commands of a command line, by name."""
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def describe_unknown(name: str) -> str:
    """What may have been meant by a command that does not exist."""
    close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    meant = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name!r}: {meant}"


if __name__ == "__main__":
    sys.exit(main())
