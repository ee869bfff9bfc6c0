"""Imagen for diffusers: cascaded text-to-image diffusion in pixel space, to sample and to train."""

from importlib.metadata import version

from .models import EfficientUNetModel, ImagenUNetModel
from .pipelines import ImagenCascadePipeline, ImagenPipeline, ImagenPipelineOutput, ImagenSuperResolutionPipeline
from .schedulers import ContinuousDDPMScheduler, EDMAdamsScheduler, EDMHeunScheduler
from .utils.shipped import shipped_cascade


__version__ = version("diffusers-imagen")
__all__ = [
    "ContinuousDDPMScheduler",
    "EDMAdamsScheduler",
    "EDMHeunScheduler",
    "EfficientUNetModel",
    "ImagenCascadePipeline",
    "ImagenPipeline",
    "ImagenPipelineOutput",
    "ImagenSuperResolutionPipeline",
    "ImagenUNetModel",
    "register_network",
    "shipped_cascade",
]

from ._register import register_network
