"""Captions of rows."""

import re
from collections.abc import Iterable
from typing import Any

from datasets import Dataset
from diffusers.utils import logging


logger = logging.get_logger(__name__)

SIDES = re.compile(r"\b(?:left|right|(?:anti|counter)?-?clockwise)", re.IGNORECASE)


class BadCaption(Exception):
    """Cell without a caption."""


def caption_text(value: Any) -> str:
    """Convert a cell to a caption; a list of keywords is joined by commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return ", ".join(value)
    raise BadCaption(f"the caption is {value!r}, but should be text or a list of words")


def speaks_of_sides(caption: str | None) -> bool:
    """Return whether a caption mentions left or right, so that mirroring the image would contradict it."""
    return caption is not None and SIDES.search(caption) is not None


def iterate_captions(rows: Dataset, columns: list[str]) -> Iterable[str]:
    """Return all captions of all rows, in order; cells without a caption are skipped and counted, like their rows.

    Raises:
        ValueError: At the end, if no cell is a caption.
    """
    good, bad, first = 0, 0, ""
    for start, part in enumerate(rows.select_columns(columns).iter(batch_size=1000)):
        for column in columns:
            for i, value in enumerate(part[column]):
                try:
                    caption = caption_text(value)
                except BadCaption as error:
                    first = first or f"`caption_column` {column!r}, row {1000 * start + i}: {error}"
                    bad += 1
                else:
                    good += 1
                    yield caption
    if bad and not good:
        raise ValueError(f"None of the {bad} captions can be used; {first}.")
    if bad:
        logger.warning(f"{bad} of {good + bad} captions cannot be used, and their rows are skipped; {first}.")
