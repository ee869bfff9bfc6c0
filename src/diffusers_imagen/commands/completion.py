"""`diffusers-imagen completion`: what a shell needs to complete the commands and options of this one."""

import argparse
import importlib.util

from .parser import Parser


SHELLS = {
    "bash": 'eval "$(diffusers-imagen completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(diffusers-imagen completion zsh)" in ~/.zshrc, after compinit',
    "fish": "diffusers-imagen completion fish | source in ~/.config/fish/config.fish",
}


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    command.description = "Prints the completion script of a shell. " + "; ".join(SHELLS.values()) + "."
    command.add_argument("shell", choices=tuple(SHELLS), help="the shell")
    command.set_defaults(run=completion)


def completion(args: argparse.Namespace) -> None:
    """Print the script."""
    if importlib.util.find_spec("shtab") is None:
        raise ValueError("completion needs shtab: pip install 'diffusers-imagen[completion]'")
    import shtab

    from .main import make_parser

    print(shtab.complete(make_parser(), shell=args.shell))
