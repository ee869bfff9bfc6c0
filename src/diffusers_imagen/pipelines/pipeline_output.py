"""Output of the pipelines."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


Images = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class ImagenPipelineOutput(BaseOutput):
    """
    Output of the Imagen pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images of the last stage that ran; arrays are `(batch, height, width, channels)` and tensors
            `(batch, channels, height, width)`, in [0, 1], or in [-1, 1] for `output_type="latent"`.
        stage_images (`dict[int, ...]`):
            The images of every stage that ran, in the same format, by the stage's resolution.
        nsfw_detected, watermark_detected (`list[bool]`, *optional*):
            For each image, whether the safety checker flagged it as NSFW, or as one with a foreign watermark, at any
            stage that ran. Such an image is black at every stage. None if images were not checked: without a safety
            checker, and for tensors (`output_type` "pt" and "latent").
    """

    images: Images
    stage_images: dict[int, Images]
    nsfw_detected: list[bool] | None = None
    watermark_detected: list[bool] | None = None
