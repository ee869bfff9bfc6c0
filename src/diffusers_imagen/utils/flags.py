"""Options of a command line in two spellings: words may be joined by hyphens or by underscores."""

import argparse
import sys
from collections.abc import Iterable, Sequence


def hyphenated(option: str) -> str:
    """Return an option with hyphens between its words: what two spellings of one option have in common."""
    return option.replace("_", "-")


def first_spellings(options: Sequence[str]) -> list[str]:
    """Return options without those that are another spelling of one before them, in their order."""
    first: dict[str, str] = {}
    for option in options:
        first.setdefault(hyphenated(option), option)
    return list(first.values())


def respell(arguments: Sequence[str], options: Iterable[str]) -> list[str]:
    """Spell the options among some arguments as a parser has them; everything else, and what follows `--`, stays."""
    known = [option for option in options if option.startswith("--")]
    by_spelling = {**{hyphenated(option): option for option in known}, **{option: option for option in known}}
    spelled = list(arguments)
    end = spelled.index("--") if "--" in spelled else len(spelled)
    for position, argument in enumerate(spelled[:end]):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            own = by_spelling.get(name) or by_spelling.get(hyphenated(name), name)
            spelled[position] = own + equals + value
    return spelled


class BothSpellings(argparse.ArgumentParser):
    """A parser that takes every long option in both spellings, and shows it in the one that it was added in."""

    def add_argument(self, *names, **kwargs) -> argparse.Action:
        """As argparse, without names that are another spelling of a name before them."""
        return super().add_argument(*first_spellings(names), **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        own = [option for action in self._actions for option in action.option_strings]
        return super().parse_known_args(respell(sys.argv[1:] if args is None else args, own), namespace)
