"""The real image that is nearest to a drawn one, in centred features: whether images of the training set come back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


COPY = 0.98  # cosine from which two images count as the same
CHUNK = 1024


class Nearest(NamedTuple):
    """For each image, the nearest of the reference."""

    places: torch.Tensor  # (N,), among the reference
    cosines: torch.Tensor  # (N,)


def find_nearest(features: torch.Tensor, reference: torch.Tensor) -> Nearest:
    """Return the nearest by cosine, after the mean of the reference is taken away.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Of images.
        reference (`torch.Tensor` of shape `(M, D)`): Of those among which the nearest is sought.
    """
    mean = reference.mean(0)
    real = F.normalize(reference - mean, dim=1)
    found = [(F.normalize(part - mean, dim=1) @ real.T).max(1) for part in features.split(CHUNK)]
    return Nearest(torch.cat([part.indices for part in found]), torch.cat([part.values for part in found]))
