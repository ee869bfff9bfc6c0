"""Imagen for diffusers: training and sampling of cascaded text-to-image diffusion models in pixel space."""

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
        # diffusers' loaders look up the base classes of LOADABLE_CLASSES in the package itself
        "diffusers": ("ModelMixin", "SchedulerMixin"),
        "transformers": ("PreTrainedModel",),
        # and the classes that stand for components that are saved elsewhere
        ".pipelines.adapted_network": ("AdaptedNetwork",),
        ".text.reference": ("ReferencedTextEncoder",),
    },
)
register()
