"""U-Nets, as diffusers models."""

from .unet_efficient import EfficientUNetModel
from .unet_imagen import ImagenUNetModel


__all__ = ["EfficientUNetModel", "ImagenUNetModel"]
