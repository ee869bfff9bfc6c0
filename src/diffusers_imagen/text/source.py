"""TextSource: the interface of sources of text embeddings (encoders, caches), for pipelines and training."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from .reference import EncoderParts
from .text_embeddings import PackedText, TextEmbeddings, without_text


logger = logging.get_logger(__name__)

MEMORY_LIMIT = 2 * 2**30  # bytes of embeddings kept in memory
ENCODED_AT_ONCE = 256
MAX_CAPTION = 2**20  # bytes of a caption in a file; larger files are not captions


class TextSource(ABC):
    """Base class of sources of text embeddings. A subclass for another encoder has `encode`, `width` and `max_length`.

    Attributes:
        width (`int`): E, the width of the embeddings.
        max_length (`int`): L, their number of tokens.
        keeps_padding (`bool`): Whether embeddings at padded positions are kept, for networks that attend to them,
            instead of being set to zero.
        cleans_captions (`bool`): Whether texts are cleaned as in DeepFloyd IF before encoding. Callers pass the
            original texts, which are also the keys of a cache.
        needs_encoder (`bool`): Whether `encode` runs an encoder at each call; it is then called in the main process,
            not in the workers that load images.
    """

    width: int
    max_length: int
    keeps_padding = False
    cleans_captions = False
    needs_encoder = True

    @abstractmethod
    def encode(self, texts: list[str]) -> TextEmbeddings:
        """Encode texts to embeddings of the same length L."""

    def encode_prompts(self, texts: list[str], slice_size: int | None = None) -> TextEmbeddings:
        """Encode texts like `encode`, `slice_size` texts at a time."""
        return in_slices(self.encode, texts, slice_size)

    def pack(self, texts: list[str]) -> PackedText:
        """Encode texts as `encode`, without padding where it is zero."""
        embeds, mask = self.encode(texts)
        mask = mask.bool()
        return PackedText.of(embeds.flatten(0, 1) if self.keeps_padding else embeds[mask], mask, self.keeps_padding)

    def at(self, split: str, shard: int, num_shards: int) -> "TextSource":
        """Return the source for the captions in one shard of a stream's data; by default the source itself.

        Args:
            split (`str`): The split of the data.
            shard (`int`), num_shards (`int`): Index of the shard, and number of shards of the split.
        """
        return self

    def no_text(self, text: TextEmbeddings) -> TextEmbeddings:
        """
        Return the unconditional embeddings for `text`: zeros, or those of the empty text if padding is attended to.
        """
        if not self.keeps_padding:
            return without_text(text)
        return self.encode([""]).repeated(len(text.embeds))

    def __contains__(self, text: str) -> bool:
        """Return whether `encode` supports this text."""
        return True

    def identity(self) -> dict[str, Any] | None:
        """Return the identity of the encoder in JSON's types; None if unknown."""
        return None

    def parts(self) -> EncoderParts | None:
        """Return the tokenizer and the reference to the encoder, for a stage that is trained with it; None if the
        reference is unknown."""
        return None

    def release(self) -> None:
        """Free the memory of the encoder; it is loaded again on the next use."""

    def for_captions(self, captions: Iterable[str] | None) -> "TextSource":
        """
        Return a text source for batches of these captions; None for a stream, whose captions are not known in advance.

        All captions are encoded now if their embeddings fit in memory, else each batch when it is loaded.
        """
        if captions is None:
            return self
        captions = iter(captions)
        first = next(captions, None)
        if first is None:
            raise ValueError("There are no captions to encode.")
        limit = MEMORY_LIMIT // (2 * self.encode([first]).embeds[0].numel())
        distinct = distinct_captions(chain([first], captions), limit)
        if distinct is not None:
            return EncodedCaptions(distinct, self)
        logger.info(
            f"More than {limit} captions, too many to keep in memory: they are encoded batch by batch. "
            "`diffusers-imagen cache-embeddings` encodes them once and writes them to disk."
        )
        return self


