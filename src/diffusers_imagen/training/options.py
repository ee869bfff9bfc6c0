"""The options of a training script: flags, and a YAML file of the same names."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional, TypeVar

import yaml
from transformers import HfArgumentParser

from .config import TrainingConfig


Config = TypeVar("Config", bound=TrainingConfig)


def parse_args(
    argv: Optional[list[str]] = None,
    description: Optional[str] = None,
    config_class: type[Config] = TrainingConfig,
) -> Config:
    """The settings of a run from the command line; flags win over what `--config FILE.yaml` says.

    Args:
        argv (`list[str]`, *optional*): The flags; those of the process if None.
        description (`str`, *optional*): What `--help` begins with.
        config_class (`type`, defaults to `TrainingConfig`): Whose fields are the flags.

    Raises:
        ValueError: If the file cannot be read, has a name that is no option, or a value does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config", type=Path)
    given, flags = file.parse_known_args(argv)
    if given.config is not None:
        flags = yaml_to_flags(given.config, config_class) + flags  # of two values the parser takes the later

    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="File with the same names; flags win over it.")
    namespace = parser.parse_args(flags)
    return config_class(**{f.name: getattr(namespace, f.name) for f in fields(config_class)})


def yaml_to_flags(path: Path, config_class: type[TrainingConfig] = TrainingConfig) -> list[str]:
    """The entries of a YAML file as flags.

    Raises:
        ValueError: If it is no file of names and values, or has names that are no options.
    """
    try:
        entries = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`config` is '{path}', which cannot be read: {reason}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"`config` is '{path}', but should have a line `name: value` for each option.")
    known = {f.name for f in fields(config_class)}
    unknown = sorted(str(name) for name in entries.keys() - known)
    if unknown:
        raise ValueError(f"`config` '{path}' has {unknown}, which are no options; --help lists those there are.")
    return [part for name, value in entries.items() for part in to_flag(name, value)]


def to_flag(name: str, value: Any) -> list[str]:
    """An entry as the parts of a command line; null leaves the default."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]
