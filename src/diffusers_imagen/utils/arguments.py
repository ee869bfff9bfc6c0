"""Argument checks, and the wording of error messages for invalid values."""

import math
import numbers
from collections.abc import Collection
from types import NoneType
from typing import Any


SHOWN_CHARACTERS = 120


def shown(value: Any) -> str:
    """Format any value for a message, shortened."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        kind = "an array" if type(value).__name__ == "ndarray" else f"a {type(value).__name__}"
        return f"{kind} of shape {tuple(shape)}"
    if isinstance(value, (str, bytes)):
        value = value[: SHOWN_CHARACTERS + 1]
    try:
        text = repr(value)
    except Exception:  # Python does not print integers of more than 4300 digits, and `__repr__` of a class may raise
        return class_of(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def class_of(value: Any) -> str:
    """Format the class of a value for a message, as in "`unet` is of class UNet2DModel": right for names of any sound."""
    return f"of class {type(value).__name__}"


def bad_argument(name: str, value: Any, expected: str) -> ValueError:
    """Return the error for an invalid argument, in the uniform wording of this package."""
    return ValueError(f"`{name}` is {shown(value)}, but should be {expected}.")


def check_choice(name: str, value: Any, choices: Collection[str | None], when: str = "") -> None:
    """Raise a ValueError that lists the choices unless the value is one of them; `when` is appended to the message."""
    if not isinstance(value, (str, NoneType)) or value not in choices:
        raise bad_argument(name, value, f"one of {', '.join(map(repr, choices))}{when}")


def check_exactly_one(**values: Any) -> None:
    """Raise ValueError unless exactly one of the arguments is not None."""
    if sum(value is not None for value in values.values()) != 1:
        names, given = (", ".join(texts) for texts in ([f"`{name}`" for name in values], map(shown, values.values())))
        raise ValueError(f"Exactly one of {names} should be given, but they are {given}.")


def is_integer(value: Any) -> bool:
    """Return whether a value is a Python or NumPy integer, not a boolean."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a Python or NumPy real number, not a boolean; includes NaN and infinity."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a real number, as in `is_number`, and finite in floating point."""
    return is_number(value) and math.isfinite(to_float(value))


def as_integer(name: str, value: Any, minimum: int = 1, maximum: int | None = None) -> int:
    """Convert an integer to `int`.

    Raises:
        ValueError: If it is not an integer or out of bounds; names the argument.
    """
    if not is_integer(value) or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise bad_argument(name, value, f"an integer of at least {minimum}{upper}")
    return int(value)


def as_number(name: str, value: Any, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """Convert a finite number to `float`.

    Raises:
        ValueError: If it is not a finite number or out of bounds; names the argument.
    """
    if not is_finite(value) or not minimum <= value <= maximum:
        bounds = [f"of at least {minimum:g}"] * (minimum > -math.inf) + [f"at most {maximum:g}"] * (maximum < math.inf)
        raise bad_argument(name, value, f"a finite number{' ' * bool(bounds)}{' and '.join(bounds)}")
    return float(value)


def to_float(value: Any) -> float:
    """Convert a number to `float`; infinite for an integer that overflows."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