class ConcatenatedText(TextSource):
    """Concatenation of several encoders: `(B, L, E_1 + E_2 + ...)`, with the mask of the first.

    Each receives the original texts, and cleans them or not.

    Args:
        sources (`TextSource`): The encoders, with the same number of tokens and the same `keeps_padding`.

    Raises:
        ValueError: If these differ.
    """

    def __init__(self, *sources: TextSource):
        lengths = [source.max_length for source in sources]
        if len(set(lengths)) != 1:
            raise ValueError(f"`sources` have {lengths} tokens, but should all have the same number.")
        keeps = [source.keeps_padding for source in sources]
        if len(set(keeps)) != 1:
            raise ValueError(f"`sources` have `keeps_padding` {keeps}, but should all have the same.")
        self.sources, self.max_length, self.keeps_padding = sources, lengths[0], keeps[0]
        self.cleans_captions = any(source.cleans_captions for source in sources)
        self.width = sum(source.width for source in sources)
        self.needs_encoder = any(source.needs_encoder for source in sources)

    def encode(self, texts: list[str]) -> TextEmbeddings:
        parts = [source.encode(texts) for source in self.sources]
        return TextEmbeddings(torch.cat([part.embeds for part in parts], dim=-1), parts[0].mask)

    def at(self, split: str, shard: int, num_shards: int) -> TextSource:
        return ConcatenatedText(*(source.at(split, shard, num_shards) for source in self.sources))

    def __contains__(self, text: str) -> bool:
        return all(text in source for source in self.sources)

    def identity(self) -> dict[str, Any] | None:
        return {str(i): source.identity() for i, source in enumerate(self.sources)}

    def release(self) -> None:
        for source in self.sources:
            source.release()


class EncodedCaptions(TextSource):
    """Embeddings of distinct captions, encoded once and kept in memory: in float16, if they are within its range.

    If padding is kept, the empty text is included, for unconditional embeddings.
    """

    needs_encoder = False

    @torch.no_grad()
    def __init__(self, captions: list[str], source: TextSource):
        self.keeps_padding, self.cleans_captions = source.keeps_padding, source.cleans_captions
        if self.keeps_padding and "" not in captions:
            captions = [*captions, ""]
        starts = tqdm(range(0, len(captions), ENCODED_AT_ONCE), desc="Encoding captions", mininterval=5)
        parts = (source.encode(captions[start : start + ENCODED_AT_ONCE]) for start in starts)
        embeds, masks = zip(*((in_half(part.embeds.cpu()), part.mask.bool().cpu()) for part in parts))
        self.text = TextEmbeddings(torch.cat(embeds), torch.cat(masks))  # (captions, L, E), (captions, L)
        self.max_length, self.width = self.text.embeds.shape[1:]
        self.index = {caption: i for i, caption in enumerate(captions)}

    def __contains__(self, text: str) -> bool:
        return text in self.index

    def encode(self, texts: list[str]) -> TextEmbeddings:
        rows = torch.tensor([self.index[text] for text in texts])
        return TextEmbeddings(self.text.embeds[rows].float(), self.text.mask[rows])


def in_slices(
    encode: Callable[[list[str]], TextEmbeddings], texts: list[str], slice_size: int | None
) -> TextEmbeddings:
    """Encode texts, `slice_size` of them at a time."""
    size = slice_size or len(texts)
    parts = [encode(texts[i : i + size]) for i in range(0, len(texts), size)]
    return TextEmbeddings(*(torch.cat(tensors) for tensors in zip(*parts)))


def in_half(embeds: torch.Tensor) -> torch.Tensor:
    """Convert embeddings to float16, or to float32 if some are outside its range."""
    half = embeds.half()
    return half if half.isfinite().all() else embeds.float()


def distinct_captions(captions: Iterable[str], limit: int | None = None) -> list[str] | None:
    """Return the distinct captions in order of appearance; None if there are more than `limit`."""
    seen: dict[str, None] = {}
    for caption in captions:
        seen[caption] = None
        if limit is not None and len(seen) > limit:
            return None
    return list(seen)
