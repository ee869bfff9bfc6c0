"""The text of a training run, as its settings name it: an encoder, a cache, or both."""

from collections.abc import Iterable
from typing import Any

from .cache import EmbeddingCache
from .encoder import TextEncoder
from .source import TextSource
from .text_embeddings import TextEmbeddings


class CachedTextEncoder(TextSource):
    """An encoder, and a cache with what it made of the data's captions; prompts need not be in the cache."""

    def __init__(self, encoder: TextEncoder, cache: EmbeddingCache):
        self.encoder, self.cache = encoder, cache
        self.width = cache.width

    def encode(self, texts: list[str]) -> TextEmbeddings:
        return self.encoder.encode(texts)

    def identity(self) -> dict[str, Any]:
        return self.cache.identity()

    def release(self) -> None:
        self.encoder.release()

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        self.cache.check_encoder(self.encoder.identity())
        return self.cache.for_captions(captions)


def open_text(
    text_encoder: str | None, embedding_cache: str | None = None, max_length: int | None = None
) -> TextSource | None:
    """What makes the embeddings of a run; None if neither encoder nor cache is given.

    Args:
        text_encoder (`str`, *optional*): Folder or Hub id of the encoder.
        embedding_cache (`str`, *optional*): Folder that `cache-embeddings` wrote.
        max_length (`int`, *optional*): Tokens of a caption; the tokenizer's own limit without.

    Raises:
        ValueError: If one of them cannot be opened.
    """
    encoder = TextEncoder.from_pretrained(text_encoder, max_length) if text_encoder else None
    if embedding_cache is None:
        return encoder
    cache = EmbeddingCache(embedding_cache)
    return cache if encoder is None else CachedTextEncoder(encoder, cache)
