"""Conversion of checkpoints and configurations of other implementations, without executing code from files."""

from typing import TYPE_CHECKING

from ..utils.imports import lazy_names


if TYPE_CHECKING:
    from .deepfloyd import unet_from_deepfloyd, unet_to_deepfloyd
    from .deepfloyd_pipelines import pipeline_to_deepfloyd
    from .nemo import load_nemo_unet
    from .nemo_stage import load_nemo_stage

__all__ = [
    "load_nemo_stage",
    "load_nemo_unet",
    "pipeline_to_deepfloyd",
    "unet_from_deepfloyd",
    "unet_to_deepfloyd",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        ".deepfloyd": ("unet_from_deepfloyd", "unet_to_deepfloyd"),
        ".deepfloyd_pipelines": ("pipeline_to_deepfloyd",),
        ".nemo": ("load_nemo_unet",),
        ".nemo_stage": ("load_nemo_stage",),
    },
)
