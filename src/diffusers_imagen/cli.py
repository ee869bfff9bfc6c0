"""The command `diffusers-imagen`."""

import argparse
import sys
from typing import Optional

from . import __version__
from .commands import cache_embeddings, convert_config, demo, doctor, generate, inpaint, reconstruct_ema, upscale


def main(argv: Optional[list[str]] = None) -> int:
    """Runs a command; returns its exit code, 0 if it has none, 2 after one line about a bad argument, 130 if interrupted."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except ValueError as error:
        print(f"diffusers-imagen: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="diffusers-imagen", description="Imagen for diffusers.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (generate, upscale, inpaint, demo, cache_embeddings, convert_config, doctor, reconstruct_ema):
        command.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
