"""The command `diffusers-imagen`."""

import io
import sys
from importlib.metadata import version

from ..utils.errors import run_to_exit_code
from . import (
    cache_embeddings,
    convert_config,
    convert_if,
    convert_nemo,
    demo,
    doctor,
    evaluate,
    export_if,
    export_nemo,
    generate,
    inpaint,
    reconstruct_ema,
    train,
    train_dreambooth,
    train_lora,
    upscale,
)
from .parser import Parser, check_numbers


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        Its exit code, 0 if it has none, 2 after one line about what does not fit, 130 if interrupted. A line that
        cannot be parsed ends in SystemExit with code 2.
    """

    def run() -> int | None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
        args = make_parser().parse_args(argv)
        check_numbers(args)
        return args.run(args)

    return run_to_exit_code(run, "diffusers-imagen")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="diffusers-imagen", description="Imagen for diffusers.")
    parser.add_argument("--version", action="version", version=version("diffusers-imagen"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    drawing, data = (generate, upscale, inpaint, demo), (cache_embeddings, doctor, evaluate)
    weights = (convert_if, export_if, convert_nemo, export_nemo)
    training = (train, train_lora, train_dreambooth, reconstruct_ema)
    for command in (*drawing, *training, *data, *weights, convert_config):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
