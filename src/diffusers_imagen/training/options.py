"""The options of a training script: flags, and a YAML file of the same names."""

import argparse
import sys
from dataclasses import fields
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from transformers import HfArgumentParser

from ..utils.flags import BothSpellings
from ..utils.yaml import read_yaml
from .config import TrainingConfig
from .settings import hints_of


Config = TypeVar("Config", bound=TrainingConfig)


class OneLineErrors(BothSpellings):
    """A parser that raises instead of showing all options and leaving the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options.")


class OptionParser(OneLineErrors, HfArgumentParser):
    """A parser of a dataclass's fields."""

    def add_argument(self, *names: Any, place: str | None = None, **kwargs: Any) -> argparse.Action:
        """As argparse, without what `arg` says of places: HfArgumentParser hands on all metadata of a field."""
        return super().add_argument(*names, **kwargs)


def parse_args(
    argv: list[str] | None = None,
    description: str | None = None,
    config_class: type[Config] = TrainingConfig,  # type: ignore[assignment]  # mypy knows no defaults of type variables
    program: str | None = None,
) -> Config:
    """The settings of a run from the command line; flags win over what `--config FILE.yaml` says.

    Args:
        argv (`list[str]`, *optional*): The flags; those of the process if None.
        description (`str`, *optional*): What `--help` begins with.
        config_class (`type`, defaults to `TrainingConfig`): Whose fields are the flags.
        program (`str`, *optional*): What `--help` calls the program; without it, the file of the process.

    Raises:
        ValueError: If the file cannot be read, there is a name that is no option, or a value does not fit.
    """
    argv = sys.argv[1:] if argv is None else argv
    file = OneLineErrors(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    given, flags = file.parse_known_args(argv)

    # HfArgumentParser takes a dataclass, its base class does not
    options = {"prog": program, "description": description, "allow_abbrev": False}
    parser = OptionParser(config_class, **options)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="File with the same names; flags win over it.")
    if given.config is not None:
        parser.set_defaults(**read_settings(given.config, config_class))
    namespace = parser.parse_args(flags)
    return config_class(**{f.name: getattr(namespace, f.name) for f in fields(config_class)})


def read_settings(path: str, config_class: type[TrainingConfig] = TrainingConfig) -> dict[str, Any]:
    """The entries of a YAML file but for those that are null, which leave the default.

    Raises:
        ValueError: If it is no file of names and values, or has names that are no options.
    """
    entries = read_yaml(path, "config")
    if not isinstance(entries, dict):
        raise ValueError(f"`config` is '{path}', but should have a line `name: value` for each option.")
    known = {f.name for f in fields(config_class)}
    unknown = sorted(entries.keys() - known)
    if unknown:
        raise ValueError(f"`config` '{path}' has {unknown}, which are no options; --help lists those there are.")
    hints = hints_of(config_class)
    return {name: read_value(value, hints[name]) for name, value in entries.items() if value is not None}


def read_value(value: Any, hint: Any) -> Any:
    """An entry as the option takes it: one value for a list of one, and numbers that YAML takes for strings (1e-4).

    What does not fit is left to the check of types, and a single string to argparse.
    """
    kinds = [kind for part in (hint, *get_args(hint)) if get_origin(part) is list for kind in get_args(part)]
    if not kinds:
        return value
    entries = value if isinstance(value, list) else [value]
    try:
        return [float(entry) if float in kinds and isinstance(entry, str) else entry for entry in entries]
    except ValueError:
        return entries
