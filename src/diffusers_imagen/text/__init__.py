"""Text embeddings: the encoder, and the cache on disk; the same for pipelines and training."""
