"""Opening of the text source that a run's settings name: an encoder, a cache, or an encoder with a cache."""

from collections.abc import Iterable
from typing import Any

from .cache import EmbeddingCache
from .encoder import TextEncoder
from .reference import EncoderParts
from .sharded_cache import ShardedCache, open_cache
from .source import TextSource
from .text_embeddings import TextEmbeddings


class CachedTextEncoder(TextSource):
    """Text encoder with a cache of the data's captions; prompts need not be in the cache."""

    def __init__(self, encoder: TextEncoder, cache: EmbeddingCache | ShardedCache):
        self.encoder, self.cache = encoder, cache
        self.width, self.max_length = cache.width, cache.max_length
        self.keeps_padding, self.cleans_captions = encoder.keeps_padding, encoder.cleans_captions

    def encode(self, texts: list[str]) -> TextEmbeddings:
        return self.encoder.encode(texts)

    def identity(self) -> dict[str, Any]:
        return self.cache.identity()

    def parts(self) -> EncoderParts | None:
        return self.encoder.parts()

    def release(self) -> None:
        self.encoder.release()

    def for_captions(self, captions: Iterable[str] | None) -> TextSource:
        self.cache.check_encoder(self.encoder.identity())
        return self.cache.for_captions(captions)


def open_text(
    text_encoder: str | None,
    embedding_cache: str | None,
    max_length: int | None,
    keeps_padding: bool = False,
    cleans_captions: bool = False,
    **options: Any,
) -> TextSource | None:
    """Open the text source of a run from its settings; None if neither encoder nor cache is given.

    Args:
        text_encoder (`str`, *optional*): Folder or Hub id.
        embedding_cache (`str`, *optional*): Folder of a cache.
        max_length (`int`, *optional*): Maximum tokens per text; by default the tokenizer's limit.
        keeps_padding (`bool`), cleans_captions (`bool`): Settings that the network is trained with.
        options: Options of `TextEncoder.from_pretrained`, such as `revision` and `variant`.

    Raises:
        ValueError: If they cannot be opened, or the cache has embeddings of another kind.
    """
    encoder = None
    if text_encoder:
        encoder = TextEncoder.from_pretrained(
            text_encoder, max_length, keeps_padding=keeps_padding, cleans_captions=cleans_captions, **options
        )
    if embedding_cache is None:
        return encoder
    cache = open_cache(embedding_cache)
    cache.check_kind(keeps_padding, cleans_captions)
    return cache if encoder is None else CachedTextEncoder(encoder, cache)
