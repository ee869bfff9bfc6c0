"""What the command line asks of arguments before anything is loaded: their names in full, and numbers in their range."""

import argparse
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ..utils.errors import USAGE
from ..utils.flags import BothSpellings, hyphenated


MAX_PROMPT_LENGTH = 10_000  # in characters; a text encoder reads some hundred tokens


class Range(NamedTuple):
    """The numbers that an option takes, both ends included."""

    flag: str
    name: str  # of the argument in messages
    lowest: int | float
    highest: int | float

    def check(self, value: Any) -> None:
        """Raises ValueError for a number outside, or NaN."""
        if not self.lowest <= value <= self.highest:
            raise ValueError(f"`{self.name}` is {value}, but should be from {self.lowest:,} to {self.highest:,}.")


class Default(NamedTuple):
    """A default that takes an import of seconds to find out: a command does it when it runs, and not for its help."""

    text: str  # of the help
    find: Callable[[], Any]

    def __str__(self) -> str:
        return self.text


class Parser(BothSpellings):
    """A parser that wants options in full, reports errors in one line, and knows the ranges of numbers.

    Subparsers are of the same class.

    Attributes:
        unread (`bool`): Whether its arguments are left as they are, `--help` too, for a parser that is made later: they
            are the list `arguments` of the namespace.
    """

    unread = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.ranges: dict[str, Range] = {}
        self.set_defaults(ranges=self.ranges)

    def add_number(
        self, flag: str, kind: type, lowest: float, highest: float, name: str | None = None, **kwargs
    ) -> None:
        """Adds an option that takes numbers of a kind, from `lowest` to `highest`; see `check_numbers`.

        `name` is what messages call it, where that is not its flag: the argument of a pipeline.
        """
        action = self.add_argument(flag, type=kind, **kwargs)
        self.ranges[action.dest] = Range(flag, name or flag.lstrip("-"), lowest, highest)

    def leave_unread(self, run: Callable[[list[str], str], int]) -> None:
        """Leave the arguments to `run(arguments, program)`, which has a parser of its own."""
        self.unread = True
        self.set_defaults(run=lambda args: run(args.arguments, self.prog))

    def with_flags(self, message: str) -> str:
        """A message about arguments, of which some are named as in Python, for somebody who gave them as options."""
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
        """What may have been meant by an argument that has no place."""
        name = argument.split("=")[0]
        positionals = {
            hyphenated(f"--{action.dest}"): action.dest for action in self._actions if not action.option_strings
        }
        positional = positionals.get(hyphenated(name))
        if positional is not None:
            return f"there is no option {name}: give the {positional} without it, in quotes if it has spaces"
        if not argument.startswith("-"):
            return f"unrecognized argument {argument!r}: one of several words needs quotes"
        options = {hyphenated(option): option for action in self._actions for option in action.option_strings}
        close = difflib.get_close_matches(hyphenated(name), options, n=1)
        return f"there is no option {name}" + (f": did you mean {options[close[0]]}?" if close else "")

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(USAGE, f"{self.prog}: error: {line[:500]} (see {self.prog} --help)\n")


def find_defaults(args: argparse.Namespace) -> None:
    """Put the values of the defaults that were left to be found."""
    for name, value in vars(args).items():
        if isinstance(value, Default):
            setattr(args, name, value.find())


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that is outside of its option's range."""
    for name, range in args.ranges.items():
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, (int, float)):  # not None, nor the defaults by stage
                range.check(value)


def check_prompt(name: str, prompt: str | None) -> None:
    """Raises ValueError for a prompt that no tokenizer reads."""
    if prompt is None:
        return
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise ValueError(f"`{name}` has {len(prompt):,} characters, but should have at most {MAX_PROMPT_LENGTH:,}.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is {prompt!r}, which is no text in UTF-8.") from error


def refuse_empty(prompt: str) -> None:
    """Raises ValueError for a prompt that says nothing."""
    if not prompt.strip():
        raise ValueError(f"`prompt` is {prompt!r}, but should say what to draw.")
