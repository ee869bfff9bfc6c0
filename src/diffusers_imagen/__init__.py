"""Imagen for diffusers: cascaded text-to-image diffusion in pixel space, to sample and to train."""

from importlib.metadata import version

from .models import EfficientUNetModel, ImagenUNetModel
from .pipelines import ImagenCascadePipeline, ImagenPipelineOutput
from .schedulers import ContinuousDDPMScheduler, EDMHeunScheduler


__version__ = version("diffusers-imagen")
__all__ = [
    "ContinuousDDPMScheduler",
    "EDMHeunScheduler",
    "EfficientUNetModel",
    "ImagenCascadePipeline",
    "ImagenPipelineOutput",
    "ImagenUNetModel",
]

from . import _register
