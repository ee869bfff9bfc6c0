from .lora import ImagenLoraLoaderMixin


__all__ = ["ImagenLoraLoaderMixin"]
