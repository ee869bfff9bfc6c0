"""`diffusers-imagen completion`: what a shell needs to complete the commands and options of this one. Needs shtab."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

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

    from .main import COMMANDS, commands_of, make_parser

    parser = make_parser()
    for name, command in commands_of(parser).items():
        command.description = COMMANDS[name].help  # in one line, beside the name
        offer_files(command, shtab.FILE)
    print(shtab.complete(parser, shell=args.shell))


def offer_files(command: argparse.ArgumentParser, files: dict[str, Any]) -> None:
    """Let names of files complete arguments that take any text, as shells do where they are told nothing."""
    for action in command._actions:
        if action.choices is None and action.nargs != 0 and action.type in (None, str, Path):
            setattr(action, "complete", files)  # where shtab looks
