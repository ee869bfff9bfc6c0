"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) and its rescaling.

Predictions are `(B, ...)` in any floating dtype. Guidance commutes with every affine wrapping of the network's output,
so raw outputs, noise, velocities and denoised images may be combined alike, as long as no thresholding came before.
"""

import torch

from .edm import per_sample


def classifier_free_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """`uncond + scale * (cond - uncond)`; `scale` is a number, or `(B,)` for one a sample. 1 is no guidance.

    Raises:
        ValueError: if the predictions differ in shape, or `scale` is neither one value nor one a sample.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"`uncond` is of shape {tuple(uncond.shape)}, but should be of that of `cond`, {tuple(cond.shape)}."
        )
    if isinstance(scale, torch.Tensor):
        scale = per_sample(scale, cond).to(cond.dtype)
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """Guidance brought back to the contrast of the conditional prediction (Lin et al. 2023, 2305.08891, eq. 15-16).

    The standard deviation is over all dimensions but the first; `rescale` is the share of the rescaled prediction, from
    0 (`guided` as it is) to 1.

    Raises:
        ValueError: unless `0 <= rescale <= 1`.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"`rescale` is {rescale}, but should be in [0, 1].")
    dims = tuple(range(1, cond.dim()))
    contrast = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * contrast + (1 - rescale))
