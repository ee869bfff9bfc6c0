"""Residual diffusion for super-resolution stages, as in SRDiff (Li et al. 2021, arXiv 2104.14951).

An image and its upsampled low-resolution image differ mostly at edges. Their difference is diffused, divided by a
scale that gives it about the standard deviation `sigma_data` that schedules and noise levels assume. The network's
errors are reduced by that scale, and flat areas are correct where it predicts zero.
"""

from typing import NamedTuple

import torch


class SampleSpace(NamedTuple):
    """Space in which a stage diffuses: images, or residuals relative to an upsampled image.

    Attributes:
        upsampled (`torch.Tensor`, *optional*): `(B, C, H, W)`, the low-resolution image without added noise, upsampled
            to the size of the image. None means the space of images.
        scale (`float`): Divisor of the residuals, above 0.
    """

    upsampled: torch.Tensor | None = None
    scale: float = 1.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images `(B, C, H, W)`, noisy or clean, to the space in which the stage diffuses, in the same shape."""
        return images if self.upsampled is None else (images - self.upsampled) / self.scale

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Convert a sample back to images `(B, C, H, W)`; inverse of `encode`."""
        return sample if self.upsampled is None else self.upsampled + self.scale * sample
