"""Imagen for diffusers: cascaded text-to-image diffusion in pixel space, to sample and to train."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from ._register import register, register_network
from .utils.imports import lazy_names


if TYPE_CHECKING:
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

# torch, transformers and diffusers take seconds to import, and `--help` needs none of them
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".commands": (),
        ".conversion": (),
        ".diffusion": (),
        ".evaluation": (),
        ".loaders": (),
        ".models": ("EfficientUNetModel", "ImagenUNetModel"),
        ".pipelines": (
            "ImagenCascadePipeline",
            "ImagenPipeline",
            "ImagenPipelineOutput",
            "ImagenSuperResolutionPipeline",
        ),
        ".schedulers": ("ContinuousDDPMScheduler", "EDMAdamsScheduler", "EDMHeunScheduler"),
        ".text": (),
        ".training": (),
        ".utils": (),
        ".utils.shipped": ("shipped_cascade",),
        # diffusers' loaders ask the package itself for the base classes that LOADABLE_CLASSES names
        "diffusers": ("ModelMixin", "SchedulerMixin"),
    },
)
register()
