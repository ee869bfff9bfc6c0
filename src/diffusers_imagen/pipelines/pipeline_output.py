"""What the pipelines return."""

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
            `(batch, channels, height, width)` in [0, 1], those of `output_type="latent"` in [-1, 1].
        stage_images (`dict[int, ...]`):
            The images of every stage that ran, in the same form, by the stage's resolution.
    """

    images: Images
    stage_images: dict[int, Images]
