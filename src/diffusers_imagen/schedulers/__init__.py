"""Schedulers (samplers), as diffusers schedulers."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names


if TYPE_CHECKING:
    from .scheduling_continuous_ddpm import ContinuousDDPMScheduler
    from .scheduling_edm_adams import EDMAdamsScheduler
    from .scheduling_edm_heun import EDMHeunScheduler
    from .scheduling_utils import ImagenSchedulerOutput

__all__ = ["ContinuousDDPMScheduler", "EDMAdamsScheduler", "EDMHeunScheduler", "ImagenSchedulerOutput"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".scheduling_continuous_ddpm": ("ContinuousDDPMScheduler",),
        ".scheduling_edm_adams": ("EDMAdamsScheduler",),
        ".scheduling_edm_heun": ("EDMHeunScheduler",),
        ".scheduling_utils": ("ImagenSchedulerOutput",),
    },
)
