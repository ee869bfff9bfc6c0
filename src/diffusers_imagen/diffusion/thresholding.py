"""Thresholding of the predicted clean image: Saharia et al. 2022 (Imagen, arXiv 2205.11487), section 2.3.

Images are `(B, ...)` with values nominally in [-1, 1], in any floating dtype, which the results keep.
"""

import math

import torch


def static_threshold(x_0: torch.Tensor, limit: float = 1.0) -> torch.Tensor:
    """Clamp `x_0` to `[-limit, limit]`."""
    return x_0.clamp(-limit, limit)


def dynamic_threshold(x_0: torch.Tensor, ratio: float = 0.995, max_value: float | None = None) -> torch.Tensor:
    """Clamp `x_0` to `[-s, s]` and divide it by s, the `ratio` quantile of |x_0| per image, at least 1.

    `max_value` is an upper bound of s; 1 gives static thresholding.

    Raises:
        ValueError: unless `0 < ratio <= 1` and `max_value` is None or at least 1.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"`ratio` is {ratio}, but should be in (0, 1].")
    if max_value is not None and not max_value >= 1:
        raise ValueError(f"`max_value` is {max_value}, but should be None or at least 1.")
    # float32 at least: half precision cannot distinguish the largest magnitudes of an image
    x = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    s = _quantile_per_image(x.abs().flatten(1), ratio).clamp(min=1, max=max_value)
    s = s.reshape(-1, *(1,) * (x.dim() - 1))
    return (x.clamp(-s, s) / s).to(x_0.dtype)


def _quantile_per_image(values: torch.Tensor, ratio: float) -> torch.Tensor:
    """Return the linearly interpolated quantile of each row of `(B, n)`: `(B,)`.

    `torch.quantile` sorts all values, and before torch 2.13 rejects more than 16 million of them, which six 1024 px
    images have; an upper quantile needs only the few largest.
    """
    rank = ratio * (values.shape[1] - 1)
    below = math.floor(rank)
    largest = values.topk(values.shape[1] - below, dim=1).values  # (B, n - below), descending
    return torch.lerp(largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)], rank - below)
