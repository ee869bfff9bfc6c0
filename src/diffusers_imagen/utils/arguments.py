"""Checks of single numbers that a caller gives, and how a wrong value is shown in a message."""

import math
import numbers
from collections.abc import Collection
from types import NoneType
from typing import Any


SHOWN_CHARACTERS = 120


def shown(value: Any) -> str:
    """Return a value for a message: short, however large the value is, and for any object."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    if isinstance(value, (str, bytes)):
        value = value[: SHOWN_CHARACTERS + 1]
    try:
        text = repr(value)
    except Exception:  # Python prints no integer of more than 4300 digits, and a class may do anything
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def bad_argument(name: str, value: Any, expected: str) -> ValueError:
    """Return the error of a wrong argument, in the one form that this package has."""
    return ValueError(f"`{name}` is {shown(value)}, but should be {expected}.")


def check_choice(name: str, value: Any, choices: Collection[str | None], when: str = "") -> None:
    """Raise ValueError, which names the choices that there are `when` something is given, for any other value."""
    if not isinstance(value, (str, NoneType)) or value not in choices:
        raise bad_argument(name, value, f"one of {', '.join(map(repr, choices))}{when}")


def check_exactly_one(**values: Any) -> None:
    """Raise ValueError unless one of the arguments is given, and the others are None."""
    if sum(value is not None for value in values.values()) != 1:
        names, given = (", ".join(texts) for texts in ([f"`{name}`" for name in values], map(shown, values.values())))
        raise ValueError(f"Exactly one of {names} should be given, but they are {given}.")


def is_integer(value: Any) -> bool:
    """Return whether a value is a whole number of Python's or NumPy's kinds, and no boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python's or NumPy's kinds, and no boolean; NaN and infinity are."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a number of `is_number`, and a finite one in floating point."""
    return is_number(value) and math.isfinite(to_float(value))


def as_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """Return a whole number as an `int`.

    Raises:
        ValueError: If it is none, or not between the bounds; names the argument.
    """
    if not is_integer(value) or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise bad_argument(name, value, f"an integer of at least {minimum}{upper}")
    return int(value)


def as_number(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Return a finite number as a `float`.

    Raises:
        ValueError: If it is none, or not between the bounds; names the argument.
    """
    if not is_finite(value) or not minimum <= value <= maximum:
        bounds = [f"of at least {minimum:g}"] * (minimum > -math.inf) + [f"at most {maximum:g}"] * (maximum < math.inf)
        raise bad_argument(name, value, f"a finite number{' ' * bool(bounds)}{' and '.join(bounds)}")
    return float(value)


def to_float(value: Any) -> float:
    """Return a number as a `float`; infinite where an integer is beyond floating point."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
