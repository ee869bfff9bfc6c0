"""Diffusion formulas as pure functions, each with a reference to its source."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names


if TYPE_CHECKING:
    from .augmentation import augment_low_res
    from .guidance import classifier_free_guidance, rescale_guidance
    from .thresholding import dynamic_threshold, static_threshold

__all__ = ["augment_low_res", "classifier_free_guidance", "dynamic_threshold", "rescale_guidance", "static_threshold"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".augmentation": ("augment_low_res",),
        ".guidance": ("classifier_free_guidance", "rescale_guidance"),
        ".thresholding": ("dynamic_threshold", "static_threshold"),
    },
)
