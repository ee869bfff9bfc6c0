"""Text embeddings: the encoder, and the cache on disk; the same for pipelines and training."""

from .encoder import TextEncoder
from .text_embeddings import TextEmbeddings


__all__ = ["TextEmbeddings", "TextEncoder"]
