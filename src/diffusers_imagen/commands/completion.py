"""`diffusers-imagen completion`: print the completion script of a shell. Requires shtab."""

import argparse
from pathlib import Path
from typing import Any

from ..utils.packages import MissingPackages, require_packages
from .parser import Parser


PLACES = {  # where the shells search for it
    "bash": "~/.local/share/bash-completion/completions/diffusers-imagen",
    "zsh": "_diffusers-imagen in a folder of fpath",
    "fish": "~/.config/fish/completions/diffusers-imagen.fish",
}


def add_arguments(command: Parser) -> None:
    """Add the options of the command."""
    places = "; ".join(f"{shell}: {place}" for shell, place in PLACES.items())
    command.description = f"Print the completion script of a shell; save it where the shell searches for it. {places}."
    command.add_argument("shell", choices=tuple(PLACES), help="the shell")
    command.set_defaults(run=completion)


def completion(args: argparse.Namespace) -> None:
    """Print the completion script."""
    require_packages("completion", "completion", "shtab")
    import shtab

    from .main import COMMANDS, commands_of, make_parser

    parser = make_parser()
    commands: dict[str, Any] = commands_of(parser)
    commands |= training_commands()
    for name, command in commands.items():
        command.description = COMMANDS[name].help  # in one line, beside the name
        offer_files(command, shtab.FILE)
    print(shtab.complete(parser, shell=args.shell))


def training_commands() -> dict[str, argparse.ArgumentParser]:
    """
    Return the training commands' parsers by name, created from configurations; empty without the packages for
    training.
    """
    try:
        from ..training import DreamBoothTrainingConfig, LoraTrainingConfig, TrainingConfig
    except MissingPackages:
        return {}
    from ..training.options import OptionParser

    configs: tuple[Any, ...] = (TrainingConfig, LoraTrainingConfig, DreamBoothTrainingConfig)
    return dict(zip(("train", "train-lora", "train-dreambooth"), map(OptionParser, configs)))


def offer_files(command: argparse.ArgumentParser, files: dict[str, Any]) -> None:
    """Complete arguments of any text with file names, as shells do by default."""
    for action in command._actions:
        if action.choices is None and action.nargs != 0 and action.type in (None, str, Path):
            setattr(action, "complete", files)  # read by shtab
