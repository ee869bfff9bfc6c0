"""Command line entry point: the command `diffusers-imagen`."""

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
    """Module of a command, and its line in the list of commands."""

    module: str  # of this package, with `add_arguments`
    help: str


COMMANDS = {
    "generate": Command("generate", "generate images from prompts"),
    "upscale": Command("upscale", "upscale an image"),
    "inpaint": Command("inpaint", "repaint a part of an image"),
    "demo": Command("demo", "use a model in a browser"),
    "train": Command("train", "train a stage of a cascade"),
    "train-lora": Command("train_lora", "train a LoRA adapter of a stage"),
    "train-dreambooth": Command("train_dreambooth", "fine-tune a stage on a few images of a subject (DreamBooth)"),
    "reconstruct-ema": Command("reconstruct_ema", "average the weights of a finished run over another length"),
    "cache-embeddings": Command("cache_embeddings", "write the text embeddings of a data set's captions to disk"),
    "doctor": Command("doctor", "check a data set, a trained stage or an embedding cache"),
    "evaluate": Command("evaluate", "compute FID, KID, CLIP score and other metrics of a model"),
    "convert-if": Command("convert_if", "convert DeepFloyd IF to the format of this package"),
    "export-if": Command("export_if", "export a stage of DeepFloyd IF to diffusers' format"),
    "convert-nemo": Command("convert_nemo", "convert checkpoints of NVIDIA NeMo's Imagen"),
    "export-nemo": Command("export_nemo", "export a stage to an archive of NVIDIA NeMo"),
    "convert-config": Command("convert_config", "convert a NeMo configuration to training settings"),
    "completion": Command("completion", "print the completion script of a shell"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: that of the command, or 0; 2 after a one-line error message; 130 if interrupted. Arguments that
        cannot be parsed raise SystemExit with code 2.
    """

    def run() -> int | None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names can contain undecodable bytes
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
    """Create the command line parser.

    Args:
        names (`Collection[str]`, defaults to all):
            Commands whose modules are imported to add their arguments; of other commands only the name is added.
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
    """Return the parsers of the commands, by name."""
    return next(action.choices for action in parser._actions if isinstance(action.choices, dict))


def describe_unknown(name: str) -> str:
    """Return an error message for a command that does not exist, with a suggestion."""
    close = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
    meant = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
    return f"there is no command {name!r}: {meant}"


if __name__ == "__main__":
    sys.exit(main())
