"""LoRA adapters of the stages: read, checked, loaded, weighed and saved."""

from .lora import ImagenLoraLoaderMixin
from .lora_adapters import with_lora_scale


__all__ = ["ImagenLoraLoaderMixin", "with_lora_scale"]
