"""Text embeddings: encoders, and the cache on disk, for pipelines and training."""

from .encoder import TextEncoder
from .text_embeddings import TextEmbeddings


__all__ = ["TextEmbeddings", "TextEncoder"]
