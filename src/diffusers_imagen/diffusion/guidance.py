"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598) and its rescaling.

Predictions are `(B, ...)` in any floating dtype. Guidance commutes with affine transformations of the network's
output, so raw outputs, noise, velocities and denoised images can all be combined, as long as they are not thresholded.
"""

import torch

from .edm import per_sample


def classifier_free_guidance(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Return `uncond + scale * (cond - uncond)`; `scale` is a number, or `(B,)` for one per sample. 1 is no guidance.

    Raises:
        ValueError: if the predictions differ in shape, or `scale` has neither one value nor one per sample.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"`uncond` is of shape {tuple(uncond.shape)}, but should be of that of `cond`, {tuple(cond.shape)}."
        )
    if isinstance(scale, torch.Tensor):
        scale = per_sample(scale, cond).to(cond.dtype)
    return uncond + scale * (cond - uncond)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """Rescale the guided prediction to the contrast of the conditional one (Lin et al. 2023, 2305.08891, eq. 15-16).

    The standard deviation is over all dimensions but the first; `rescale` is the weight of the rescaled prediction,
    from 0 (`guided` unchanged) to 1.

    Raises:
        ValueError: unless `0 <= rescale <= 1`.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"`rescale` is {rescale}, but should be in [0, 1].")
    dims = tuple(range(1, cond.dim()))
    contrast = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (rescale * contrast + (1 - rescale))
