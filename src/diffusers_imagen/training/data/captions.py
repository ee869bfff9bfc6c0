"""Captions of rows, and where their text states come from.

Shapes: B batch, L text tokens, E width of the text encoder.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from datasets import Dataset
from diffusers.utils import logging
from tqdm.auto import tqdm


logger = logging.get_logger(__name__)

Encode = Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]]

SIDES = re.compile(r"\b(?:left|right|(?:anti|counter)?-?clockwise)", re.IGNORECASE)
MEMORY_LIMIT = 2 * 2**30  # bytes of text states that are kept
ENCODED_AT_ONCE = 256


class BadCaption(Exception):
    """A cell that holds no caption."""


def caption_text(value: Any) -> str:
    """A cell as a caption; a list, of keywords, is joined by commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return ", ".join(value)
    raise BadCaption(f"the caption is {value!r}, but should be text or a list of words")


def speaks_of_sides(caption: str | None) -> bool:
    """Whether a mirrored image would belie its caption."""
    return caption is not None and SIDES.search(caption) is not None


def iterate_captions(rows: Dataset, columns: list[str]) -> Iterable[str]:
    """All captions of all rows, in order; cells that hold none are passed over, as their rows are, and counted.

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


def distinct_captions(captions: Iterable[str], limit: int | None = None) -> list[str] | None:
    """Every caption once, in order of appearance; None if there are more than `limit`."""
    seen = {}
    for caption in captions:
        seen[caption] = None
        if limit is not None and len(seen) > limit:
            return None
    return list(seen)


class EncodedCaptions:
    """Text states of every distinct caption, encoded once and kept in memory in half precision."""

    needs_encoder = False

    def __init__(self, captions: list[str], encode: Encode):
        states, masks = [], []
        for start in tqdm(range(0, len(captions), ENCODED_AT_ONCE), desc="Encoding captions", mininterval=5):
            text, mask = encode(captions[start : start + ENCODED_AT_ONCE])
            states.append(text.half().cpu())
            masks.append(mask.bool().cpu())
        self.text, self.mask = torch.cat(states), torch.cat(masks)  # (captions, L, E), (captions, L)
        self.width = self.text.shape[-1]
        self.index = {caption: i for i, caption in enumerate(captions)}

    def states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, L, E)` in float32 and mask `(B, L)`."""
        rows = torch.tensor([self.index[caption] for caption in captions])
        return self.text[rows].float(), self.mask[rows]


class OnlineCaptions:
    """Text states made for each batch, where they are too many to keep."""

    needs_encoder = True

    def __init__(self, encode: Encode):
        self.encode = encode

    def states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, L, E)` in float32 and mask `(B, L)`."""
        text, mask = self.encode(captions)
        return text.float(), mask.bool()


def encode_captions(rows: Dataset, columns: list[str], encode: Encode):
    """Encodes all captions now if their states fit in memory, or else each batch's when it is drawn."""
    captions = iterate_captions(rows, columns)
    text, _ = encode([next(iter(captions))])
    limit = MEMORY_LIMIT // (2 * text[0].numel())
    captions = distinct_captions(iterate_captions(rows, columns), limit)
    if captions is None:
        logger.info(
            f"More than {limit} captions, too many to keep encoded: they are encoded batch by batch. "
            "`diffusers-imagen cache-embeddings` writes them to disk once."
        )
        return OnlineCaptions(encode)
    return EncodedCaptions(captions, encode)
