"""Nearest real images of generated images by centered features, to detect copies of the training set."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .figures import Figure, figure_of_mean


COPY = 0.98  # cosine above which two images count as copies
CHUNK = 1024


class Nearest(NamedTuple):
    """Nearest reference image of each image."""

    places: torch.Tensor  # (N,), indices into the reference
    cosines: torch.Tensor  # (N,)

    def figures(self) -> dict[str, Figure]:
        """Return the summary metrics, by label."""
        copies = (self.cosines > COPY).double()
        return {
            "nearest, median cosine": Figure(self.cosines.median().item()),
            f"share above {COPY}": figure_of_mean(copies),
        }


def find_nearest(features: torch.Tensor, reference: torch.Tensor) -> Nearest:
    """Find the nearest reference images by cosine, after subtracting the mean of the reference.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Features of images.
        reference (`torch.Tensor` of shape `(M, D)`): Features of the reference.
    """
    mean = reference.mean(0)
    real = F.normalize(reference - mean, dim=1)
    found = [(F.normalize(part - mean, dim=1) @ real.T).max(1) for part in features.split(CHUNK)]
    return Nearest(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))
