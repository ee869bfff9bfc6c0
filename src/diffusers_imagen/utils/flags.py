"""Command line options in two spellings, with hyphens or underscores between words."""

import argparse
import sys
from collections.abc import Iterable, Sequence


def hyphenated(option: str) -> str:
    """Return an option with hyphens between its words, which is the same for both spellings."""
    return option.replace("_", "-")


def first_spellings(options: Sequence[str]) -> list[str]:
    """Return options without those that are another spelling of one before them, in their order."""
    first: dict[str, str] = {}
    for option in options:
        first.setdefault(hyphenated(option), option)
    return list(first.values())


def respell(arguments: Sequence[str], options: Iterable[str]) -> list[str]:
    """Spell options among arguments like a parser; other arguments, and those after `--`, are not changed."""
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
    """Parser that accepts every long option in both spellings, and shows the one that was added."""

    def add_argument(self, *names, **kwargs) -> argparse.Action:
        """Add an argument like argparse, without names that are another spelling of an earlier name."""
        return super().add_argument(*first_spellings(names), **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        own = [option for action in self._actions for option in action.option_strings]
        return super().parse_known_args(respell(sys.argv[1:] if args is None else args, own), namespace)
