"""Captions of rows."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from diffusers.utils import logging

from ...text.distinct_captions import DistinctCaptions
from .shards import DAMAGE
from .tables import innermost


logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 1000
SIDES = re.compile(r"\b(?:left|right|(?:anti|counter)?-?clockwise)", re.IGNORECASE)


class BadCaption(Exception):
    """Cell without a caption."""


class NoCaptions(ValueError):
    """Rows none of which has a caption."""


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


def iterate_places(rows: Dataset, columns: list[str]) -> Iterable[tuple[int, str]]:
    """Return all captions of all rows with their places: `row * len(columns) + column`, both as indices.

    Cells without a caption are skipped and counted, like their rows.

    Raises:
        NoCaptions: At the end, if no cell is a caption.
    """
    good, bad, first = 0, 0, ""
    for start, part in enumerate(rows.select_columns(columns).iter(batch_size=ROWS_AT_ONCE)):
        for number, column in enumerate(columns):
            for row, value in enumerate(part[column], start=ROWS_AT_ONCE * start):
                try:
                    caption = caption_text(value)
                except BadCaption as error:
                    first = first or f"`caption_column` {column!r}, row {row}: {error}"
                    bad += 1
                else:
                    good += 1
                    yield row * len(columns) + number, caption
    if bad and not good:
        raise NoCaptions(f"None of the {bad} captions can be used; {first}.")
    if bad:
        logger.warning(f"{bad} of {good + bad} captions cannot be used, and their rows are skipped; {first}.")


def iterate_captions(rows: Dataset, columns: list[str]) -> Iterable[str]:
    """Return all captions of all rows; errors as in `iterate_places`."""
    return (caption for _, caption in iterate_places(rows, columns))


def iterate_shard(rows: Dataset, columns: list[str], name: str) -> Iterator[str]:
    """Yield all captions of a shard of a stream, of which there may be none.

    Raises:
        ValueError: If the shard cannot be read; names it.
    """
    try:
        yield from iterate_captions(rows, columns)
    except NoCaptions as error:
        logger.warning(f"{name}: {error}")
    except DAMAGE as error:
        raise ValueError(f"{name} cannot be read: {innermost(error)}") from error


def index_captions(splits: Iterable[Dataset], columns: list[str]) -> DistinctCaptions:
    """Index the distinct captions of several splits, whose text stays on disk, where `datasets` maps it to memory."""
    splits = list(splits)
    starts = np.cumsum([0, *(len(columns) * len(rows) for rows in splits)])
    # once: it takes time that grows with the rows
    texts_of = [[rows.select_columns([column]) for column in columns] for rows in splits]

    def read(places: np.ndarray) -> list[str]:
        texts = [""] * len(places)
        for split, start, end in zip(texts_of, starts, starts[1:]):
            for number, (column, data) in enumerate(zip(columns, split)):
                own = np.flatnonzero((start <= places) & (places < end) & ((places - start) % len(columns) == number))
                cells = data[(places[own] - start) // len(columns)][column]
                for i, cell in zip(own, cells):
                    texts[i] = caption_text(cell)
        return texts

    found = zip(splits, starts)
    return DistinctCaptions.index(
        ((start + place, text) for rows, start in found for place, text in iterate_places(rows, columns)), read
    )
