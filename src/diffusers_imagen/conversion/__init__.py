"""Conversion of checkpoints and configurations of other implementations, without executing code from files."""

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
