"""Diffusion of a super-resolution stage in the space of residuals, as in SRDiff (Li et al. 2021, arXiv 2104.14951).

An image and its enlarged low-resolution image are alike but at edges. What is diffused is their difference, divided by
a scale that gives it about the standard deviation `sigma_data` that schedules and noise levels are made for: an error of
the network is smaller by that scale, and flat areas are right where it predicts nothing.
"""

from typing import NamedTuple

import torch


class SampleSpace(NamedTuple):
    """The space that a stage diffuses in: that of images, or of residuals to an enlarged image.

    Attributes:
        upsampled (`torch.Tensor`, *optional*): `(B, C, H, W)`, the low-resolution image without added noise, enlarged
            to the size of the image. None is the space of images.
        scale (`float`): What residuals are divided by, above 0.
    """

    upsampled: torch.Tensor | None = None
    scale: float = 1.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)`, with noise or without, to what is diffused, in the same shape."""
        return images if self.upsampled is None else (images - self.upsampled) / self.scale

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """What is diffused to images `(B, C, H, W)`."""
        return sample if self.upsampled is None else self.upsampled + self.scale * sample
