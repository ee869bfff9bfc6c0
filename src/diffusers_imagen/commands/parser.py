"""Command line parser: full option names, numbers within ranges, and one-line errors, before anything is loaded."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ..utils.errors import USAGE
from ..utils.flags import BothSpellings, hyphenated


PROMPT = "the prompt; none for a model that is not conditioned on text"
MAX_PROMPT_LENGTH = 10_000  # in characters; text encoders use a few hundred tokens


class Range(NamedTuple):
    """Range of an option's numbers, both bounds included."""

    flag: str
    name: str  # of the argument in messages
    lowest: int | float
    highest: int | float

    def check(self, value: Any) -> None:
        """Raise ValueError for a number outside the range, or NaN."""
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"`{self.name}` is {value}, but should be from {self.lowest:,} to {self.highest:,}.")


class Default(NamedTuple):
    """Default value that requires slow imports; it is computed when a command runs, and not for its help."""

    text: str  # shown in the help
    find: Callable[[], Any]

    def __str__(self) -> str:
        return self.text


class Parser(BothSpellings):
    """Parser that requires full option names, reports errors in one line, and checks ranges of numbers.

    Subparsers have the same class.

    Attributes:
        unread (`bool`):
            Whether arguments, including `--help`, are left to a parser that is created later; they are then the list
            `arguments` of the namespace.
    """

    unread = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.ranges: dict[str, Range] = {}
        self.set_defaults(ranges=self.ranges)

    def add_number(
        self, flag: str, kind: type, lowest: float, highest: float, name: str | None = None, **kwargs
    ) -> None:
        """Add an option for numbers from `lowest` to `highest`; see `check_numbers`.

        `name` is the name in messages if it differs from the flag: an argument of a pipeline.
        """
        action = self.add_argument(flag, type=kind, **kwargs)
        self.ranges[action.dest] = Range(flag, name or flag.lstrip("-"), lowest, highest)

    def leave_unread(self, run: Callable[[list[str], str], int]) -> None:
        """Leave the arguments to `run(arguments, program)`, which has its own parser."""
        self.unread = True
        self.set_defaults(run=lambda args: run(args.arguments, self.prog))

    def with_flags(self, message: str) -> str:
        """Replace names of Python arguments in a message by those of the options."""
        for action in self._actions:
            if action.option_strings:
                message = message.replace(f"`{action.dest}`", f"`{action.option_strings[-1].lstrip('-')}`")
        other = [
            own for own in self.ranges.values() if own.name != own.flag.lstrip("-") and f"`{own.name}`" in message
        ]
        flags = ", ".join(own.flag for own in other if own.flag not in message)
        return f"{message.rstrip('.')} ({flags})." if flags else message

    def parse_known_args(self, args=None, namespace=None):
        if self.unread:
            return argparse.Namespace(**self._defaults, arguments=list(args)), []
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self.describe_unknown(unknown[0]))
        return namespace, unknown

    def describe_unknown(self, argument: str) -> str:
        """Return an error message for an unknown argument, with a suggestion."""
        name = argument.split("=")[0]
        positionals = {
            hyphenated(f"--{action.dest}"): action.dest for action in self._actions if not action.option_strings
        }
        positional = positionals.get(hyphenated(name))
        if positional is not None:
            return f"there is no option {name}: pass the {positional} without it, in quotes if it has spaces"
        if not argument.startswith("-"):
            quotes = "" if any(map(str.isspace, argument)) else ": an argument of several words needs quotes"
            return f"unrecognized argument {argument!r}{quotes}"
        options = {hyphenated(option): option for action in self._actions for option in action.option_strings}
        close = difflib.get_close_matches(hyphenated(name), options, n=1)
        return f"there is no option {name}" + (f": did you mean {options[close[0]]}?" if close else "")

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(USAGE, f"{self.prog}: error: {line[:500]} (see {self.prog} --help)\n")


def find_defaults(args: argparse.Namespace) -> None:
    """Compute the default values that are still unset."""
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.find())


def check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError for a number outside the range of its option."""
    for name, range in args.ranges.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, (int, float)):  # excludes None and defaults per stage
                range.check(value)


def check_prompt(name: str, prompt: str | None) -> None:
    """Raise ValueError for a prompt that tokenizers do not support."""
    if prompt is None:
        return
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise ValueError(f"`{name}` has {len(prompt):,} characters, but should have at most {MAX_PROMPT_LENGTH:,}.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is {prompt!r}, which is not valid UTF-8.") from error


def check_prompt_or_none(prompt: str | None, model: str | None) -> None:
    """Raise ValueError for an empty prompt, and for none if `model` is None, the shipped cascade. Whether another model
    needs one is known when it is loaded."""
    if prompt is None and model is None:
        raise ValueError("`prompt` is missing, but the default model, the shipped cascade, is conditioned on text.")
    if prompt is not None and not prompt.strip():
        raise ValueError(f"`prompt` is {prompt!r}, but should not be empty.")
