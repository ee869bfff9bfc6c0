"""Checkpoints and configurations of other implementations, read as data."""

from .nemo import load_nemo_unet


__all__ = ["load_nemo_unet"]
