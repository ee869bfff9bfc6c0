"""Imagen for diffusers: cascaded text-to-image diffusion in pixel space, to sample and to train."""

from importlib.metadata import version

from .models import EfficientUNetModel, ImagenUNetModel
from .pipelines import (
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenPipelineOutput,
    ImagenSuperResolutionPipeline,
)
from .schedulers import ContinuousDDPMScheduler, EDMHeunScheduler


__version__ = version("diffusers-imagen")
__all__ = [
    "ContinuousDDPMScheduler",
    "EDMHeunScheduler",
    "EfficientUNetModel",
    "ImagenCascadePipeline",
    "ImagenPipeline",
    "ImagenPipelineOutput",
    "ImagenSuperResolutionPipeline",
    "ImagenUNetModel",
]

from . import _register
