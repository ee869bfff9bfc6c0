"""Schedulers (samplers), as diffusers schedulers."""

from .scheduling_continuous_ddpm import ContinuousDDPMScheduler
from .scheduling_edm_adams import EDMAdamsScheduler
from .scheduling_edm_heun import EDMHeunScheduler
from .scheduling_utils import ImagenSchedulerOutput


__all__ = ["ContinuousDDPMScheduler", "EDMAdamsScheduler", "EDMHeunScheduler", "ImagenSchedulerOutput"]
