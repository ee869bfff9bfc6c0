"""LoRA adapters of the stages: reading, checking, loading, weighting and saving."""

from .lora import ImagenLoraLoaderMixin


__all__ = ["ImagenLoraLoaderMixin"]
