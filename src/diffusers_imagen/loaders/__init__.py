from .lora import ImagenLoraLoaderMixin
from .lora_adapters import with_lora_scale


__all__ = ["ImagenLoraLoaderMixin", "with_lora_scale"]
