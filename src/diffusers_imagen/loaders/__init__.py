"""LoRA adapters of the stages: read, checked, loaded, weighed and saved."""

from .lora import ImagenLoraLoaderMixin


__all__ = ["ImagenLoraLoaderMixin"]
