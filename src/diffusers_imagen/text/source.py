"""What training asks of text, whether an encoder, a cache or both answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from .text_embeddings import TextEmbeddings


logger = logging.get_logger(__name__)

MEMORY_LIMIT = 2 * 2**30  # bytes of embeddings that are kept
ENCODED_AT_ONCE = 256
MAX_CAPTION = 2**20  # bytes of a caption in a file: what is above is something else


class TextSource(ABC):
    """Where the embeddings of texts come from. Another encoder is another subclass, with `encode` and `width`.

    Attributes:
        width (`int`): E, the width of the embeddings.
        needs_encoder (`bool`): Whether an encoder works at each call of `encode`; it is then called where the batches
            are used, and not by the processes that read images ahead.
    """

    width: int
    needs_encoder = True

    @abstractmethod
    def encode(self, texts: list[str]) -> TextEmbeddings:
        """Embeddings of texts, all of the same length L."""

    def __contains__(self, text: str) -> bool:
        """Whether `encode` takes this text."""
        return True

    def identity(self) -> dict[str, Any] | None:
        """What tells the encoder from others, in JSON's types; None if that is not known."""
        return None

    def release(self) -> None:
        """Frees the memory of the encoder; it comes back when it is needed."""

    def for_captions(self, captions: Iterable[str] | None) -> "TextSource":
        """What batches of these captions are encoded with; None are those of a stream, which are not known before.

        All are encoded now if their embeddings fit in memory, or else each batch's when it is drawn.
        """
        if captions is None:
            return self
        captions = iter(captions)
        first = next(captions)
        limit = MEMORY_LIMIT // (2 * self.encode([first]).embeds[0].numel())
        distinct = distinct_captions(chain([first], captions), limit)
        if distinct is not None:
            return EncodedCaptions(distinct, self)
        logger.info(
            f"More than {limit} captions, too many to keep encoded: they are encoded batch by batch. "
            "`diffusers-imagen cache-embeddings` writes them to disk once."
        )
        return self


class EncodedCaptions(TextSource):
    """Embeddings of distinct captions, encoded once and kept in memory in half precision."""

    needs_encoder = False

    @torch.no_grad()
    def __init__(self, captions: list[str], source: TextSource):
        starts = tqdm(range(0, len(captions), ENCODED_AT_ONCE), desc="Encoding captions", mininterval=5)
        parts = (source.encode(captions[start : start + ENCODED_AT_ONCE]) for start in starts)
        embeds, masks = zip(*((part.embeds.half().cpu(), part.mask.bool().cpu()) for part in parts))
        self.text = TextEmbeddings(torch.cat(embeds), torch.cat(masks))  # (captions, L, E), (captions, L)
        self.width = self.text.embeds.shape[-1]
        self.index = {caption: i for i, caption in enumerate(captions)}

    def __contains__(self, text: str) -> bool:
        return text in self.index

    def encode(self, texts: list[str]) -> TextEmbeddings:
        rows = torch.tensor([self.index[text] for text in texts])
        return TextEmbeddings(self.text.embeds[rows].float(), self.text.mask[rows])


def distinct_captions(captions: Iterable[str], limit: int | None = None) -> list[str] | None:
    """Every caption once, in order of appearance; None if there are more than `limit`."""
    seen: dict[str, None] = {}
    for caption in captions:
        seen[caption] = None
        if limit is not None and len(seen) > limit:
            return None
    return list(seen)
